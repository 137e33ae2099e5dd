"""Trainers of other libraries with the fused loss; each module needs its library."""
