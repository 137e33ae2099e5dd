"""Implementations of the ops, one folder each."""
