"""The CUDA forward, its device code run by the emulation, against the specification."""

import math

import pytest
import torch

from bft_kernels import reference
from tests.support.emulated_device import DTYPES, IGNORED, Device, check_same, strided
from tests.support.problems import Problem, draw_problem, error_of
from tests.support.samples import specified_sample


def new(*shape, dtype=torch.float32):
    """An output that no kernel has written."""
    fill = math.nan if dtype.is_floating_point else 0x55
    return torch.full(shape, fill).to(dtype)


def run_forward(
    cuda,
    p,
    *,
    seed=None,
    eps=2**-7,
    lse_bound=None,
    processors=1,
    part=None,
    one_split=False,
    order=None,
    label_smoothing=0.0,
    z_loss=0.0,
    **transform,
):
    """Results by position, untouched where ignored; `mask` and `rows` with a seed.

    `part`: how many rows a launch takes.
    """
    device = Device(cuda, p, **transform, **(order or {}))
    count, _, vocabulary = device.shape
    out = {name: new(count) for name in ("loss", "nll", "lse", "lse_low", "entropy")}
    out["correct"] = new(count, dtype=torch.bool)
    mask = new(count, -(-vocabulary // 32), dtype=torch.int32)
    lse_bound = new(count) if lse_bound is None else lse_bound
    part = part or max(count, 1)
    splits, columns = cuda.forward_splits(part, vocabulary, processors)
    if one_split:
        splits, columns = 1, -(-vocabulary // 128) * 128
    writes = out | {"sums": new(cuda.FORWARD_SUMS, splits, part)}
    numbers = {"splits": splits, "split_columns": columns}
    numbers |= {"label_smoothing": label_smoothing, "z_loss": z_loss}
    reads = {}
    if seed is not None:
        if bool(lse_bound.isnan().all()):
            device.call("target_bound", {}, {"lse_bound": lse_bound})
        reads = {"seed": torch.tensor([seed]), "lse_bound": lse_bound}
        numbers["eps"] = eps
    for first in range(0, count, part):
        if seed is not None:
            writes["mask"] = mask[first:]
        rows = min(part, count - first)
        device.call("linear_nll_forward", reads, writes, first_row=first, rows=rows, **numbers)
    return out | {"mask": mask, "rows": device.rows, "lse_bound": lse_bound}


def bits_of(mask, vocabulary):
    """The bits of int32 words, lowest first, as bool; those past the vocabulary must not be set."""
    bits = (mask[..., None] >> torch.arange(32)) & 1
    bits = bits.flatten(-2).bool()
    assert not bool(bits[..., vocabulary:].any())
    return bits[..., :vocabulary]


def expect(p, dtype, label_smoothing=0.0, z_loss=0.0, **how):
    """What plain PyTorch makes of the labelled rows in a type."""
    own = p.of_labelled(dtype)
    how |= {"bias": own.bias}
    stats = reference.token_stats(*own.args, **how)
    losses = {"label_smoothing": label_smoothing, "z_loss": z_loss}
    stats["loss"] = reference.linear_nll(*own.args, **how, **losses)
    del stats["confidence"]  # a kernel leaves it to be made of nll
    z = reference.logits(own.hidden, own.weight, **how)
    largest = torch.nn.functional.pad(z, (0, 1), value=-math.inf).topk(2).values
    return stats | {"gap": largest[:, 0] - largest[:, 1]}


def check(got, p, **how):
    """Results are as near to the truth as PyTorch's own in float32, from the same values."""
    labelled = p.labelled
    truth, plain = expect(p, torch.float64, **how), expect(p, torch.float32, **how)
    clear = truth.pop("gap") > 1e-5  # to float32 the two largest logits differ
    for name, expected in truth.items():
        own = got[name]
        if name == "correct":
            assert torch.equal(own[labelled][clear], expected[clear])
            continue
        assert bool(own[~labelled].isnan().all()), f"{name}: written where ignored"
        allowed = 4 * error_of(plain[name], expected) + 4e-6
        # The logarithm of a sum near 1 has float32's digits beside 1.
        allowed += 2e-7 * len(expected) ** 0.5 / max(float(expected.norm()), 1e-30)
        assert error_of(own[labelled], expected) <= allowed, name
    exact = got["lse"].double() + got["lse_low"].double()
    allowed = 4 * error_of(plain["lse"], truth["lse"]) + 1e-6
    assert error_of(exact[labelled], truth["lse"]) <= allowed


TRANSFORMS = {
    "plain": {},
    "bias": {"bias": True},
    "cap": {"softcap": 2.0, "temperature": 0.7},
    "all": {"bias": True, "softcap": 5.0, "label_smoothing": 0.1, "z_loss": 1e-3},
}
SHAPES = [(1, 1, 1), (5, 8, 127), (37, 72, 129), (40, 67, 600), (130, 16, 260)]


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results(emulated, dtype, shape, transform, seed):
    how = dict(TRANSFORMS[transform])
    p = draw_problem(*shape, bias=how.pop("bias", False), dtype=dtype, scale=3.0)
    got = run_forward(emulated, p, processors=1 + seed % 3, order={"order_seed": seed}, **how)
    check(got, p, **how)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_rows_and_none_labelled(emulated, dtype):
    assert run_forward(emulated, draw_problem(0, 8, 40, dtype=dtype), seed=1)["nll"].shape == (0,)
    got = run_forward(emulated, draw_problem(9, 8, 40, dtype=dtype, ignored=2.0), seed=1)
    assert all(bool(got[name].isnan().all()) for name in ("loss", "nll", "lse", "lse_bound"))
    assert bool((got["mask"] == 0x55).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pad", [8, 3], ids=["aligned", "unaligned"])
def test_rows_may_be_strided(emulated, dtype, pad):
    p = draw_problem(20, 40, 150, dtype=dtype, scale=2.0)
    check(run_forward(emulated, strided(p, pad)), p)


@pytest.mark.parametrize("transform", ["plain", "all"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_cover_the_kept_set(emulated, dtype, transform, seed):
    how = dict(TRANSFORMS[transform])
    rows, vocabulary, eps = 40, 600, 2**-6
    p = draw_problem(rows, 24, vocabulary, dtype=dtype, bias=how.pop("bias", False), scale=3.0)
    for name in ("label_smoothing", "z_loss"):
        how.pop(name, None)
    how |= {"seed": seed, "eps": eps}
    split = run_forward(emulated, p, processors=2, part=16, **how)
    whole = run_forward(emulated, p, one_split=True, **how)
    del how["seed"], how["eps"]
    labelled, positions = p.labelled, p.positions
    assert torch.equal(split["rows"], positions)
    expected, own = specified_sample(p, seed, eps, **how), p.of_labelled()
    lse = reference.token_stats(*own.args, bias=own.bias, **how)["lse"]
    for got in split, whole:
        assert bool((got["lse_bound"][labelled].double() <= lse).all())
        bits = bits_of(got["mask"][: len(positions)], vocabulary)
        assert not bool((expected.kept & ~bits).any())
    # The first of five tiles has no bound but the lse_bound; what came before bounds the others.
    assert int(bits[:, 128:].sum()) < 5 * int(expected.kept[:, 128:].sum())
    # With a lse_bound that is lse itself hardly more than what is kept is let through.
    tight = torch.zeros(rows)
    tight[labelled] = lse.float()
    again = run_forward(emulated, p, seed=seed, eps=eps, lse_bound=tight, **how)
    bits = bits_of(again["mask"][: len(positions)], vocabulary)
    assert not bool((expected.kept & ~bits).any())
    assert int(bits.sum()) <= 1.02 * int(expected.kept.sum()) + 3


@pytest.mark.parametrize("kind", ["flat", "ascending", "descending", "one column"])
def test_bits_of_hostile_logits(emulated, kind, seed):
    vocabulary, eps = 300, 2**-8
    z = {
        "flat": torch.zeros(vocabulary),
        "ascending": torch.linspace(-20, 20, vocabulary),
        "descending": torch.linspace(20, -20, vocabulary),
        "one column": torch.zeros(vocabulary).index_fill_(0, torch.tensor([299]), 60.0),
    }[kind]
    target = torch.tensor([0, 150, 299])
    p = Problem(torch.ones(3, 1), z[:, None], target)
    got = run_forward(emulated, p, seed=seed, eps=eps, lse_bound=torch.full((3,), -math.inf))
    kept = specified_sample(p, seed, eps).kept
    assert not bool((kept & ~bits_of(got["mask"], vocabulary)).any())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_that_are_not_finite_or_large(emulated, dtype):
    vocabulary = 300
    hidden = torch.eye(8, dtype=dtype)
    z = torch.randn(8, vocabulary)
    z[1, 200] = math.nan
    z[2, 10] = math.inf
    z[3, :150] = -math.inf  # a whole tile, and what follows is far below 0
    z[3, 150:] -= 200.0
    z[4] = -math.inf
    z[5] *= 1e4
    z[6, 17] = -math.inf  # its target
    target = torch.tensor([299, 1, 2, 160, 3, 4, 17, 0])
    # A row has one column of weight to itself, but 0 * inf is NaN: those rows are computed alone.
    for row in range(8):
        own = Problem(
            torch.cat([hidden[:1, :1], torch.ones(1, 1, dtype=dtype)]),
            z[row][:, None].to(dtype),
            torch.tensor([target[row], IGNORED]),
        )
        got = run_forward(emulated, own, label_smoothing=0.0, seed=5)
        want = expect(own, torch.float64)
        for name in ("nll", "lse"):
            if not bool(want[name].isfinite()):
                # Plus infinity makes NaN of the whole row, as in the Triton kernels.
                assert not bool(got[name][0].isfinite()), (row, name)
            else:
                torch.testing.assert_close(got[name][:1].double(), want[name], rtol=2e-6, atol=2e-6)
        assert bool(got["correct"][0]) == (bool(want["correct"]) and not bool(want["lse"].isnan()))
    # NaN stays in its row.
    mixed = hidden.clone()
    mixed[3] = math.nan
    p = Problem(mixed, torch.randn(vocabulary, 8).to(dtype), target)
    got = run_forward(emulated, p)
    bad = torch.arange(8) == 3
    assert bool(got["lse"][bad].isnan().all())
    assert bool(got["lse"][~bad].isfinite().all())


def test_ties_go_to_the_lowest_index(emulated):
    weight = torch.zeros(300, 4)
    weight[[3, 70, 71, 135, 299]] = 1.0
    target = torch.tensor([3, 70, 71, 135, 299, 0])
    for processors in (1, 8):
        p = Problem(torch.ones(6, 4), weight.clone(), target)
        got = run_forward(emulated, p, processors=processors)
        assert got["correct"].tolist() == [True, False, False, False, False, False]


def test_a_target_outside_of_the_vocabulary_is_nan(emulated):
    p = draw_problem(4, 8, 40, dtype=torch.bfloat16, ignored=0.0)
    p.target[1], p.target[2] = 40, -5
    got = run_forward(emulated, p, seed=0)
    assert got["nll"].isnan().tolist() == [False, True, True, False]
    assert bool(got["lse"].isfinite().all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_order_of_threads_changes_nothing(emulated, dtype):
    p = draw_problem(40, 72, 300, dtype=dtype)
    orders = [{"order_seed": order, "strict": order == 2} for order in range(3)]
    check_same(*(run_forward(emulated, p, seed=3, order=o, label_smoothing=0.1) for o in orders))


def test_arguments_are_checked(emulated):
    good = {f"{name}_ptr": 0 for name in ("hidden", "bias", "target", "order")}
    good |= {"weight_ptr": 16, "count_ptr": 16, "N": 0, "V": 4, "D": 4, "dtype": 0}
    good |= {"stride_hn": 4, "stride_wv": 4}
    wrong = {"V": 0, "D": 0, "N": -1, "dtype": 3, "temperature": 0.0, "softcap": math.nan}
    wrong |= {"weight_ptr": 3, "count_ptr": 0}
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=name):
            emulated.Problem(**{**good, name: value})
    with pytest.raises(ValueError, match="processors"):
        emulated.forward_splits(4, 4, 0)
