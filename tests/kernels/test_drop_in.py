"""Arguments for callers of other losses: a step's number of items, unshifted labels, weights, types
of the loss, and the z-loss by itself.
"""

import pytest
import torch

from bft_kernels import (
    BalancedLinearCrossEntropyLoss,
    LinearCrossEntropyLoss,
    balanced_linear_cross_entropy,
    linear_cross_entropy,
    linear_nll,
    reference,
)
from bft_kernels.weighting import shift_labels
from tests.support.problems import assert_close, boundaries, draw_problem


def own_scheme(confidence, cu_seqlens):
    return confidence, confidence.new_ones(cu_seqlens.numel() - 1)


SCHEMES = ["sft", "dft", "bft", "bft-v1", own_scheme]


def both(p, call):
    """A call's loss and gradients."""
    loss = call(p)
    return {"loss": loss, **p.gradients(loss)}


@pytest.mark.parametrize("frozen", [(), ("weight", "bias")], ids=["trained head", "frozen head"])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 1e-2}], ids=str)
@pytest.mark.parametrize("number", [7, 2.5, torch.tensor(11)], ids=str)
def test_the_mean_over_the_items_of_a_step(number, options, frozen):
    p = draw_problem(23, 6, 31, bias=True, frozen=frozen)
    factor = torch.randn(23, dtype=torch.float64)

    def expected(p):
        nll = reference.linear_nll(*p.args, bias=p.bias, **options)
        return (nll * factor).sum() / number

    def call(p):
        return linear_cross_entropy(
            *p.args, bias=p.bias, num_items=number, token_weight=factor, **options
        )

    assert_close(both(p, call), both(p.copy(), expected))


@pytest.mark.parametrize("gradient", ["exact", "sampled"])
def test_parts_of_a_step_add_up(gradient):
    p = draw_problem(24, 6, 31)
    how = {"gradient": gradient, "eps": 1.0, "seed": 3}
    parts = [p.target[:5], p.target[5:6], p.target[6:]]
    items = int(p.labelled.sum())
    losses = [
        linear_cross_entropy(hidden, p.weight, target, num_items=items, **how)
        for hidden, target in zip(p.hidden.split([5, 1, 18]), parts, strict=True)
    ]
    want = reference.linear_nll(*p.args).sum() / items
    assert_close(sum(losses), want)
    if gradient == "exact":
        assert_close(p.gradients(sum(losses), retain=True), p.gradients(want))


def test_a_step_without_items():
    p = draw_problem(5, 4, 9, ignored=1.1)
    found = both(p, lambda p: linear_cross_entropy(*p.args, num_items=0))
    assert not any(bool(value.any()) for value in found.values())
    p.target[0] = 1
    with pytest.raises(ValueError, match="num_items: got 0 with 1 labelled tokens"):
        linear_cross_entropy(*p.args, num_items=0)
    with pytest.raises(ValueError, match="num_items: got -1, expected"):
        linear_cross_entropy(*p.args, num_items=-1)
    for reduction in ("sum", "none"):
        with pytest.raises(ValueError, match=f"num_items: got .* with reduction='{reduction}'"):
            linear_cross_entropy(*p.args, num_items=3, reduction=reduction)


