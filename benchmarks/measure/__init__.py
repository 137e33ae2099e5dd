"""Measures seconds, memory and errors."""
