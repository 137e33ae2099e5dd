"""The CUDA backward by recomputation, its device code run by the emulation."""

import math

import pytest
import torch

from bft_kernels import reference
from tests.support.emulated_device import DTYPES, Device, check_same
from tests.support.problems import cancellation, draw_problem, error_of
from tests.support.samples import clear_seed, specified_sample


def known_rows(p, **how):
    """lse, what rounding took from it, and nll, by position, from float64."""
    own = p.of_labelled()
    stats = reference.token_stats(*own.args, bias=own.bias, **how)
    stats["lse_low"] = stats["lse"] - stats["lse"].float().double()
    out = {name: torch.full(p.target.shape, math.nan) for name in ("lse", "lse_low", "nll")}
    for name, values in out.items():
        values[p.labelled] = stats[name].float()
    return out


def run_backward(
    cuda,
    p,
    grad,
    *,
    seed=None,
    eps=1.0,
    step=128,
    scale=None,
    adds=False,
    wide=False,
    order=None,
    label_smoothing=0.0,
    z_loss=0.0,
    **transform,
):
    """The three gradients, in blocks of `step` columns. Rows that are ignored stay NaN."""
    device = Device(cuda, p, **transform, **(order or {}))
    count, width, vocabulary = device.shape
    dtype = device.hidden.dtype
    out = torch.float32 if wide else dtype
    known = known_rows(p, **transform)
    known["grad"] = (grad * (scale or 1.0)).float()
    scales = {"scale": None if scale is None else torch.tensor([scale])}
    seeds = {"seed": None if seed is None else torch.tensor([seed])}
    dy = torch.full((count, step), math.nan, dtype=dtype)
    bias_sums = torch.full((-(-count // 128), step), math.nan)
    sums = torch.full((count, width), math.nan)
    grad_hidden = torch.full((count, width), math.nan, dtype=out)
    grad_weight = torch.full((vocabulary, width + 5), 1.0 if adds else math.nan, dtype=out)
    grad_bias = torch.zeros(vocabulary)
    for first in range(0, vocabulary, step):
        block = {"first_column": first, "columns": min(step, vocabulary - first), "stride_dy": step}
        device.call(
            "logit_gradient",
            known | seeds | scales,
            {"dy": dy, "bias_sums": bias_sums, "grad_bias": grad_bias},
            reads_outputs=True,  # adds to grad_bias
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            eps=eps,
            **block,
        )
        device.call(
            "hidden_gradient",
            {"dy": dy, **scales},
            {"sums": sums, "grad_hidden": grad_hidden},
            reads_outputs=first > 0,  # to add to them
            is_float32=wide,
            **block,
        )
        device.call(
            "weight_gradient",
            {"dy": dy, **scales},
            {"grad_weight": grad_weight},
            reads_outputs=adds,
            stride_gv=grad_weight.stride(0),
            adds=adds,
            is_float32=wide,
            **block,
        )
    padding = grad_weight[:, width:]
    assert bool(((padding == 1.0) if adds else padding.isnan()).all())
    return {
        "hidden": grad_hidden,
        "weight": grad_weight[:, :width] - (1.0 if adds else 0.0),
        "bias": grad_bias,
    }


def loss_of(p, grad, **how):
    return (reference.linear_nll(*p.args, bias=p.bias, **how) * grad).sum()


def expect(p, grad, dtype, **how):
    """Autograd's gradients of the specification, in a type."""
    own = p.copy(dtype)
    return own.gradients(loss_of(own, grad.to(dtype), **how))


def check(got, p, grad, rounding=0, **how):
    truth = expect(p, grad, torch.float64, **how)
    plain = expect(p, grad, torch.float32, **how)
    assert bool(got["hidden"][~p.labelled].isnan().all())
    got = got | {"hidden": torch.where(p.labelled[:, None], got["hidden"], 0.0)}
    # What rounding dy to the operands' type can do, in sums that cancel, and rounding the result.
    factor = cancellation(p, lambda p: loss_of(p, grad, **how))
    rounding = max(rounding, torch.finfo(p.hidden.dtype).eps / 2)
    for name, expected in truth.items():
        allowed = 4 * error_of(plain[name], expected) + rounding * (1 + factor[name]) + 2e-6
        assert error_of(got[name], expected) <= allowed, name


TRANSFORMS = {
    "plain": {},
    "bias": {"bias": True},
    "cap": {"softcap": 5.0, "temperature": 0.7},
    "all": {"bias": True, "softcap": 8.0, "label_smoothing": 0.1, "z_loss": 1e-3},
}
SHAPES = [(1, 1, 2), (5, 8, 127), (37, 72, 129), (40, 67, 400), (130, 16, 260)]


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients(emulated, dtype, shape, transform, seed):
    how = dict(TRANSFORMS[transform])
    p = draw_problem(*shape, bias=how.pop("bias", False), dtype=dtype, scale=2.0, ignored=0.2)
    p.target[0] = 1
    grad = torch.randn(shape[0])
    order = {"order_seed": seed}
    got = run_backward(emulated, p, grad, step=128 + 128 * (seed % 3), order=order, **how)
    check(got, p, grad, **how)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_scale_is_taken_back(emulated, dtype):
    p = draw_problem(20, 24, 150, bias=True, dtype=dtype, scale=2.0)
    grad = torch.randn(20) * 2.0**-20
    got = run_backward(emulated, p, grad, scale=2.0**22)
    tiny = 2.0**-24 if dtype == torch.float16 else 0.0  # its last place near 0
    truth = expect(p, grad, torch.float64)
    for name in ("weight", "bias"):
        worst = float((got[name].double() - truth[name]).abs().max())
        allowed = torch.finfo(dtype).eps + 2e-6
        assert worst <= allowed * float(truth[name].abs().max()) + tiny, name
    assert bool(got["hidden"][p.labelled].isfinite().all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weight_gradients_are_added_to(emulated, dtype):
    p = draw_problem(20, 24, 150, dtype=dtype, scale=2.0)
    grad = torch.randn(20)
    got = run_backward(emulated, p, grad, adds=True)
    # Ones were there, beside which small numbers lose digits.
    own = float(expect(p, grad, torch.float64)["weight"].square().mean().sqrt())
    check(got, p, grad, rounding=torch.finfo(dtype).eps * (1 + 2 / own))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_gradients_in_float32_are_rounded_nowhere_else(emulated, dtype):
    p = draw_problem(20, 24, 150, dtype=dtype, scale=2.0)
    grad = torch.randn(20)
    narrow, wide = (run_backward(emulated, p, grad, wide=wide) for wide in (False, True))
    for name in ("hidden", "weight"):
        assert wide[name].dtype == torch.float32
        check_same({name: narrow[name]}, {name: wide[name].to(dtype)})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_rows_and_none_labelled(emulated, dtype):
    for rows in (0, 9):
        p = draw_problem(rows, 8, 140, dtype=dtype, ignored=2.0)
        got = run_backward(emulated, p, torch.randn(rows))
        assert bool((got["weight"] == 0).all())
        assert bool((got["bias"] == 0).all())
        assert bool(got["hidden"].isnan().all())
        assert bool((run_backward(emulated, p, torch.randn(rows), adds=True)["weight"] == 0).all())


@pytest.mark.parametrize("transform", ["plain", "cap"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sampled_gradients(emulated, dtype, transform, seed):
    how, eps = dict(TRANSFORMS[transform]), 2**-6
    p = draw_problem(30, 24, 300, dtype=dtype, scale=2.0)
    seed = clear_seed(p, seed, eps, **how)
    grad, own = torch.randn(30), p.of_labelled()
    got = run_backward(emulated, p, grad, seed=seed, eps=eps, **how)
    dy = specified_sample(p, seed, eps, **how).dy * grad[p.labelled, None].double()
    expected = {"hidden": dy @ own.weight, "weight": dy.T @ own.hidden, "bias": dy.sum(0)}
    got["hidden"] = got["hidden"][p.labelled]
    for name, value in expected.items():
        assert error_of(got[name], value) <= torch.finfo(dtype).eps + 2e-6, name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_order_of_threads_changes_nothing(emulated, dtype):
    p = draw_problem(40, 72, 300, dtype=dtype, bias=True)
    grad = torch.randn(40)
    orders = [{"order_seed": order, "strict": order == 2} for order in range(3)]
    check_same(*(run_backward(emulated, p, grad, order=order) for order in orders))
