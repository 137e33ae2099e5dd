"""The CUDA kernels over rows of logits in a buffer, in the emulation, against the specification."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from bft_kernels.backends.gpu.lists import offsets_of
from torch import Tensor

from bft_kernels import reference
from bft_kernels.backends.cuda.rows import (
    LogitRows,
    certificate_rows,
    gradient_rows,
    list_rows,
    softmax_rows,
)
from tests.support.emulated_device import DTYPES, check_same
from tests.support.problems import Problem, error_of
from tests.support.samples import specified_sample, undecided

EPS = 2**-5
TRANSFORMS = {
    "plain": {},
    "bias": {"bias": True, "temperature": 0.7},
    "cap": {"softcap": 5.0, "temperature": 1.3},
    "all": {"bias": True, "softcap": 2.0},
}
# Words, spans and turns of a block end inside of the vocabulary, at its end, and nowhere in it.
VOCABULARIES = [1, 31, 64, 257, 2048, 4403]
LOSSES = {"nll": {}, "smoothed": {"label_smoothing": 0.1, "z_loss": 1e-3}}


@dataclass
class Case:
    """Rows of logits by position, of which those with a label count."""

    logits: Tensor  # [N, V] float32
    target: Tensor  # [N]
    bias: Tensor | None = None
    softcap: float | None = None
    temperature: float = 1.0

    def __post_init__(self):
        self.order = torch.sort((self.target == -100).to(torch.uint8), stable=True).indices
        self.count = (self.target != -100).sum().reshape(1)
        self.labelled = self.target != -100

    @property
    def transform(self):
        return {"softcap": self.softcap, "temperature": self.temperature}

    def rows(self, first=0, rows=None, *, pad=3, ordered=True):
        """Rows in a buffer with NaN between them, none of which begins at 8 bytes."""
        count, vocabulary = self.logits.shape
        rows = count - first if rows is None else rows
        logits = self.logits[self.order] if ordered else self.logits
        pad += (vocabulary + pad) % 2  # a row's bytes are whole numbers of 8, or padding is NaN's
        memory = torch.full((rows * (vocabulary + pad) + 1,), math.nan)
        buffer = memory[1:].view(rows, vocabulary + pad)[:, :vocabulary]
        buffer.copy_(logits[first : first + rows])
        order = {"order": self.order, "count": self.count} if ordered else {}
        how = {"first_row": first, "bias": self.bias, **self.transform, **order}
        return LogitRows(buffer, self.target, **how)

    def problem(self, norms=None):
        """The same logits as a product, exactly: of powers of two."""
        scale = torch.ones(self.logits.shape[1]) if norms is None else norms.sqrt()
        hidden, weight = self.logits.double() / scale, torch.diag(scale.double())
        bias = None if self.bias is None else self.bias.double()
        return Problem(hidden, weight, self.target, bias)

    def results(self):
        """Where results go; no kernel has written them."""
        names = ("loss", "nll", "lse", "lse_low", "entropy")
        out = {name: torch.full(self.target.shape, math.nan) for name in names}
        return out | {"correct": torch.full(self.target.shape, 0x55).bool()}

    def mask(self, rows=None):
        words = -(-self.logits.shape[1] // 32)
        return torch.full((rows or len(self.logits), words), -1, dtype=torch.int32)


def draw_case(rows, vocabulary, *, bias=False, scale=3.0, ignored=0.3, **transform):
    """A part of the rows, drawn, is ignored."""
    target = torch.randint(vocabulary, (rows,))
    target[torch.randperm(rows)[: round(ignored * rows)]] = -100
    offset = torch.randn(vocabulary) if bias else None
    return Case(torch.randn(rows, vocabulary) * scale, target, offset, **transform)


@pytest.fixture(autouse=True)
def device(emulated_device):
    """Where kernels run, which may not read what is not written."""
    return emulated_device


def bits_of(mask, vocabulary):
    bits = ((mask[..., None] >> torch.arange(32)) & 1).flatten(-2).bool()
    assert not bool(bits[..., vocabulary:].any())
    return bits[..., :vocabulary]


def expect(case, dtype, label_smoothing=0.0, z_loss=0.0):
    """What plain PyTorch makes of the labelled rows in a type."""
    own = case.problem().of_labelled(dtype)
    how = {"bias": own.bias, **case.transform}
    stats = reference.token_stats(*own.args, **how)
    losses = {"label_smoothing": label_smoothing, "z_loss": z_loss}
    stats["loss"] = reference.linear_nll(*own.args, **how, **losses)
    del stats["confidence"]
    return stats


def check_results(got, case, **losses):
    """Results are as near to the truth as PyTorch's own in float32, from the same values."""
    truth, plain = expect(case, torch.float64, **losses), expect(case, torch.float32, **losses)
    for name, expected in truth.items():
        own = got[name]
        if name == "correct":
            assert torch.equal(own[case.labelled], expected)
            continue
        assert bool(own[~case.labelled].isnan().all()), f"{name}: written where ignored"
        # The logarithm of a sum near 1 has float32's digits beside 1.
        least = 2e-7 * len(expected) ** 0.5 / max(float(expected.norm()), 1e-30)
        allowed = 4 * error_of(plain[name], expected) + 4e-6 + least
        assert error_of(own[case.labelled], expected) <= allowed, name
    exact = (got["lse"].double() + got["lse_low"].double())[case.labelled]
    assert error_of(exact, truth["lse"]) <= 4 * error_of(plain["lse"], truth["lse"]) + 1e-6


