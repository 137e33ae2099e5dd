"""What the backends with kernels of their own for a GPU share, in torch.

The host never waits for the device: rows are counted there, lists have room for what is expected,
and what finds no room is computed again.
"""