FUNCTIONS = {
    "nll": linear_nll,
    "mean": linear_cross_entropy,
    "module": lambda *args, shift=False, **how: LinearCrossEntropyLoss(shift=shift)(*args, **how),
    "balanced": balanced_linear_cross_entropy,
    "balanced module": lambda *args, shift=False, **how: BalancedLinearCrossEntropyLoss(
        shift=shift
    )(*args, **how),
}


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("shape", [(3, 8), (24,), (24, 1), (1, 24)], ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_labels_that_are_not_shifted(name, shape, packed):
    p, function = draw_problem(24, 6, 31), FUNCTIONS[name]
    labels, hidden = p.target.view(shape), p.hidden.view(*shape, 6)
    cu = boundaries([1, 0, 12, 3, 8]) if packed else None
    aligned = shift_labels(labels, cu)
    # Of aligned labels only the balanced loss asks for documents.
    of_aligned = {"cu_seqlens": cu} if name.startswith("balanced") else {}
    got = function(hidden, p.weight, labels, shift=True, cu_seqlens=cu)
    assert torch.equal(got, function(hidden, p.weight, aligned, **of_aligned))
    if not packed:
        rows = labels.view(-1, shape[-1])
        by_hand = torch.full_like(rows, -100)
        by_hand[:, :-1] = rows[:, 1:]
        assert torch.equal(aligned.view_as(rows), by_hand)


def test_weights_move_with_their_labels():
    p = draw_problem(24, 6, 31)
    labels, hidden = p.target.view(3, 8), p.hidden.view(3, 8, 6)
    factor = torch.randn(3, 8, dtype=torch.float64)
    moved = torch.zeros_like(factor)
    moved[:, :-1] = factor[:, 1:]
    for function in (linear_cross_entropy, balanced_linear_cross_entropy):
        got = function(hidden, p.weight, labels, shift=True, token_weight=factor)
        want = function(hidden, p.weight, shift_labels(labels), token_weight=moved)
        assert torch.equal(got, want)


def test_boundaries_serve_a_shift_only():
    p = draw_problem(24, 6, 31)
    for function in (linear_nll, linear_cross_entropy):
        with pytest.raises(ValueError, match="cu_seqlens: got boundaries with shift=False"):
            function(*p.args, cu_seqlens=boundaries([24]))
    with pytest.raises(ValueError, match="shape"):
        linear_nll(p.hidden[0], p.weight, p.target[0], shift=True)


@pytest.mark.parametrize(
    ("dtype", "ignore_index"), [(torch.int32, -100), (torch.uint8, 255), (torch.uint8, -100)]
)
def test_narrow_targets(dtype, ignore_index):
    p = draw_problem(20, 6, 200, ignore_index=ignore_index, ignored=0.3 * (ignore_index != -100))
    for function in (linear_nll, linear_cross_entropy, balanced_linear_cross_entropy):
        got = function(p.hidden, p.weight, p.target.to(dtype), ignore_index=ignore_index)
        assert torch.equal(got, function(*p.args, ignore_index=ignore_index))
    with pytest.raises(TypeError, match=r"target: got dtype torch\.float32, expected one of"):
        linear_nll(p.hidden, p.weight, p.target.float())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("gradient", ["exact", "sampled"])
@pytest.mark.parametrize("return_stats", [False, True])
@pytest.mark.parametrize("normalize", ["sequence", "token"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: getattr(s, "__name__", s))
@pytest.mark.parametrize("frozen", [(), ("weight",)], ids=["trained head", "frozen head"])
def test_weights_of_the_data(scheme, normalize, return_stats, gradient, frozen, dtype):
    """They multiply after the scheme: nothing else of the loss knows of them."""
    p = draw_problem(30, 6, 31, frozen=frozen, dtype=dtype)
    cu, factor = boundaries([11, 0, 7, 12]), torch.randn(30, dtype=dtype)
    factor[3:6] = 0
    weighting = {"scheme": scheme, "window": 4, "normalize": normalize}
    stats = []

    def call(p, **more):
        how = weighting | {"gradient": gradient, "eps": 2**-20, "seed": 5} | more
        result = balanced_linear_cross_entropy(
            *p.args, cu_seqlens=cu, return_stats=return_stats, **how
        )
        if return_stats:
            result, found = result
            stats.append(found)
        return result

    got = both(p, lambda p: call(p, token_weight=factor))

    def expected(p):
        return reference.balanced_linear_cross_entropy(
            *p.args, cu, token_weight=factor, **weighting
        )

    rounding = 1e-11 if dtype == torch.float64 else 1e-5
    sampling = 1e-4 if gradient == "sampled" else 0
    assert_close(got, both(p.copy(torch.float64), expected), rounding + sampling)
    if return_stats:
        call(p)
        for one, other in zip(*stats, strict=True):
            assert torch.equal(one, other) if one is not None else other is None


@pytest.mark.parametrize("frozen", [(), ("weight", "bias")], ids=["trained head", "frozen head"])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_the_z_loss_by_itself(reduction, frozen):
    p = draw_problem(23, 6, 31, bias=True, frozen=frozen)
    factor, number = torch.randn(23, dtype=torch.float64), 7 if reduction == "mean" else None
    how = {"reduction": reduction, "num_items": number, "token_weight": factor, "bias": p.bias}
    loss, part, stats = linear_cross_entropy(
        *p.args, z_loss=1e-2, return_z_loss=True, return_stats=True, **how
    )
    token = factor * reference.linear_nll(*p.args, bias=p.bias, z_loss=1e-2)
    expected = token - factor * reference.linear_nll(*p.args, bias=p.bias)
    expected = expected if reduction == "none" else expected.sum() / (number or 1)
    assert not part.requires_grad
    assert stats.lse.shape == (23,)
    assert_close(part, expected)
    assert torch.equal(linear_cross_entropy(*p.args, z_loss=1e-2, **how), loss)
    plain, nothing = linear_cross_entropy(*p.args, return_z_loss=True, **how)
    assert not bool(nothing.any())
    assert_close(plain + part, loss)


@pytest.mark.parametrize("name", ["nll", "mean", "balanced"])
@pytest.mark.parametrize("gradient", ["exact", "sampled"])
@pytest.mark.parametrize("return_stats", [False, True])
def test_the_loss_in_another_type(name, gradient, return_stats):
    p, function = draw_problem(24, 6, 31, dtype=torch.bfloat16), FUNCTIONS[name]
    how = {"gradient": gradient, "seed": 3, "return_stats": return_stats}
    wide, narrow = function(*p.args, **how), function(*p.args, out_dtype=torch.bfloat16, **how)
    if return_stats:
        assert wide[1].nll.dtype == narrow[1].nll.dtype == torch.float32
        wide, narrow = wide[0], narrow[0]
    assert wide.dtype == torch.float32
    assert narrow.dtype == torch.bfloat16
    assert torch.equal(wide.bfloat16(), narrow)
    for one, other in zip(*[p.gradients(x.sum()).values() for x in (wide, narrow)], strict=True):
        assert torch.equal(one, other)
