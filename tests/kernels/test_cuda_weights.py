"""The CUDA kernels' weights, their device code run by the emulation."""

import math

import pytest
import torch

from bft_kernels.backends.cuda.weights import balanced_loss, joint_weights
from bft_kernels.checks import SCHEMES
from bft_kernels.config import Weighting
from tests.support import balanced_weights
from tests.support.problems import assert_close

TILE = 256
LAYOUTS = balanced_weights.layouts(TILE)


@pytest.fixture
def run(emulated_device):
    def call(loss, labelled, bounds, settings, normalize="sequence", items=None, **how):
        emulated_device.how = {"unwritten": True, **how}
        return balanced_loss(loss, labelled, bounds, items, normalize, settings)

    assert emulated_device.module.WEIGHT_TILE == TILE
    return call


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_equals_the_specification(run, scheme, layout):
    balanced_weights.check_specification(run, joint_weights, LAYOUTS[layout], scheme, assert_close)


def test_a_document_of_more_tiles_than_a_warp_has_lanes(run):
    lengths = (9, 40 * TILE + 5, 3)
    loss, labelled, bounds = balanced_weights.draw(lengths, 0.8)
    settings = Weighting("bft", 3)
    got, want = (f(loss, labelled, bounds, settings) for f in (run, balanced_weights.plain))
    assert_close(got._asdict(), want._asdict(), 1e-6)
    for hopeless in (11, 20 * TILE, 40 * TILE):
        own = torch.ones(loss.numel())
        own[hopeless] = 30.0
        got = run(own, own > 0, bounds, Weighting("bft", 1))
        assert got.sequence_confidence.argmin() == 1
        assert float(got.sequence_confidence[1]) == pytest.approx(math.exp(-30.0), rel=1e-6)


@pytest.mark.parametrize("scheme", ["bft", "bft-v1"])
def test_windows_keep_small_sums_next_to_large_ones(run, scheme):
    balanced_weights.check_small_sums(run, scheme, 4 * TILE + 7)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_losses_at_the_ends_of_the_range(run, scheme):
    balanced_weights.check_ends_of_the_range(run, scheme, TILE)


def test_a_confidence_that_underflows_is_not_zero_to_its_logarithm(run):
    balanced_weights.check_underflow(run)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_documents_do_not_see_each_other(run, scheme):
    balanced_weights.check_documents_are_alone(run, scheme, TILE)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_padding_changes_nothing(run, scheme):
    balanced_weights.check_padding(run, scheme, TILE)


@pytest.mark.parametrize("scheme", ["sft", "bft"])
def test_a_step_of_no_items(run, scheme):
    balanced_weights.check_no_items(run, scheme, TILE)


@pytest.mark.parametrize("bounds", balanced_weights.BAD_BOUNDS, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_boundaries_that_nobody_checked_stay_inside(run, scheme, bounds):
    loss, labelled, _ = balanced_weights.draw((70,), 0.8)
    for normalize in ("sequence", "token"):
        got = run(loss, labelled, torch.tensor(bounds), Weighting(scheme, 4), normalize)
        assert not any(bool(value.isnan().any()) for value in got)


@pytest.mark.parametrize("offset", [0, 3, 16])
def test_labels_may_start_anywhere_and_other_losses_are_not_seen(run, offset):
    loss, labelled, bounds = balanced_weights.draw((100, 3 * TILE, 20), 0.6)
    settings = Weighting("bft", 8)
    expected = run(loss, labelled, bounds, settings)
    part = torch.cat([torch.ones(offset, dtype=torch.bool), labelled])[offset:]
    assert part.data_ptr() % 16 == offset % 16
    got = run(torch.where(labelled, loss, math.nan), part, bounds, settings)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_order_of_threads_changes_nothing(run, scheme):
    loss, labelled, bounds = balanced_weights.draw((7, 0, 2 * TILE, 90), 0.7)
    inputs = loss, labelled, bounds, Weighting(scheme, 9)
    first = run(*inputs)
    for seed in 1, 2:
        other = run(*inputs, seed=seed, strict=seed == 2)
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_an_infinite_loss_of_weight_zero_adds_nothing(run):
    loss = torch.tensor([1.0, math.inf, 2.0])
    got = run(loss, torch.ones(3, dtype=torch.bool), torch.tensor([0, 3]), Weighting("dft"))
    assert got.coefficient[1] == 0
    assert bool(got.loss.isfinite())


def test_arguments_are_checked(emulated):
    names = ["loss", "labelled", "cu_seqlens", "before", "sequence", "values", "lowest", "ended"]
    names += ["coefficient", "token_weight", "window_confidence", "sequence_weight"]
    pointers = {f"{name}_ptr": 16 for name in (*names, "sequence_confidence", "sums")}
    flags = ["full_windows", "geometric", "confidence", "ratio", "flat", "by_sequence", "counts"]
    good = pointers | dict.fromkeys(flags, False) | {"N": 4, "S": 2, "window": 3, "stream": 0}
    good |= {"floor": 1e-8, "gamma": 1.0}
    wrong = {"N": -1, "S": 2**31, "window": 0, "floor": math.nan, "gamma": 0.0}
    wrong |= dict.fromkeys(pointers, 0) | {"num_items_ptr": 2}
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=name):
            emulated.balanced_weights(**{**good, name: value})


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_the_kernels_spill_nothing(assemble, arch):
    assembled = assemble("csrc/cuda/weights.cu", arch)
    assert assembled.kernels == 5
    for name, code in assembled.sass().items():
        if "close_gaps" in name:
            assert ("LDG.E.128" in code) == ("Lb1E" in name), name
