"""Token and sequence weights against exact arithmetic, the specification and the released loss."""

import math
from fractions import Fraction
from functools import partial
from unittest.mock import Mock

import pytest
import torch

from tests.support.allocations import measure_allocations
from tests.support.losses import assert_same_loss
from tests.support.problems import assert_close, boundaries, draw_problem
from tests.support.soak import soaked

pytest.importorskip("hypothesis", reason="hypothesis is not installed")

from hypothesis import example, given
from hypothesis import strategies as st

from bft_kernels import (
    balanced_linear_cross_entropy,
    documents,
    functional,
    reference,
    token_weights,
    weighting,
)
from bft_kernels.settings import SCHEMES, Settings

LENGTHS = [(1,), (5,), (0, 3, 0, 0, 17, 1, 2), (40, 7, 64), (0,), (0, 0), ()]
WINDOWS = [1, 2, 3, 4, 7, 8, 64, 256, 10**6]


def confidences(count, dtype=torch.float64):
    """Certain tokens next to hopeless ones, which is where sums go wrong."""
    exponent = torch.rand(count, dtype=torch.float64) * torch.randint(0, 25, (count,))
    return (10.0**-exponent).to(dtype)


def window_spans(first, stop, window, scheme):
    full = min(window, stop - first)
    if scheme.startswith("bft-v1"):
        starts = [min(t, stop - full) for t in range(first, stop)]
        return [(start, start + full) for start in starts]
    before, after = window // 2, window - window // 2
    return [(max(first, t - before), min(stop, t + after)) for t in range(first, stop)]


def independent_weights(c, scheme, g, gamma, delta):
    """``w``, window confidences, ``s`` and the lowest window of a document."""
    geometric = scheme == "bft-v1-code"
    terms = [math.log(x) for x in c] if geometric else c
    local = [math.fsum(terms[a:b]) / (b - a) for a, b in window_spans(0, len(c), g, scheme)]
    local = [math.exp(x) for x in local] if geometric else local
    low = min(local)
    w = {
        "sft": [1.0] * len(c),
        "bft": [min(1.0, a / (b + delta)) for a, b in zip(c, local, strict=True)],
    }.get(scheme, c)
    s = 1.0 if scheme in ("sft", "dft") else 1 - low ** (gamma if geometric else 1)
    return w, local, s, low


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_equals_an_independent_computation_and_the_specification(scheme, lengths, window):
    c, cu_seqlens = confidences(sum(lengths)).requires_grad_(), boundaries(lengths)
    how, delta = {"scheme": scheme, "window": window, "gamma": 1.7}, 1e-6
    got = token_weights(c, cu_seqlens, floor=delta, **how)
    expected = weighting.TokenWeights([], [], [], [])
    for part in c.split(list(lengths)):
        own = [], [], 0.0, 0.0
        if len(part):
            own = independent_weights(part.tolist(), *how.values(), delta)
        expected.token_weight.extend(own[0])
        expected.window_confidence.extend(own[1])
        expected.sequence_weight.append(own[2])
        expected.sequence_confidence.append(own[3])
    for name in got._fields:
        assert_close(getattr(got, name), c.new_tensor(getattr(expected, name)), 1e-10, name)
        assert not getattr(got, name).requires_grad, name
    coefficient = reference.token_coefficients(
        c.detach(), cu_seqlens, normalize="token", num_items=1, delta=delta, **how
    )
    owner = torch.repeat_interleave(torch.arange(len(lengths)), cu_seqlens.diff())
    assert_close(got.token_weight * got.sequence_weight[owner], coefficient, 1e-12)


def exact_means(values, spans):
    """What ``math.fsum(values[a:b]) / (b - a)`` gives, for a hundred thousand spans in a second."""
    scale = 2**250  # turns every value here into an integer
    numerators, total = [0], 0
    for value in values.double().tolist():
        total += int(Fraction(value) * scale)
        numerators.append(total)
    means = [(numerators[b] - numerators[a]) / (scale * (b - a)) for a, b in spans]
    return torch.tensor(means, dtype=torch.float64)


