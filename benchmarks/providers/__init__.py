"""The losses that are compared."""
