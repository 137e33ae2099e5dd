"""The lists and gathers of the sampled gradient in CUDA, their device code run by the emulation."""

import math

import numpy as np
import pytest
import torch

from bft_kernels import reference
from bft_kernels.backends.common.csr import offsets_of
from tests.support.emulated_device import DTYPES, UNTOUCHED, Device, check_same, spread_out, strided
from tests.support.problems import draw_problem, error_of
from tests.support.samples import clear_seed, specified_sample


def random_mask(rows, vocabulary):
    """Bool [R, V]: rows with many bits, few, all and none."""
    chance = torch.tensor([0.5, 0.02, 1.0, 0.0])[torch.randint(4, (rows, 1))]
    return torch.rand(rows, vocabulary) < chance


def words_of(bits):
    """Int32 words of bool [R, V], lowest bit first."""
    rows, vocabulary = bits.shape
    padded = torch.nn.functional.pad(bits, (0, -vocabulary % 32)).numpy()
    packed = np.packbits(padded.reshape(rows, -1), axis=1, bitorder="little")
    return torch.from_numpy(packed.view(np.int32).copy())


def lists_of(bits, rows, count):
    """Offsets [N + 1] and columns of the bits [R, V] of these rows, by position."""
    everyone = torch.zeros(count, bits.shape[1], dtype=torch.bool)
    everyone[rows] = bits
    offsets = torch.nn.functional.pad(everyone.sum(1).cumsum(0), (1, 0))
    return offsets, everyone.nonzero()[:, 1].int()


class Sample:
    """The specification's sample of a problem, and what the kernels are told of its rows."""

    def __init__(self, p, seed, eps, **how):
        own = p.of_labelled()
        self.eps, self.labelled, self.hidden, self.weight = eps, p.labelled, own.hidden, own.weight
        self.seed = seed = clear_seed(p, seed, eps, **how)
        drawn = specified_sample(p, seed, eps, **how)
        stats = reference.token_stats(*own.args, bias=own.bias, **how)
        self.grad = torch.randn(len(p.target))
        self.known = {name: torch.full(p.target.shape, math.nan) for name in ("lse", "nll")}
        for name, values in self.known.items():
            values[self.labelled] = stats[name].float()
        self.known |= {"grad": self.grad, "seed": torch.tensor([seed])}
        self.kept = drawn.kept
        self.dy = drawn.dy * self.grad[self.labelled, None].double()
        self.dy[~drawn.kept] = 0

    def check_hidden(self, got):
        assert bool(got[~self.labelled].isnan().all())
        self._check(got[self.labelled], self.dy, self.weight)

    def check_weight(self, got):
        self._check(got, self.dy.T, self.hidden)

    def _check(self, got, dy, operand):
        expected, size = dy @ operand, dy.abs() @ operand.abs()
        cancels = float(size.norm() / expected.norm().clamp_min(1e-300))
        assert error_of(got, expected) <= torch.finfo(got.dtype).eps + 1e-6 * (1 + cancels)

    def check_entries(self, keys, packed, offsets):
        """Keys and packed words, by the lists they are in, are what is kept."""
        kept = keys < self.dy.shape[1]
        assert bool((packed[~kept] == UNTOUCHED).all())
        rows, values = unpack(packed[kept])
        places = torch.searchsorted(offsets, kept.nonzero().squeeze(1), right=True) - 1
        assert torch.equal(places, rows)
        found = torch.zeros(len(offsets) - 1, self.dy.shape[1], dtype=torch.float64)
        found[rows, keys[kept].long()] = values.double()
        assert int(kept.sum()) == int(self.kept.sum())
        assert torch.equal(found[self.labelled] != 0, self.dy != 0)
        assert error_of(found[self.labelled], self.dy) <= 3e-6


def unpack(packed):
    """Rows and float32 values of packed words."""
    return packed >> 32, (packed & 0xFFFFFFFF).to(torch.int32).view(torch.float32)


def pack(rows, values):
    return rows.long() << 32 | values.view(torch.int32).long() & 0xFFFFFFFF


TRANSFORMS = {
    "plain": {},
    "bias": {"bias": True},
    "all": {"bias": True, "softcap": 8.0, "temperature": 0.7},
}
SHAPES = [(1, 1, 2), (5, 8, 127), (37, 72, 129), (40, 67, 400)]