@pytest.mark.parametrize(
    ("scheme", "window", "dtype"),
    [
        ("bft", 3, torch.float32),
        ("bft", 255, torch.float32),
        ("bft", 256, torch.float32),
        ("bft", 256, torch.float64),
        ("bft", 1000, torch.float32),
        ("bft-v1", 256, torch.float32),
        ("bft-v1-code", 256, torch.float32),
    ],
)
def test_windows_of_long_documents_are_accurate(scheme, window, dtype):
    # Passages of 1.0 between passages down to 1e-35, in two documents that share the 100k tokens.
    count, edge = 100_000, 100_000 - 333
    passage = torch.randint(0, 36, (count // 500,)).repeat_interleave(500).double()
    c = (10.0**-passage * (0.1 + 0.9 * torch.rand(count, dtype=torch.float64))).to(dtype)
    c[passage == 0] = 1.0
    got = token_weights(c, boundaries((edge, count - edge)), scheme=scheme, window=window)
    spans = window_spans(0, edge, window, scheme) + window_spans(edge, count, window, scheme)
    exact = exact_means(c.log(), spans).exp() if "code" in scheme else exact_means(c, spans)
    # 1e-6 up to a window of 256; in general 2 log2(window) additions and one division.
    unit = torch.finfo(dtype).eps / 2
    bound = max(1e-6 * unit * 2**24, (2 * math.log2(window) + 2) * unit)
    assert (got.window_confidence.double() / exact - 1).abs().max() <= bound
    lowest = torch.stack([part.min() for part in exact.split([edge, count - edge])])
    assert (got.sequence_confidence.double() / lowest - 1).abs().max() <= bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_confidence_that_underflows_is_not_zero_to_its_logarithm(dtype):
    """``exp(-110)`` is 0 in float32; a geometric mean of 256 others with it is not."""
    nll = torch.full((257,), 0.1, dtype=dtype)
    nll[100] = 110.0
    settings = Settings(scheme="bft-v1-code", window=256)
    got = weighting.balance(nll, None, torch.tensor([0, 257]), settings)
    lowest = math.exp(-(110.0 + 255 * 0.1) / 256)
    assert float(got.sequence_weight) == pytest.approx(1 - lowest, rel=1e-6)


@given(
    documents=st.lists(st.lists(st.floats(0, 1, width=32), max_size=30), min_size=1, max_size=6),
    window=st.integers(1, 40),
    scheme=st.sampled_from(SCHEMES),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
@example([[], [0.1, 0.9, 0.3] * 99, [], [1e-9, 1.0] * 128, [0.2]], 32, "bft", torch.float32)
@example([[0.0] * 300, [1.0] * 300, [1e-45] * 300], 256, "bft-v1-code", torch.float32)
@example([[0.0] * 300, [1.0] * 300, [1e-45] * 300], 256, "bft", torch.float64)
def test_properties(documents, window, scheme, dtype):
    lengths = [len(document) for document in documents]
    c = torch.tensor([x for document in documents for x in document], dtype=dtype)
    got = token_weights(c, boundaries(lengths, torch.int32), scheme=scheme, window=window)
    alone = [
        token_weights(part, boundaries((len(part),)), scheme=scheme, window=window)
        for part in c.split(lengths)
    ]
    for name, value in got._asdict().items():
        assert value.dtype == dtype
        assert bool(((value >= 0) & (value <= 1)).all()), f"{name}: {value}"
        # Documents do not see each other. Not to rounding: a window is put together in the same
        # order wherever it is.
        assert torch.equal(value, torch.cat([getattr(own, name) for own in alone])), name
    for index, part in enumerate(got.window_confidence.split(lengths)):
        lowest = part.min() if len(part) else 0
        assert got.sequence_confidence[index] == lowest
        assert len(part) or got.sequence_weight[index] == 0
        if scheme.startswith("bft") and {*documents[index]} in ({0.0}, {1e-45}, {1.0}):
            # Certain throughout: nothing to learn. Hopeless throughout: the full weight.
            assert got.sequence_weight[index] == 1 - round(documents[index][0])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_loop_over_sequences(scheme):
    counts = []
    for sequences in (1, 100):
        c, cu = confidences(1000), torch.linspace(0, 1000, sequences + 1).long()
        run = partial(weighting.weigh, c, cu, scheme=scheme, window=64, gamma=1.0)
        counts.append(len(measure_allocations(run).sizes))
    assert 1 < counts[0] == counts[1]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_host_synchronisation(scheme):
    # Meta tensors have no values: whatever asks for one raises.
    c, cu = torch.empty(50, device="meta"), torch.empty(4, dtype=torch.int64, device="meta")
    got = token_weights(c, cu, scheme=scheme, window=8)
    assert [tuple(x.shape) for x in got] == [(50,), (50,), (3,), (3,)]


@pytest.mark.parametrize(
    ("scheme", "compiler"),
    [
        *soaked(SCHEMES, ["aot_eager"], plain=lambda scheme, _: scheme in ("bft", "bft-v1-code")),
        pytest.param("bft", "inductor", marks=pytest.mark.slow),
    ],
)
def test_compiled(scheme, compiler, fresh_compiler):
    compiled = torch.compile(token_weights, fullgraph=True, backend=compiler, dynamic=True)
    for lengths in ((5, 0, 9), (30, 12, 1), (7,)):
        c, cu = confidences(sum(lengths)), boundaries(lengths)
        expected = token_weights(c, cu, scheme=scheme, window=6)
        assert_close(compiled(c, cu, scheme=scheme, window=6)._asdict(), expected._asdict(), 1e-12)


def released_loss(logits, labels, group_size, gamma=1.0):
    """The loss of the authors' released code: full logits, one sample a row, ``B`` rows.

    ``logits [B, T, V]``, ``labels [B, T]``, not yet shifted. Its two softmaxes are written out.
    """
    logits, labels = logits[:, :-1], labels[:, 1:]
    losses = []
    for row, label in zip(logits, labels, strict=True):
        mask = label != -100
        if not mask.any():
            losses.append(row.sum() * 0)  # counted in the mean over rows
            continue
        log_p = torch.nn.functional.log_softmax(row[mask], dim=-1)
        p = torch.nn.functional.softmax(row[mask].detach(), dim=-1)
        picked = label[mask][:, None]
        nll, c = -log_p.gather(1, picked)[:, 0], p.gather(1, picked)[:, 0]
        size = min(group_size, len(c))
        groups = c.log().unfold(0, size, 1).mean(dim=1)
        sequence = 1 - groups.min().exp().clamp(0, 1) ** gamma
        losses.append(sequence * (c * nll).mean())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("window", [1, 4, 100])
@pytest.mark.parametrize("side", ["left", "right"])
def test_bft_v1_code_is_the_released_loss(side, window):
    batch, length, width, vocabulary = 5, 24, 6, 37
    p = draw_problem(batch * length, width, vocabulary, scale=2.0)
    hidden, labels = p.hidden.view(batch, length, width), torch.randint(vocabulary, (batch, length))
    for row in range(batch):
        used, prompt = int(torch.randint(8, length + 1, ())), int(torch.randint(1, 5, ()))
        start = length - used if side == "left" else 0
        labels[row, : start + prompt] = labels[row, start + used :] = -100
    labels[2] = -100  # a row that holds only a prompt

    def ours(**how):
        target = weighting.shift_labels(labels)
        return balanced_linear_cross_entropy(
            hidden, p.weight, target, scheme="bft-v1-code", window=window, **how
        )

    expected = released_loss(hidden @ p.weight.T, labels, window)
    assert_same_loss(p, ours(num_items=batch), expected, 1e-10)
    # Without num_items the empty row is not counted.
    assert_close(ours(), expected * batch / (batch - 1), 1e-10)


@given(
    lengths=st.lists(st.lists(st.integers(1, 7), min_size=1, max_size=4), min_size=1, max_size=4),
    ignore_index=st.sampled_from([-100, -1, 0]),
)
def test_shift_labels(lengths, ignore_index):
    width = max(sum(row) for row in lengths)
    labels = torch.arange(1, len(lengths) * width + 1).view(-1, width)
    rows = [[*row, width - sum(row)] for row in lengths]
    cu = boundaries([length for row in rows for length in row])
    following = torch.cat([labels[:, 1:], labels.new_full((len(rows), 1), ignore_index)], 1)
    plain = weighting.shift_labels(labels, ignore_index=ignore_index)
    assert torch.equal(plain, following)
    following.view(-1)[cu[1:] - 1] = ignore_index
    assert torch.equal(weighting.shift_labels(labels, cu, ignore_index), following)


@given(rows=st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=4), min_size=1, max_size=4))
def test_boundaries_from_position_ids(rows):
    width = max(sum(row) for row in rows)
    ids, expected = [], [0]
    for row in rows:
        own = [t for length in row for t in range(length)]
        # Collators pad with a constant, and each such position is a document of its own.
        ids.append(own + [0] * (width - len(own)))
        for length in (*row, *[1] * (width - len(own))):
            expected.append(expected[-1] + length)
    for dtype in (torch.int32, torch.int64):
        got = weighting.cu_seqlens_from_position_ids(torch.tensor(ids, dtype=dtype))
        assert got.dtype == torch.int64
        assert got.tolist() == expected


@given(
    rows=st.lists(
        st.tuples(st.integers(0, 3), st.lists(st.integers(1, 5), max_size=3)),
        min_size=1,
        max_size=4,
    )
)
def test_boundaries_from_attention_mask(rows):
    width = max(1, *(left + sum(lengths) for left, lengths in rows))
    numbered, expected, place = [], [0], 0
    for left, lengths in rows:
        own = [0] * left + [n for n, size in enumerate(lengths, 1) for _ in range(size)]
        right = width - len(own)
        numbered.append(own + [0] * right)
        # Padding on both sides of nothing is one run.
        runs = [left + right] if not lengths else [left, *lengths, right]
        for size in runs:
            place += size
            if size:
                expected.append(place)
    got = weighting.cu_seqlens_from_attention_mask(torch.tensor(numbered))
    assert got.tolist() == expected
    binary = torch.tensor(numbered) > 0
    from_bool = weighting.cu_seqlens_from_attention_mask(binary)
    assert torch.equal(from_bool, weighting.cu_seqlens_from_attention_mask(binary.int()))
    for run in binary.flatten().split(from_bool.diff().tolist()):
        assert len(run.unique()) <= 1


def test_boundaries_without_waiting_for_a_device():
    # Off the CPU the count of documents is unknown to the host: as many as positions, filled up.
    ids = torch.empty(2, 5, dtype=torch.int64, device="meta")
    assert weighting.cu_seqlens_from_position_ids(ids).shape == (11,)
    assert weighting.cu_seqlens_from_attention_mask(ids).shape == (11,)


def test_empty_batches():
    none = torch.zeros(0, 4, dtype=torch.int64)
    assert weighting.cu_seqlens_from_position_ids(none).tolist() == [0]
    assert weighting.shift_labels(none).shape == (0, 4)
    assert weighting.shift_labels(none.T).shape == (4, 0)
    assert weighting.shift_labels(none, torch.tensor([0])).shape == (0, 4)


@pytest.mark.parametrize("normalize", ["sequence", "token"])
@pytest.mark.parametrize("return_stats", [False, True], ids=["loss", "statistics"])
@pytest.mark.parametrize("scheme", ["sft", "dft"])
def test_where_labels_lie_is_found_once(scheme, return_stats, normalize, monkeypatch):
    found = Mock(side_effect=documents.labelled_layout)
    for module in (functional, weighting):
        monkeypatch.setattr(module, "labelled_layout", found)
    p = draw_problem(12, 5, 11)
    options = {"return_stats": return_stats, "backend": "torch", "scheme": scheme}
    balanced_linear_cross_entropy(
        p.hidden[None], p.weight, p.target[None], normalize=normalize, **options
    )
    assert found.call_count == (return_stats or normalize == "sequence")
