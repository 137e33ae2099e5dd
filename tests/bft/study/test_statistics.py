"""Paired statistics: values worked by hand, and data of which the truth is known."""

import math

import numpy as np
import pytest

from bft.study.statistics import Difference, bootstrap, detectable, differences, holm


def test_holm_is_worked_by_hand():
    """Sorted .01 .02 .03 .04: times 4, 3, 2, 1 gives .04 .06 .06 .04, and none falls."""
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_the_detectable_effect_is_2_8_standard_errors():
    assert detectable(0.5) == pytest.approx((1.959964 + 0.841621) * 0.5, rel=1e-6)
    assert math.isnan(detectable(0.0))


def test_the_bootstrap_has_the_standard_error_of_the_textbook():
    """Two seeds 0 and 2, all items alike: variance 2, of the mean 1. Likewise over four items."""
    rows = np.array([[0.0] * 4, [2.0] * 4])
    assert bootstrap(rows, 40_000, 0).std() == pytest.approx(1.0, rel=0.02)
    assert bootstrap(rows, 40_000, 0).mean() == pytest.approx(1.0, abs=0.02)
    columns = np.array([[0.0, 1.0, 2.0, 5.0]])  # variance 14/3, of the mean 14/12
    assert bootstrap(columns, 40_000, 0).std() == pytest.approx(math.sqrt(14 / 12), rel=0.02)
    both = rows + columns
    assert bootstrap(both, 40_000, 0).std() == pytest.approx(math.sqrt(1 + 14 / 12), rel=0.02)


def test_the_bootstrap_is_every_draw_of_two_items():
    """One seed, two items -1 and 3: draws are the pairs, stretched by the root of 2 about 1."""
    drawn = bootstrap(np.array([[-1.0, 3.0]]), 40_000, 0)
    values, counts = np.unique(drawn.round(9), return_counts=True)
    assert values.tolist() == pytest.approx([1 - 2 * math.sqrt(2), 1, 1 + 2 * math.sqrt(2)])
    assert (counts / 40_000).tolist() == pytest.approx([0.25, 0.5, 0.25], abs=0.01)


def test_a_difference_says_which_is_higher_and_by_how_much():
    draw = np.random.default_rng(3)
    base = draw.normal(size=(3, 200))
    pairs = [("a", "b", base + 0.5, base), ("c", "b", base + draw.normal(size=(3, 200)), base)]
    high, none = differences(pairs, draws=2000)
    assert high.mean == pytest.approx(high.low) == pytest.approx(0.5)
    assert (high.p, high.p_holm) == (1 / 2001, 2 / 2001)
    assert high.says() == "higher by 0.5"
    assert none.low < 0 < none.high
    assert none.detectable == pytest.approx(2.8016 * none.standard_error, rel=1e-4)
    assert none.says() == (
        f"not distinguishable; an effect of at least {none.detectable:.2g} would have been seen"
    )
    assert differences(pairs, draws=2000)[1] == none  # the same draws
    assert differences([("b", "a", base, base + 0.5)], draws=99)[0].says() == "lower by 0.5"


def test_values_that_are_all_alike_are_not_called_equal():
    ones = np.ones((3, 5))
    (same,) = differences([("a", "b", ones, ones)], draws=100)
    assert (same.mean, same.p) == (0.0, 1.0)
    assert "unknown" in same.says()
    words = [Difference("a", "b", 0, -1, 1, 0.5, 1.4, p, p).says() for p in (0.001, 0.9)]
    assert not any(word in text for text in (*words, same.says()) for word in ("equal", "no diff"))


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (np.ones((2, 3)), np.ones((3, 2))),
        (np.ones((2, 0)), np.ones((2, 0))),
        (np.array([[np.nan]]), np.ones((1, 1))),
    ],
    ids=["shapes", "empty", "nan"],
)
def test_values_that_are_not_paired_are_named(a, b):
    with pytest.raises(ValueError, match="left, right: got values of shapes"):
        differences([("left", "right", a, b)])


def test_intervals_cover_the_truth_of_crossed_data():
    """Effects of 6 seeds, of 40 items and of each pair: the interval of 95% covers about that."""
    draw, covered, studies = np.random.default_rng(0), 0, 300
    for _ in range(studies):
        effects = draw.normal(0, 1, (6, 1)) + draw.normal(0, 2, 40) + draw.normal(size=(6, 40))
        (found,) = differences([("a", "b", effects + 0.3, np.zeros((6, 40)))], draws=300)
        covered += found.low <= 0.3 <= found.high
    assert 0.86 <= covered / studies <= 0.98


def test_without_an_effect_few_studies_see_one():
    draw, seen, studies = np.random.default_rng(1), 0, 300
    for _ in range(studies):
        effects = 0.1 * draw.normal(size=(5, 1)) + draw.normal(size=60)
        (found,) = differences([("a", "b", effects, np.zeros((5, 60)))], draws=300)
        seen += found.p_holm < 0.05
    assert seen / studies <= 0.1
