"""The certificate of the CUDA kernels' sampled gradient, its device code run by the emulation."""

import math

import pytest
import torch

from bft_kernels import reference
from tests.support.emulated_device import DTYPES, Device, check_same, strided
from tests.support.problems import Problem, draw_problem, error_of

EPS = 2**-5


def run_certificate(
    cuda, p, lse=None, *, eps=EPS, processors=1, part=None, norms=True, transform=None, **order
):
    """`variance`, `hidden_variance` and `norms`, NaN where nothing is written.

    `lse [N]`: by PyTorch if None. `part`: how many rows a launch takes.
    """
    transform = transform or {}
    device = Device(cuda, p, **transform, **order)
    count, _, vocabulary = device.shape
    part = part or max(count, 1)
    splits, columns = cuda.forward_splits(part, vocabulary, processors)
    shapes = {"variance": (count,), "hidden_variance": (count,), "norms": (vocabulary,)}
    out = {name: torch.full(shape, math.nan) for name, shape in shapes.items()}
    reads = {"lse": true_lse(p, **transform) if lse is None else lse}
    writes = {"variance": out["variance"]}
    writes["sums"] = torch.full((1 + norms, splits, part), math.nan)
    if norms:
        device.call("squared_norms", {}, {"norms": out["norms"]})
        reads["norms"] = out["norms"]
        writes["hidden_variance"] = out["hidden_variance"]
    for first in range(0, count, part):
        device.call(
            "certificate",
            reads,
            writes,
            first_row=first,
            rows=min(part, count - first),
            splits=splits,
            split_columns=columns,
            eps=eps,
        )
    return out


def true_lse(p, **transform):
    """As the forward leaves it: NaN where ignored."""
    own, lse = p.of_labelled(), torch.full(p.target.shape, math.nan)
    lse[p.labelled] = reference.token_stats(*own.args, bias=own.bias, **transform)["lse"].float()
    return lse


def expect(p, dtype, **how):
    """What plain PyTorch makes of the labelled rows in a type."""
    own = p.of_labelled(dtype)
    sample = reference.sampled_gradient(*own.args, 0, bias=own.bias, **({"eps": EPS} | how))
    norms = own.weight.square().sum(1)
    return {"variance": sample.variance, "hidden_variance": sample.hidden_variance, "norms": norms}


def check(got, p, **how):
    """Results are as near to the truth as PyTorch's own in float32, from the same values."""
    truth, plain = expect(p, torch.float64, **how), expect(p, torch.float32, **how)
    for name, expected in truth.items():
        own = got[name]
        if name != "norms":
            assert bool(own[~p.labelled].isnan().all()), f"{name}: written where ignored"
            own = own[p.labelled]
        assert error_of(own, expected) <= 4 * error_of(plain[name], expected) + 4e-6, name


TRANSFORMS = {
    "plain": {},
    "bias": {"bias": True},
    "cap": {"softcap": 2.0, "temperature": 0.7},
    "all": {"bias": True, "softcap": 5.0, "temperature": 1.3},
}
SHAPES = [(1, 1, 1), (5, 8, 127), (37, 72, 129), (40, 67, 600), (130, 16, 260)]


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results(emulated, dtype, shape, transform, seed):
    how = dict(TRANSFORMS[transform])
    p = draw_problem(*shape, bias=how.pop("bias", False), dtype=dtype, scale=2.0)
    got = run_certificate(emulated, p, processors=1 + seed % 3, order_seed=seed, transform=how)
    check(got, p, **how)


