"""Implementations of the ops, one folder each; ``common`` is what they share.

A backend is a package, named in ``dispatch.BACKENDS``. Importing it is cheap. It has

``why_not(hidden, weight)``
    the reasons why it cannot take these tensors;
``UNASKED_ON``
    optional: types of devices on which ``backend="auto"`` may take it; by default all.

Its module ``engine`` has ``linear_nll``, ``linear_nll_backward`` and ``weighted_loss``, see
:class:`bft_kernels.dispatch.Engine`, and may have

``try_out(device, operand)``
    makes a small call before the backend's first real one on a GPU;
``balanced_loss``
    computes :func:`bft_kernels.weighting.balanced_loss` with its own kernels;
``compiling(device)``
    gives a context in which launches compile and run nothing, for :func:`bft_kernels.warm_up`;
``scale_(x, factor)``
    multiplies ``x`` by ``factor []`` in one kernel, which returns at once if the factor is 1.
"""
