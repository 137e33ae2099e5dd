"""Compares speed and memory of the fused loss and its peers, in one run, on any device."""