@pytest.mark.parametrize("eps", [2**-12, 1.0])
def test_eps_at_the_ends(emulated, eps):
    p = draw_problem(20, 24, 300, dtype=torch.float32, scale=2.0)
    check(run_certificate(emulated, p, eps=eps), p, eps=eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_rows_and_none_labelled(emulated, dtype):
    for rows in (0, 9):
        p = draw_problem(rows, 8, 40, dtype=dtype, ignored=2.0)
        check(run_certificate(emulated, p), p)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pad", [8, 3], ids=["aligned", "unaligned"])
def test_rows_may_be_strided(emulated, dtype, pad):
    p = draw_problem(20, 43, 150, dtype=dtype, scale=2.0)
    check(run_certificate(emulated, strided(p, pad)), p)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_neither_parts_splits_nor_threads_change_a_row(emulated, dtype):
    p = draw_problem(40, 72, 300, dtype=dtype, bias=True)
    first = run_certificate(emulated, p, processors=2)
    for how in ({"order_seed": 1}, {"order_seed": 2, "strict": True}, {"part": 16}):
        check_same(first, run_certificate(emulated, p, processors=2, **how))
    plain = run_certificate(emulated, p, processors=2, norms=False)
    assert bool(plain["hidden_variance"].isnan().all())
    check_same({"variance": first["variance"]}, plain)


def test_a_target_outside_of_the_vocabulary_leaves_nothing_out(emulated):
    p = draw_problem(5, 8, 140, dtype=torch.float32, ignored=0.0)
    lse = true_lse(p)
    inside = run_certificate(emulated, p, lse)
    p.target[1], p.target[2], p.target[3] = 140, -5, 2**32 + 3
    got = run_certificate(emulated, p, lse)
    z = p.hidden.detach().double() @ p.weight.detach().double().T
    probability = z.softmax(-1)
    whole = (probability * (EPS - probability).clamp_min(0)).sum(-1)
    assert error_of(got["variance"][1:4], whole[1:4]) < 4e-6
    kept = torch.tensor([0, 4])
    assert torch.equal(got["variance"][kept], inside["variance"][kept])
    assert bool((got["variance"][1:4] > inside["variance"][1:4]).any())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("transform", [{}, {"softcap": 5.0}], ids=str)
def test_a_bad_row_spoils_its_own_certificate_only(emulated, value, transform):
    p = draw_problem(20, 9, 150, ignored=0.0, dtype=torch.float32)
    p.hidden.data[7, :2] = value
    p.weight.data[:, :2] = torch.tensor([1.0, -1.0])  # inf - inf, whatever the others are
    got = run_certificate(emulated, p, transform=transform)
    for name in ("variance", "hidden_variance"):
        assert torch.equal(got[name].isnan(), torch.arange(20) == 7), name


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("target", [5, 6])
def test_a_bad_column_spoils_the_certificate(emulated, value, target):
    p = draw_problem(20, 9, 151, ignored=0.0, dtype=torch.float32)
    p.hidden.data[:, :2] = torch.tensor([1.0, -1.0])
    p.weight.data[5] = value
    p.target[:] = target
    got = run_certificate(emulated, p)
    assert bool(got["variance"].isnan().all() and got["hidden_variance"].isnan().all())
    assert torch.equal(got["norms"].isfinite(), torch.arange(151) != 5)


def test_columns_that_cannot_be_drawn_add_nothing(emulated):
    weight = torch.tensor([[0.0], [-math.inf], [0.0], [-math.inf]])
    p = Problem(torch.ones(2, 1), weight, torch.tensor([0, 1]))
    got = run_certificate(emulated, p, eps=1.0)
    assert got["variance"].tolist() == pytest.approx([0.25, 0.5], rel=1e-6)


def test_arguments_are_checked(emulated):
    problem = {f"{name}_ptr": 16 for name in ("hidden", "weight", "target", "order", "count")}
    problem |= {"bias_ptr": 0, "N": 3, "V": 4, "D": 4, "dtype": 0, "stride_hn": 4, "stride_wv": 4}
    good = {"problem": emulated.Problem(**problem), "first_row": 0, "rows": 3, "splits": 1}
    good |= {"split_columns": 128, "sums_ptr": 16, "lse_ptr": 16, "eps": 0.5, "variance_ptr": 16}
    wrong = {"rows": 4, "first_row": 1, "splits": 2, "split_columns": 127, "eps": 0.0}
    wrong |= {"sums_ptr": 0, "lse_ptr": 2, "variance_ptr": 0, "norms_ptr": 16}
    wrong |= {"hidden_variance_ptr": 16}
    for name, value in wrong.items():
        with pytest.raises(ValueError, match="rows" if name == "first_row" else name):
            emulated.certificate(**{**good, name: value}, stream=0)
    with pytest.raises(ValueError, match="norms_ptr"):
        emulated.squared_norms(problem=good["problem"], norms_ptr=0, stream=0)