@pytest.mark.parametrize("losses", LOSSES)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_losses_and_statistics(vocabulary, transform, losses):
    case = draw_case(5, vocabulary, **TRANSFORMS[transform])
    got, with_bits, mask = case.results(), case.results(), case.mask()
    softmax_rows(case.rows(), got, **LOSSES[losses])
    check_results(got, case, **LOSSES[losses])
    sample = {"seed": torch.tensor(3), "mask": mask, "eps": EPS}
    softmax_rows(case.rows(), with_bits, **LOSSES[losses], **sample)
    check_same(got, with_bits)


def test_results_that_are_not_wanted():
    case = draw_case(4, 100)
    got, few = case.results(), case.results()
    few |= {name: torch.empty(0) for name in ("lse_low", "entropy", "correct")}
    softmax_rows(case.rows(), got)
    softmax_rows(case.rows(), few)
    check_same({name: got[name] for name in ("loss", "nll", "lse")}, few)


def test_chunks_of_rows_are_those_of_the_order(device):
    case = draw_case(11, 70)
    whole, parts = case.results(), case.results()
    softmax_rows(case.rows(), whole)
    for first in range(0, 11, 4):
        softmax_rows(case.rows(first, min(4, 11 - first)), parts)
    check_same(whole, parts)
    labelled = replace(case, logits=case.logits[case.labelled], target=case.target[case.labelled])
    plain = labelled.results()
    softmax_rows(labelled.rows(ordered=False), plain)
    check_same({name: values[case.labelled] for name, values in whole.items()}, plain)
    for rows in (0, 3):  # none, and none that counts
        empty = draw_case(rows, 40, ignored=1.0)
        out = empty.results()
        softmax_rows(empty.rows(), out)
        assert bool(out["lse"].isnan().all())


def test_the_order_of_threads_changes_nothing(device):
    case = draw_case(3, 2500, bias=True)
    runs = []
    for how in ({}, {"seed": 5}, {"seed": 9, "strict": True}):
        device.how = how
        out, mask = case.results(), case.mask()
        sample = {"seed": torch.tensor(3), "mask": mask, "eps": EPS}
        popular = torch.arange(0, 2500, 3)
        softmax_rows(case.rows(), out, label_smoothing=0.1, popular=popular, **sample)
        runs.append({**out, "mask": mask[: int(case.count)].float()})
    check_same(*runs)


def test_ties_go_to_the_lowest_index():
    logits = torch.zeros(6, 3000)
    logits[:, [3, 70, 71, 2100, 2999]] = 1.0
    case = Case(logits, torch.tensor([3, 70, 71, 2100, 2999, 0]))
    got = case.results()
    softmax_rows(case.rows(), got)
    assert got["correct"].tolist() == [True, False, False, False, False, False]


