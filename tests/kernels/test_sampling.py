"""``gradient="sampled"``: its random numbers, its unbiasedness and its certificate.

Draws come from :func:`tests.support.draws.draw_bits`, an implementation of the hash that
``test_reference.py`` proves equal, bit for bit, to the specification and to the backend.
"""

import numpy as np
import pytest
import torch
from scipy import stats

from tests.support.draws import P_VALUE, draw_bits, inclusion
from tests.support.losses import nll
from tests.support.problems import Problem, assert_close, draw_problem
from tests.support.samples import specified_sample


def wide_int(rng):
    return int(rng.integers(-(2**63), 2**63 - 1))


@pytest.fixture
def rng(seed):
    return np.random.default_rng(seed)


def two_sided(p):
    """From ``P(X <= x)``: too regular is as wrong as too irregular."""
    return 2 * min(p, 1 - p)


def chi_square(values, cells):
    """The p-value of whole numbers being uniform below ``cells``."""
    counts = np.bincount(values.ravel(), minlength=cells)
    expected = counts.sum() / cells
    statistic = float(((counts - expected) ** 2 / expected).sum())
    kept = stats.chi2(cells - 1)
    return 2 * min(float(kept.cdf(statistic)), float(kept.sf(statistic)))


def pairs_of(first, second, shift):
    """Five bits of each, as one number."""
    a, b = ((x >> np.uint32(shift)) & np.uint32(31) for x in (first, second))
    return a * np.uint32(32) + b


