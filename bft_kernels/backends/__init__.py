"""Implementations of the ops, one folder each; ``common`` is what they share.

A backend is a package, named in ``dispatch.BACKENDS``. Importing it is cheap, and gives

``why_not(hidden, weight)``
    reasons why it cannot take these tensors;
``UNASKED_ON``
    optional: types of devices where ``backend="auto"`` may take it; any without it.

Its module ``engine`` has ``linear_nll``, ``linear_nll_backward`` and ``weighted_loss``, see
:class:`bft_kernels.dispatch.Engine`, and may have

``try_out(device, operand)``
    a small call, made before the first one on a GPU;
``balanced_loss``
    kernels for :func:`bft_kernels.weighting.balanced_loss`;
``compiling(device)``
    a context in which launches compile and run nothing, for :func:`bft_kernels.warm_up`;
``scale_(x, factor)``
    ``x *= factor []`` in one kernel that returns at once where the factor is 1.
"""