@pytest.mark.parametrize("sampled", [False, True])
def test_hostile_logits(sampled):
    vocabulary = 2300
    logits = torch.randn(8, vocabulary)
    logits[0, :2200] = -math.inf
    logits[1] += 1e4
    logits[2] -= 1e4
    logits[3, 7] = math.nan
    logits[4, 9] = math.inf
    logits[5] = -math.inf
    logits[6, 11], logits[6, 12] = 3e4, -3e4
    target = torch.tensor([2210, 1, 2, 3, 4, 5, 12, 2299])
    case = Case(logits, target)
    got = case.results()
    how = {"seed": torch.tensor(1), "mask": case.mask(), "eps": EPS} if sampled else {}
    softmax_rows(case.rows(), got, **how)
    good = torch.tensor([0, 1, 2, 6, 7])
    z = logits[good].double()  # a product would make NaN of infinities
    log_p = z.log_softmax(1)
    nll = -log_p.gather(1, target[good, None]).squeeze(1)
    truth = {"nll": nll, "loss": nll, "lse": z.logsumexp(1)}
    truth["entropy"] = torch.special.entr(log_p.exp()).sum(1)
    for name, want in truth.items():
        torch.testing.assert_close(got[name][good].double(), want, rtol=2e-6, atol=1e-5)
    assert torch.equal(got["correct"][good], z.argmax(1) == target[good])
    assert not bool(got["nll"][3:6].isfinite().any() | got["correct"][3:6].any())
    # A masked column makes an infinite mean.
    softmax_rows(case.rows(), got, label_smoothing=0.1)
    assert got["loss"][0] == math.inf
    assert bool(got["loss"][good[1:]].isfinite().all())


def test_a_target_outside_of_the_vocabulary_is_nan():
    case = draw_case(5, 40, ignored=0.0)
    case.target[1], case.target[2], case.target[3] = 40, -5, 2**32 + 3
    got = case.results()
    how = {"seed": torch.tensor(1), "mask": case.mask(), "eps": EPS}
    softmax_rows(case.rows(), got, label_smoothing=0.1, **how)
    for name in ("nll", "loss"):
        assert got[name].isnan().tolist() == [False, True, True, True, False]
    assert bool(got["lse"].isfinite().all())
    assert not bool(got["correct"][1:4].any())


def run_sample(case, seed, *, chunk=None, capacity=10_000, popular=None, eps=EPS):
    """Results, bits by labelled row, and the lists with their offsets."""
    total = len(case.logits)
    out, counts = case.results(), torch.zeros(total, dtype=torch.int64)
    columns = torch.full((capacity,), -1, dtype=torch.int32)
    values = torch.full((capacity,), math.nan)
    found = []
    chunk = chunk or max(total, 1)
    for first in range(0, total, chunk):
        rows = case.rows(first, min(chunk, total - first))
        mask = case.mask(len(rows.logits))
        sample = {"mask": mask, "seed": torch.tensor(seed)}
        softmax_rows(rows, out, popular=popular, eps=eps, **sample)
        found.append(mask.clone())
        known = {"lse": out["lse"], "nll": out["nll"], "counts": counts}
        list_rows(rows, **sample, **known, columns=columns, values=values, eps=eps)
    bits = bits_of(torch.cat(found)[: int(case.count)], case.logits.shape[1])
    return out, bits, offsets_of(counts), columns, values


@pytest.mark.parametrize("popular", [None, "some"])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_lists_are_the_specified_sample(vocabulary, transform, popular, seed):
    case = draw_case(6, vocabulary, **TRANSFORMS[transform])
    if popular is not None:  # some are repeated
        popular = torch.randint(vocabulary, (300,)).sort().values
    seed -= 2**31
    out, bits, offsets, columns, values = run_sample(case, seed, popular=popular, chunk=4)
    p = case.problem()
    want = specified_sample(p, seed, EPS, **case.transform)
    unclear = undecided(p, seed, EPS, **case.transform) & want.kept
    assert bool((bits >= (want.kept & ~unclear)).all())
    got = torch.zeros_like(want.dy)
    for i, row in enumerate(p.positions.tolist()):
        listed = slice(int(offsets[row]), int(offsets[row + 1]))
        where = columns[listed].long()
        assert bool((where.diff() > 0).all())
        assert bool(bits[i][where].all())
        got[i, where] = values[listed].double()
    doubtful = undecided(p, seed, EPS, **case.transform)
    assert torch.equal((got != 0) | doubtful, (want.dy != 0) | doubtful)
    clear = torch.where(doubtful, 0.0, got), torch.where(doubtful, 0.0, want.dy)
    torch.testing.assert_close(*clear, rtol=1e-5, atol=1e-6)
    check_results(out, case)