def axis_draws(axis, count, rng):
    """``count`` draws that differ in one coordinate only."""
    seed, row, column = wide_int(rng), int(rng.integers(2**40)), int(rng.integers(2**17))
    if axis == "columns":
        return draw_bits(seed, [row], column + np.arange(count))[0]
    if axis == "rows":
        return draw_bits(seed, row + np.arange(count), [column])[:, 0]
    if axis == "seeds":
        return draw_bits(seed // 2 + np.arange(count), [row], [column])[:, 0]
    # A trainer may count steps in the high half of the seed.
    return draw_bits((np.arange(count) - count // 2) << 32, [row], [column])[:, 0]


@pytest.mark.parametrize("axis", ["columns", "rows", "seeds", "seeds in steps of 2^32"])
def test_draws_are_uniform(axis, rng):
    for _ in range(3):
        bits = axis_draws(axis, 2**19, rng)
        for shift in (24, 16, 8, 0):
            part = (bits >> np.uint32(shift)) & np.uint32(255)
            assert chi_square(part, 256) > P_VALUE, f"bits {shift} to {shift + 7}"
        assert chi_square(pairs_of(bits[::2], bits[1::2], 27), 1024) > P_VALUE, "neighbours"


# Differences of (seed, row, column) between the two draws of a pair; None is drawn at random.
LAGS = [
    *((0, 0, column) for column in (1, 2, 3, 64, None)),
    *((0, row, 0) for row in (1, 2, 2**32, None)),
    *((seed, 0, 0) for seed in (1, 2, 2**32, None)),
    *((0, 1, 1), (0, 1, -1), (1, -1, 0), (1, 1, 0), (1, 0, -1), (1, 1, 1)),
]


@pytest.mark.parametrize("lag", LAGS, ids=str)
def test_pairs_are_independent(lag, rng):
    # 32 x 32 cells of the leading five bits and of five bits further down, over a grid of 2^21
    # pairs. No draw is in two pairs, so that the pairs are independent of each other as well.
    rows, columns = 2**10, 2**11
    seed_lag, row_lag, column_lag = (int(rng.integers(3, 2**15)) if x is None else x for x in lag)
    place = np.arange(columns)
    step = max(1, abs(column_lag))
    column = 2**16 + place + place // step * step  # steps of draws, then steps left to partners
    row = int(rng.integers(2**30)) + 2 * max(1, abs(row_lag)) * np.arange(rows)
    seed = wide_int(rng) // 4
    first = draw_bits(seed, row, column)
    second = draw_bits(seed + seed_lag, row + row_lag, column + column_lag)
    for shift in (27, 12):
        pairs = pairs_of(first, second, shift)
        assert chi_square(pairs, 1024) > P_VALUE, f"bits {shift} to {shift + 4}"


def common_values(first, second):
    """How many of its 32-bit values each row of ``first`` shares with that row of ``second``."""
    both = np.concatenate([first, second], axis=1)
    both.sort(axis=1)
    return (both[:, 1:] == both[:, :-1]).sum(axis=1)


def test_no_row_or_seed_is_a_rearrangement_of_another(rng):
    # Two rows of 2^16 distinct values out of 2^32 share one on average. A permuted or shifted copy
    # shares nearly all; with random multipliers, sharing a sixteenth has a chance of 2^-35 a pair.
    columns = np.arange(2**16)
    row, seed = int(rng.integers(2**20)), wide_int(rng) // 4
    base = draw_bits(seed, row + np.arange(16), columns)
    others = {
        "the next row": draw_bits(seed, row + 1 + np.arange(16), columns),
        "a far row": draw_bits(seed, row + 2**32 + np.arange(16), columns),
        "the next seed": draw_bits(seed + 1, row + np.arange(16), columns),
        "the negative seed": draw_bits(-seed, row + np.arange(16), columns),
        "the seed with a bit flipped": draw_bits(seed ^ 2**32, row + np.arange(16), columns),
        "seed + 1, row - 1": draw_bits(seed + 1, row - 1 + np.arange(16), columns),
        "seed and row exchanged": draw_bits(row, (seed & 0xFFFF) + np.arange(16), columns),
    }
    for what, other in others.items():
        assert common_values(base, other).max() < 2**12, what


@pytest.mark.parametrize(("argument", "width"), [("seed", 64), ("row", 63), ("column", 31)])
def test_every_input_bit_changes_every_output_bit_half_the_time(argument, width, rng):
    count, output_bits = 2**13, np.arange(32, dtype=np.uint32)
    places = {
        "seed": rng.integers(-(2**63), 2**63 - 1, count),
        "row": rng.integers(2**63 - 1, size=count),
        "column": rng.integers(2**31 - 1, size=count),
    }

    def draw(flip):
        flipped = (places[argument].view(np.uint64) ^ np.uint64(flip)).view(np.int64)
        at = places | {argument: flipped}
        return draw_bits(at["seed"], at["row"], at["column"][:, None])  # one column for each row

    base = draw(0)
    for bit in range(width):
        flips = (((base ^ draw(1 << bit)) >> output_bits) & np.uint32(1)).sum(axis=0)
        worst = flips[np.abs(flips - count / 2).argmax()]
        # A flip in the upper bits of the column passes only half of the 32-bit mix: its known
        # avalanche bias is a little under one percent, and is allowed for.
        slack = 0.01 * count if argument == "column" else 0
        distance = max(0.0, abs(worst - count / 2) - slack)
        p = stats.binomtest(int(count / 2 + distance), count).pvalue
        assert p * 32 * width > P_VALUE, f"{argument} bit {bit}: {worst} of {count}"


def sampled_rows(logits, target, seed, eps):
    """The sampled ``dy [N, V]``: with the unit matrix for a head, hidden states are the logits."""
    p = Problem(logits, torch.eye(logits.shape[1], dtype=logits.dtype), target)
    return p.gradients(nll(p, gradient="sampled", eps=eps, seed=seed).sum())["hidden"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inclusion_counts_are_binomial(dtype, rng):
    # Many rows with the same distribution are as many independent draws of its columns.
    rows, vocabulary, seeds, eps = 512, 384, 16, 2**-7
    logits = torch.randn(vocabulary, dtype=dtype) * 2
    target = torch.full((rows,), int(torch.randint(vocabulary, ())))
    logits_of_rows = logits.expand(rows, -1)
    samples = [sampled_rows(logits_of_rows, target, wide_int(rng), eps) for _ in range(seeds)]
    kept = (torch.stack(samples) != 0).numpy()  # [seeds, rows, V]
    chance = inclusion(logits.softmax(0), eps).numpy()
    assert kept[:, :, target[0]].all()
    others = np.arange(vocabulary) != int(target[0])
    kept, chance = kept[:, :, others], chance[others]
    certain = chance == 1
    assert kept[:, :, certain].all()
    assert (~certain).sum() > 100

    # Float32 softmaxes round: entries whose chance that could move are few and moved by 1e-6.
    slack = 1e-5 if dtype == torch.float32 else 0
    counts = kept.sum(axis=1)  # [seeds, V - 1]
    low = stats.binom.cdf(counts, rows, np.minimum(chance * (1 - slack), 1))
    high = stats.binom.sf(counts - 1, rows, np.minimum(chance * (1 + slack), 1))
    worst = 2 * np.minimum(low, high).min() * counts.size
    assert worst > P_VALUE

    expected, variance = rows * chance, rows * chance * (1 - chance)
    dense = variance > 10
    statistic = ((counts - expected) ** 2)[:, dense] / variance[dense]
    assert two_sided(stats.chi2.cdf(statistic.sum(), statistic.size)) > P_VALUE
    # Dependence between columns, or between rows, would show in the spread of the sums.
    mean, spread = chance.sum(), (chance * (1 - chance)).sum()
    per_row = (kept.sum(axis=2) - mean) ** 2 / spread
    assert two_sided(stats.chi2.cdf(per_row.sum(), per_row.size)) > P_VALUE


@pytest.mark.parametrize(
    "options",
    [{}, {"softcap": 4.0}, {"temperature": 0.6}, {"softcap": 3.0, "temperature": 1.5}],
    ids=str,
)
@pytest.mark.parametrize("budget", [1, 5000, None])
def test_gradients_are_those_of_the_specification(options, budget, seed):
    p = draw_problem(29, 11, 300, bias=True, scale=2.0)
    upstream, eps = torch.randn(29, dtype=torch.float64), 2**-6
    how = {"gradient": "sampled", "seed": seed, "eps": eps, "max_buffer_bytes": budget}
    loss, got = nll(p, return_stats=True, hidden_variance=True, **how, **options)
    gradients = p.gradients((upstream * loss).sum())
    expected, own, rows = specified_sample(p, seed, eps, **options), p.of_labelled(), p.positions
    dy = upstream[rows, None] * expected.dy
    for value, want in (
        (got.variance, expected.variance),
        (got.hidden_variance, expected.hidden_variance),
        (gradients["hidden"], dy @ own.weight),
    ):
        assert_close(value[rows], want, 1e-12)
        assert bool((value[~p.labelled] == 0).all())
    assert_close(gradients["weight"], dy.T @ own.hidden, 1e-12)
    assert_close(gradients["bias"], dy.sum(0), 1e-12)


@pytest.mark.parametrize("options", [{}, {"softcap": 6.0, "temperature": 1.3}], ids=str)
def test_gradients_are_unbiased(options, rng):
    """Hotelling's T^2 of sampled minus exact gradients, projected on random directions.

    A projection is a sum of ten thousands of independent terms, so that it is normal to far out in
    its tails. ``test_gradient_error.py`` looks at the variance.
    """
    p = draw_problem(48, 12, 500, bias=True, scale=2.0)
    upstream, seeds, k = torch.randn(48, dtype=torch.float64), 200, 24

    def gradients(**gradient):
        return p.gradients((upstream * nll(p, **options, **gradient)).sum())

    exact = gradients()
    directions = {name: torch.randn(k, *g.shape, dtype=g.dtype) for name, g in exact.items()}
    found = {name: [] for name in exact}
    for _ in range(seeds):
        for name, got in gradients(gradient="sampled", eps=2**-5, seed=wide_int(rng)).items():
            found[name].append(((got - exact[name]) * directions[name]).flatten(1).sum(1))
    for name, rows in found.items():
        difference = torch.stack(rows).numpy()
        mean, covariance = difference.mean(axis=0), np.cov(difference, rowvar=False)
        t2 = seeds * mean @ np.linalg.solve(covariance, mean)
        f = (seeds - k) / (k * (seeds - 1)) * t2
        assert stats.f.sf(f, k, seeds - k) > P_VALUE, name