# --- lists ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocabulary", [1, 31, 33, 600, 9000])
@pytest.mark.parametrize("capacity", [1.0, 0.6, 0.0])
def test_lists(emulated, capacity, vocabulary, seed):
    count = 23
    p = draw_problem(count, 1, vocabulary)
    p.hidden, p.weight = p.hidden.float(), p.weight.float()
    device = Device(emulated, p, order_seed=seed)
    bits = random_mask(len(device.rows), vocabulary)
    offsets, columns = lists_of(bits, device.rows, count)
    mask = torch.full((count, -(-vocabulary // 32)), UNTOUCHED, dtype=torch.int32)
    mask[: len(bits)] = words_of(bits)
    counts = torch.zeros(count, dtype=torch.int64)
    for first in range(0, count, 9):
        device.count(mask[first : first + 9], first, counts)
    assert torch.equal(counts, offsets.diff())
    room = int(capacity * len(columns))
    got = torch.full((room,), UNTOUCHED, dtype=torch.int32)
    for first in range(0, count, 9):
        device.list(mask[first : first + 9], first, offsets, got)
    fits = int(offsets[offsets <= room].max())
    assert torch.equal(got[:fits], columns[:fits])
    assert bool((got[fits:] == UNTOUCHED).all())


def test_bits_of_no_rows(emulated):
    device = Device(emulated, draw_problem(0, 4, 9, dtype=torch.float32))
    device.count(torch.zeros(0, 1, dtype=torch.int32), 0, torch.zeros(0, dtype=torch.int64))


@pytest.mark.parametrize("vocabulary", [1, 255, 256, 700])
@pytest.mark.parametrize("entries", [0, 1, 500])
def test_sorted_entries(emulated, entries, vocabulary):
    device = Device(emulated, draw_problem(1, 1, vocabulary, dtype=torch.float32))
    keys = torch.randint(vocabulary + 1, (entries,), dtype=torch.int32)
    sorted_keys, packed, starts = device.sort(keys, torch.arange(entries))
    expected, order = keys.sort(stable=True)
    assert torch.equal(sorted_keys, expected)
    assert torch.equal(packed, order)
    bounds = torch.arange(vocabulary + 1, dtype=torch.int32)
    assert torch.equal(starts, torch.searchsorted(expected, bounds))


# --- gathers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_spmm_hidden(emulated, dtype, shape, transform, seed):
    how = dict(TRANSFORMS[transform])
    p = draw_problem(*shape, bias=how.pop("bias", False), dtype=dtype, scale=2.0)
    p.target[0] = 1
    sample = Sample(p, seed, 2**-6, **how)
    device = Device(emulated, p, order_seed=seed, **how)
    listed = sample.kept | (torch.rand(sample.kept.shape) < 0.1)
    offsets, columns = lists_of(listed, device.rows, shape[0])
    wanted = ("hidden", "entries")
    got = device.spmm_hidden(sample.known, sample.eps, offsets, columns, *wanted)
    sample.check_hidden(got["grad_hidden"])
    sample.check_entries(got["keys"], got["packed"], offsets)
    for part in wanted:
        own = device.spmm_hidden(sample.known, sample.eps, offsets, columns, part)
        check_same(own, got)


@pytest.mark.parametrize("width", [1, 8, 67, 1020, 8200])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_entries_with_values_are_taken_as_they_are(emulated, dtype, width, seed):
    p = draw_problem(9, width, 150, bias=True, dtype=dtype, scale=2.0, ignored=0.2)
    sample = Sample(p, seed, 2**-6, softcap=8.0)
    device = Device(emulated, p, order_seed=seed)
    offsets, columns = lists_of(sample.kept, device.rows, 9)
    values = (sample.dy / sample.grad[sample.labelled, None].double())[sample.kept].float()
    nothing = {name: torch.full((9,), math.nan) for name in ("lse", "nll")}
    known, listed = sample.known | nothing, (sample.eps, offsets, columns)
    got = device.spmm_hidden(known, *listed, "hidden", "entries", values=values)
    sample.check_hidden(got["grad_hidden"])
    sample.check_entries(got["keys"], got["packed"], offsets)
    for part in ("hidden", "entries"):
        check_same(device.spmm_hidden(known, *listed, part, values=values), got)


# Of teams of each size and of each number of pieces a thread, ragged and not.
WIDTHS = [512, 520, 1020, 2040, 4096, 4104, 8200, 16381, 16384]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_widths(emulated, dtype, width, seed):
    p = draw_problem(2, width, 40, ignored=0.0, dtype=dtype, scale=1.5)
    sample = Sample(p, seed, 2**-5)
    device = Device(emulated, p, order_seed=seed)
    offsets, columns = lists_of(torch.ones(2, 40) > 0, device.rows, 2)
    got = device.spmm_hidden(sample.known, sample.eps, offsets, columns, "hidden", "entries")
    sample.check_hidden(got["grad_hidden"])
    sample.check_entries(got["keys"], got["packed"], offsets)
    _, packed, starts = device.sort(got["keys"], got["packed"])
    weight = torch.full((40, width), math.nan, dtype=dtype)
    device.spmm_weight(starts, packed, weight)
    sample.check_weight(weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pad", [8, 3], ids=["aligned", "unaligned"])
def test_rows_may_be_strided(emulated, dtype, pad, seed):
    p = draw_problem(20, 40, 150, dtype=dtype, scale=2.0, ignored=0.2)

    sample = Sample(p, seed, 2**-6)
    device = Device(emulated, strided(p, pad), order_seed=seed)
    offsets, columns = lists_of(sample.kept, device.rows, 20)
    got = device.spmm_hidden(sample.known, sample.eps, offsets, columns, "hidden", "entries")
    sample.check_hidden(got["grad_hidden"])
    _, packed, starts = device.sort(got["keys"], got["packed"])
    weight = spread_out(torch.full((150, 40), math.nan, dtype=dtype), pad)
    device.spmm_weight(starts, packed, weight)
    sample.check_weight(weight)
    whole = weight.as_strided((150, 40 + 2 * pad), (40 + 2 * pad, 1), 0)
    assert int(whole.isnan().sum()) == 150 * 2 * pad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_without_room_are_left_alone(emulated, dtype, seed):
    p = draw_problem(30, 24, 300, dtype=dtype, scale=2.0)
    sample = Sample(p, seed, 2**-6)
    device = Device(emulated, p, order_seed=seed)
    offsets, columns = lists_of(sample.kept, device.rows, 30)
    wanted = ("hidden", "entries")
    whole = device.spmm_hidden(sample.known, sample.eps, offsets, columns, *wanted)
    room = len(columns) // 2
    got = device.spmm_hidden(sample.known, sample.eps, offsets, columns[:room].clone(), *wanted)
    fits = offsets[1:] <= room
    end = int(offsets[:-1][~fits].min())
    assert bool(got["grad_hidden"][~fits].isnan().all())
    for name, ended in (("grad_hidden", fits), ("keys", slice(end)), ("packed", slice(end))):
        check_same({name: got[name][ended]}, {name: whole[name][ended]})
    assert bool((got["keys"][end:] == 300).all())
    assert bool((got["packed"][end:] == UNTOUCHED).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_rows_and_none_labelled(emulated, dtype):
    for rows in (0, 9):
        p = draw_problem(rows, 8, 40, dtype=dtype, ignored=2.0)
        device = Device(emulated, p)
        known = {name: torch.ones(rows) for name in ("lse", "nll", "grad")}
        offsets = torch.zeros(rows + 1, dtype=torch.int64)
        none = torch.zeros(0, dtype=torch.int32)
        known |= {"seed": torch.tensor([3])}
        got = device.spmm_hidden(known, 0.5, offsets, none, "hidden", "entries")
        assert bool(got["grad_hidden"].isnan().all())
        _, packed, starts = device.sort(got["keys"], got["packed"])
        weight, bias = torch.full((40, 8), math.nan, dtype=dtype), torch.ones(40)
        device.spmm_weight(starts, packed, weight, bias)
        assert bool((weight == 0).all())
        assert bool((bias == 1).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_keep_nothing_and_rows_of_nan(emulated, dtype, seed):
    p = draw_problem(4, 16, 50, dtype=dtype, ignored=0.0)
    p.target[:] = torch.tensor([3, 50, -5, 7])  # nobody checked the second and third
    device = Device(emulated, p, order_seed=seed)
    known = {"lse": torch.tensor([60.0, 60.0, 60.0, math.nan]), "nll": torch.full((4,), math.nan)}
    known |= {"grad": torch.ones(4), "seed": torch.tensor([seed])}
    known["nll"][0] = 0.0
    offsets, columns = lists_of(torch.ones(4, 50) > 0, device.rows, 4)
    got = device.spmm_hidden(known, 2**-4, offsets, columns, "hidden", "entries")
    # exp(z - 60) is nothing, expm1(-0) is 0.
    assert bool((got["grad_hidden"][:3] == 0).all())
    assert bool(got["grad_hidden"][3].isnan().all())
    assert got["keys"].tolist() == [50] * 150 + list(range(50))
    rows, values = unpack(got["packed"][150:])
    assert bool((rows == 3).all())
    assert bool(values.isnan().all())


@pytest.mark.parametrize("out", ["own", "wide"])
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("width", [16, 600, 67])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_spmm_weight(emulated, dtype, width, adds, out, seed):
    count, vocabulary = 40, 90
    p = draw_problem(count, width, vocabulary, dtype=dtype)
    device = Device(emulated, p, order_seed=seed)
    # Most columns have few entries, one has many, and some have none.
    keys = torch.randint(vocabulary + 1, (400,), dtype=torch.int32)
    keys[torch.rand(400) < 0.5] = 17
    keys[keys % 5 == 1] = vocabulary
    rows, values = torch.randint(count, (400,)), torch.randn(400)
    _, packed, starts = device.sort(keys, pack(rows, values))
    weight = torch.full((vocabulary, width), 1.0 if adds else math.nan).to(dtype)
    weight = weight.float() if out == "wide" else weight
    bias = torch.randn(vocabulary)
    before = bias.clone()
    device.spmm_weight(starts, packed, weight, bias, adds)
    dy = torch.zeros(vocabulary + 1, count, dtype=torch.float64)
    dy.index_put_((keys.long(), rows), values.double(), accumulate=True)
    expected = dy[:-1] @ p.hidden.detach().double() + float(adds)
    assert error_of(weight, expected) <= torch.finfo(weight.dtype).eps + 2e-6
    assert error_of(bias, before.double() + dy[:-1].sum(1)) <= 2e-6
    only = before.clone()
    device.spmm_weight(starts, packed, None, only)
    assert torch.equal(only, bias)
    alone = torch.full_like(weight, 1.0 if adds else math.nan)
    device.spmm_weight(starts, packed, alone, None, adds)
    assert torch.equal(alone, weight)


# --- from the forward's bits to the gradients ----------------------------------------------------


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_from_bits_to_gradients(emulated, dtype, transform, seed):
    how, count, vocabulary = dict(TRANSFORMS[transform]), 30, 400
    p = draw_problem(count, 24, vocabulary, bias=how.pop("bias", False), dtype=dtype, scale=3.0)
    sample = Sample(p, seed, 2**-7, **how)
    device = Device(emulated, p, order_seed=seed, **how)
    counts = torch.zeros(count, dtype=torch.int64)
    lse_bound = torch.full((count,), math.nan)
    device.call("target_bound", {}, {"lse_bound": lse_bound})
    splits, columns_each = emulated.forward_splits(16, vocabulary, 2)
    known = {name: torch.full((count,), math.nan) for name in ("loss", "nll", "lse")}
    masks = []
    for first in range(0, count, 16):
        mask = torch.full((min(16, count - first), -(-vocabulary // 32)), -1, dtype=torch.int32)
        sums = torch.full((emulated.FORWARD_SUMS, splits, len(mask)), math.nan)
        device.call(
            "linear_nll_forward",
            {"seed": sample.known["seed"], "lse_bound": lse_bound},
            {"mask": mask, "sums": sums, **known},
            first_row=first,
            rows=len(mask),
            splits=splits,
            split_columns=columns_each,
            eps=sample.eps,
        )
        device.count(mask, first, counts)
        masks.append(mask)
    offsets = offsets_of(counts)
    columns = torch.full((int(offsets[-1]),), -1, dtype=torch.int32)
    for number, mask in enumerate(masks):
        device.list(mask, 16 * number, offsets, columns)
    assert int(sample.kept.sum()) < len(columns) < sample.kept.numel()

    forward = {"lse": known["lse"], "nll": known["nll"]}
    got = device.spmm_hidden(
        sample.known | forward, sample.eps, offsets, columns, "hidden", "entries"
    )
    sample.check_hidden(got["grad_hidden"])
    sample.check_entries(got["keys"], got["packed"], offsets)
    weight, bias = torch.full((vocabulary, 24), math.nan), torch.zeros(vocabulary)
    half = len(columns) // 2
    for part in slice(half), slice(half, None):  # as a small budget has it
        _, packed, starts = device.sort(got["keys"][part].clone(), got["packed"][part].clone())
        device.spmm_weight(starts, packed, weight, bias, adds=part.start is not None)
    sample.check_weight(weight)
    assert error_of(bias, sample.dy.sum(0)) <= 3e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [40, 520])
def test_the_order_of_threads_changes_nothing(emulated, dtype, width, seed):
    p = draw_problem(10, width, 100, dtype=dtype, bias=True)
    sample = Sample(p, seed, 2**-4)
    runs = []
    for order in range(3):
        device = Device(emulated, p, order_seed=order, strict=order == 2)
        mask = words_of(torch.ones(len(device.rows), 100) > 0)
        counts = torch.zeros(10, dtype=torch.int64)
        device.count(mask, 0, counts)
        offsets = offsets_of(counts)
        columns = torch.zeros(int(offsets[-1]), dtype=torch.int32)
        device.list(mask, 0, offsets, columns)
        got = device.spmm_hidden(sample.known, sample.eps, offsets, columns, "hidden", "entries")
        _, packed, starts = device.sort(got["keys"], got["packed"])
        got |= {"weight": torch.full((100, width), math.nan), "bias": torch.zeros(100)}
        device.spmm_weight(starts, packed, got["weight"], got["bias"])
        runs.append(got | {"columns": columns})
    check_same(*runs)


def test_arguments_are_checked(emulated):
    device = Device(emulated, draw_problem(4, 8, 40, dtype=torch.float32))
    mask, counts = torch.zeros(4, 2, dtype=torch.int32), torch.zeros(5, dtype=torch.int64)
    with pytest.raises(ValueError, match="rows"):
        device.count(mask, 1, counts)
    with pytest.raises(ValueError, match="first_row"):
        device.count(mask, 5, counts)
    names = ("keys", "packed", "sorted_keys", "sorted_packed", "temporary")
    entries = {f"{name}_ptr": 8 for name in names} | {"E": 4, "V": 9, "stream": 0}
    with pytest.raises(ValueError, match="temporary_bytes"):
        emulated.sort_entries(**entries, temporary_bytes=0)
    with pytest.raises(ValueError, match="E: got"):
        emulated.sort_bytes(2**31, 40)
    known = {name: torch.ones(4) for name in ("lse", "nll", "grad")} | {"seed": torch.tensor([1])}
    columns = torch.zeros(4, dtype=torch.int32)
    with pytest.raises(ValueError, match="eps"):
        device.spmm_hidden(known, 0.0, counts, columns, "hidden")
    reads = {**known, "offsets": counts, "columns": columns}
    with pytest.raises(ValueError, match="keys_ptr"):
        device.call("spmm_hidden", reads, {"packed": counts.clone()}, eps=0.5, capacity=4)
    wide = Device(emulated, draw_problem(1, emulated.MAX_GATHERED + 1, 1, dtype=torch.float32))
    with pytest.raises(ValueError, match="D: got"):
        wide.spmm_weight(torch.zeros(2, dtype=torch.int64), counts, None, torch.zeros(1))
    weight = torch.zeros(40, 8).as_strided((40, 8), (7, 1))
    with pytest.raises(ValueError, match="stride_gv"):
        device.spmm_weight(torch.zeros(41, dtype=torch.int64), counts, weight)