def test_a_bound_of_lse_keeps_candidates_few():
    case = draw_case(4, 4403, ignored=0.0)
    case.logits[:, ::3] += 6.0
    kept = specified_sample(case.problem(), 5, EPS).kept.sum()
    found = [
        int(run_sample(case, 5, popular=popular)[1].sum())
        for popular in (None, torch.arange(0, 4403, 3))
    ]
    assert kept <= found[1] <= kept + 4403 * 4 / 65536 + 8 + 0.05 * kept
    assert found[1] <= found[0]


def test_rows_without_room_have_no_list():
    case = draw_case(9, 300, ignored=0.2)
    _, _, offsets, columns, values = run_sample(case, 11)
    room = int(offsets[6]) + 1
    _, _, again, few, some = run_sample(case, 11, capacity=room, chunk=2)
    assert torch.equal(offsets, again)
    end = int(offsets[offsets <= room].max())
    assert torch.equal(few[:end], columns[:end])
    check_same({"values": some[:end]}, {"values": values[:end]})
    assert bool((few[end:] == -1).all())


def expect_gradient(case, coefficient, losses):
    """The specification's ``dy``, by autograd in float64."""
    p = case.problem().copy(torch.float64, frozen=("weight", "bias"))
    how = {"bias": p.bias, **case.transform}
    (reference.linear_nll(*p.args, **how, **losses) * coefficient.double()).sum().backward()
    return p.hidden.grad


