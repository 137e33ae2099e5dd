"""What must hold before any test file is imported."""

import os

import torch

# Triton decides when a kernel is decorated whether it is interpreted, which it is where there is no
# GPU. Its own library is decorated when it is imported, by whichever test does so first.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
