"""The public functions and the specification on a problem, and how two losses are compared."""

from bft_kernels import balanced_linear_cross_entropy, linear_cross_entropy, linear_nll, reference
from tests.support.problems import assert_close


def nll(p, **how):
    return linear_nll(*p.args, bias=p.bias, **how)


def cross_entropy(p, **how):
    return linear_cross_entropy(*p.args, bias=p.bias, **how)


def balanced(p, **how):
    return balanced_linear_cross_entropy(*p.args, bias=p.bias, **how)


def specified_nll(p, **how):
    return reference.linear_nll(*p.args, bias=p.bias, **how)


def specified_balanced(p, cu_seqlens, **how):
    return reference.balanced_linear_cross_entropy(*p.args, cu_seqlens, bias=p.bias, **how)


def assert_same_loss(p, loss, expected, tolerance=1e-11, what=""):
    """Of two scalars: the values, and the gradients in the leaves of a problem.

    The expected loss may be compared again.
    """
    assert_close(loss, expected, tolerance, what)
    assert_close(p.gradients(loss), p.gradients(expected, True), tolerance, what)
