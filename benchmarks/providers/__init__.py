"""Who is compared."""