@pytest.mark.parametrize("losses", LOSSES)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_take_the_place_of_logits(dtype, vocabulary, transform, losses, device, seed):
    device.how = {"seed": seed % 1000, "strict": bool(seed % 2)}
    case = draw_case(4, vocabulary, ignored=0.0, **TRANSFORMS[transform])
    rows, out, coefficient = case.rows(), case.results(), torch.linspace(0.5, 2, 4)
    softmax_rows(rows, out, **LOSSES[losses])
    wide = 4 // dtype.itemsize
    place = wide * rows.logits.storage_offset(), (4, vocabulary)
    stride = wide * rows.logits.stride(0), 1
    dy = torch.empty(0, dtype=dtype).set_(rows.logits.untyped_storage(), *place, stride)
    known = [out[name] for name in ("lse", "lse_low", "nll")]
    gradient_rows(rows, dy, *known, coefficient, **LOSSES[losses])
    want = expect_gradient(case, coefficient, LOSSES[losses])
    tolerance = {torch.float32: 5e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    # At the target the parts of the loss are rounded beside 1, and may cancel each other.
    least = 2e-7 * len(want) ** 0.5 / max(float(want.norm()), 1e-30)
    assert error_of(dy, want) <= tolerance + least


def test_gradients_of_rows_in_an_order(device):
    case = draw_case(7, 90)
    out, coefficient = case.results(), torch.rand(7)
    rows = case.rows()
    softmax_rows(rows, out)
    before = rows.logits.clone()
    gradient_rows(rows, rows.logits, out["lse"], torch.empty(0), out["nll"], coefficient)
    count = int(case.count)
    want = expect_gradient(case, coefficient, {})[case.order[:count]]
    assert error_of(rows.logits[:count], want) < 1e-5
    assert torch.equal(rows.logits[count:], before[count:])


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_certificate(vocabulary, transform):
    case = draw_case(5, vocabulary, **TRANSFORMS[transform])
    norms = 4.0 ** torch.randint(-2, 3, (vocabulary,))
    own = case.problem(norms).of_labelled(torch.float64)
    how = {"bias": own.bias, "eps": EPS, **case.transform}
    want = reference.sampled_gradient(*own.args, 0, **how)
    stats = reference.token_stats(*own.args, bias=own.bias, **case.transform)
    lse = torch.full((5,), math.nan)
    lse[case.labelled] = stats["lse"].float()
    got = {name: torch.full((5,), math.nan) for name in ("variance", "hidden_variance")}
    certificate_rows(case.rows(), lse, norms, *got.values(), eps=EPS)
    # lse is rounded, and each term with it.
    allowed = 1e-5 + 2 * float(lse.nan_to_num().abs().max()) * 2**-24
    for name, expected in (("variance", want.variance), ("hidden_variance", want.hidden_variance)):
        assert error_of(got[name][case.labelled], expected) <= allowed, name
        assert bool(got[name][~case.labelled].isnan().all())
    alone = torch.full((5,), math.nan)
    certificate_rows(case.rows(), lse, None, alone, torch.empty(0), eps=EPS)
    check_same({"variance": got["variance"]}, {"variance": alone})


def test_arguments_are_checked(emulated):
    of_rows = {"logits_ptr": 16, "stride_ln": 40, "bias_ptr": 0, "target_ptr": 16, "order_ptr": 16}
    of_rows |= {"count_ptr": 16, "first_row": 1, "rows": 3, "N": 4, "V": 40}
    wrong = {"N": 3, "V": 0, "first_row": 2, "stride_ln": 39, "logits_ptr": 0, "target_ptr": 2}
    wrong |= {"count_ptr": 0, "softcap": math.nan, "temperature": 0.0, "order_ptr": 4}
    for name, value in wrong.items():
        with pytest.raises(ValueError, match="rows" if name in ("N", "first_row") else name):
            emulated.LogitRows(**{**of_rows, name: value})

    rows = emulated.LogitRows(**of_rows)
    arrays = {f"{x}_ptr": 16 for x in ("lse", "nll", "seed", "mask")}
    known = {"rows": rows, "stream": 0, "eps": 0.5, **arrays}
    results = {"loss_ptr": 16, "entropy_ptr": 16, "correct_ptr": 16, "popular_ptr": 16, "K": 2}
    grad = {"rows": rows, "stream": 0, "dy_ptr": 16, "stride_dy": 80, "dtype": 1, "grad_ptr": 16}
    good = {
        "softmax_rows": known | results,
        "thin_rows": {**known, "counts_ptr": 16},
        "list_rows": {**known, **dict.fromkeys(("offsets_ptr", "columns_ptr", "values_ptr"), 16)}
        | {"capacity": 4},
        "gradient_rows": {**grad, "lse_ptr": 16, "nll_ptr": 16},
        "certificate_rows": {"rows": rows, "stream": 0, "lse_ptr": 16, "eps": 0.5}
        | {"variance_ptr": 16, "norms_ptr": 16, "hidden_variance_ptr": 16},
    }
    bad = {
        "softmax_rows": {"loss_ptr": 0, "nll_ptr": 0, "lse_ptr": 2, "seed_ptr": 0, "eps": 0.0}
        | {"entropy_ptr": 0, "popular_ptr": 0, "K": -1, "label_smoothing": 2.0, "mask_ptr": 2},
        "thin_rows": {"eps": 2.0, "mask_ptr": 0, "counts_ptr": 0, "seed_ptr": 0, "lse_ptr": 0},
        "list_rows": {"eps": 2.0, "offsets_ptr": 0, "columns_ptr": 2, "values_ptr": 0}
        | {"capacity": -1, "nll_ptr": 0},
        "gradient_rows": {"dtype": 3, "stride_dy": 40, "dy_ptr": 32, "grad_ptr": 0, "lse_ptr": 0}
        | {"label_smoothing": -1.0, "lse_low_ptr": 2},
        "certificate_rows": {"eps": 0.0, "lse_ptr": 0, "variance_ptr": 2, "norms_ptr": 0},
    }
    for function, arguments in good.items():
        for name, value in bad[function].items():
            with pytest.raises(ValueError, match=name):
                getattr(emulated, function)(**{**arguments, name: value})
