"""The model of GPU time: sums by hand, ceilings, and what it is given."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from benchmarks import (
    model,
    model_entries,
    model_ours,
    model_peers,
    model_sampled,
    model_static,
)
from benchmarks.model_entries import Kept, hit_rate, interleaved, lower_bounds
from benchmarks.model_hardware import GPUS, LAUNCH, PUBLISHED_PRODUCTS
from benchmarks.model_kernels import Kernel, g_seconds, product, total, waves
from benchmarks.run import static
from benchmarks.shapes import Shape, save_recorded
from bft_kernels.reference import uniforms

H100 = GPUS["H100"]
TARGET = Shape(8192, 4096, 131_072)


def test_g_follows_from_the_published_products() -> None:
    # 2 * 8192 * 4096 * 131072 flop at 3 * 2 * 8192 * 4096 * 151936 flop in 42 ms.
    assert g_seconds(TARGET, H100) == pytest.approx(42e-3 / 3 * 131_072 / 151_936)
    assert pytest.approx(PUBLISHED_PRODUCTS) == H100.vendor


@pytest.mark.parametrize("gpu", GPUS.values(), ids=list(GPUS))
def test_g_doubles_with_each_size(gpu: model.Gpu) -> None:
    once = g_seconds(TARGET, gpu)
    for name in ("tokens", "width", "vocabulary"):
        twice = replace(TARGET, **{name: 2 * getattr(TARGET, name)})
        assert g_seconds(twice, gpu) == pytest.approx(2 * once)


def test_clocks_are_those_of_the_datasheets() -> None:
    ghz = {"A100": 1.41, "H100": 1.83, "H200": 1.83, "B200": 1.855}
    assert {name: gpu.clock / 1e9 for name, gpu in GPUS.items()} == pytest.approx(ghz, rel=0.01)


def test_a_kernel_takes_what_its_scarcest_takes() -> None:
    busy = {"tensor": 3e-3, "issue": 1e-3, "wait": 2e-3}
    assert Kernel("", **busy, resident=1).seconds(H100) == pytest.approx(6e-3 + LAUNCH)
    assert Kernel("", **busy, resident=2).seconds(H100) == pytest.approx(3e-3 + LAUNCH)
    assert Kernel("", **busy, resident=9).seconds(H100) == pytest.approx(3e-3 + LAUNCH)
    moved = Kernel("", **busy, memory=H100.bandwidth, launches=2)
    assert moved.seconds(H100) == pytest.approx(1 + 2 * LAUNCH)
    assert moved.times(3).seconds(H100) == pytest.approx(3 + 6 * LAUNCH)


def test_a_product_by_hand() -> None:
    # 1024 x 4096 in tiles of 128 x 256 makes 128 of them for 132 multiprocessors: one wave, of the
    # time that 132 tiles would take.
    kernel = product("", 1024, 4096, 131_072, H100)
    assert waves(128, H100) == pytest.approx(132 / 128)
    expected = 2 * 1024 * 4096 * 131_072 * 132 / 128 / H100.vendor
    assert kernel.tensor == pytest.approx(expected)
    assert kernel.memory == 2 * (1024 * 131_072 + 131_072 * 4096 + 1024 * 4096)


@pytest.mark.parametrize("gpu", GPUS.values(), ids=list(GPUS))
@pytest.mark.parametrize("rows", [1, 64, 1000, 8192])
def test_products_stay_below_the_ceilings(gpu: model.Gpu, rows: int) -> None:
    kernel = product("", rows, 4096, 128_256, gpu)
    seconds = kernel.seconds(gpu)
    assert 2 * rows * 4096 * 128_256 / seconds <= gpu.vendor * (1 + 1e-9)
    assert kernel.memory / seconds <= gpu.memory


@pytest.mark.parametrize("gpu", GPUS.values(), ids=list(GPUS))
def test_nothing_is_faster_than_its_products_or_its_bytes(gpu: model.Gpu) -> None:
    once = g_seconds(TARGET, gpu)
    kept = model_entries.load()[0]
    assert total(model_ours.forward(TARGET, gpu), gpu) > once
    assert total(model_ours.forward_tiled(TARGET, gpu), gpu) > once
    assert total(model_ours.exact(TARGET, gpu), gpu) > 3 * once
    for design in model_sampled.DESIGNS:
        assert total(model_sampled.sampled(TARGET, gpu, kept, design), gpu) > once
    for figure in model_peers.PUBLISHED:
        kernels = figure.algorithm(figure.shape, GPUS[figure.gpu])
        moved = sum(kernel.memory for kernel in kernels)
        assert figure.predicted() >= moved / GPUS[figure.gpu].memory


def test_more_entries_and_less_room_cost_more() -> None:
    kept = next(kept for kept in model_entries.load() if kept.eps == 2**-10)
    built = total(model_sampled.sampled(TARGET, H100, kept), H100)
    more = replace(kept, entries=2 * kept.entries, candidates=2 * kept.candidates)
    assert total(model_sampled.sampled(TARGET, H100, more), H100) > built
    flat = replace(kept, entries=1 / kept.eps)  # some rows find no room
    g = g_seconds(TARGET, H100)
    assert total(model_sampled.sampled(TARGET, H100, flat), H100) > built + g
    frozen = model_sampled.sampled(TARGET, H100, kept, trains_weight=False)
    assert total(frozen, H100) < built


def test_chunks_are_those_of_the_backend() -> None:
    # 512 MiB hold 1024 rows of 131072 float32 logits; the default has room for their bits too.
    assert model_ours.logits_chunks(TARGET, 2**29) == [1024] * 8
    kernels = model_sampled.sampled(TARGET, H100, model_entries.load()[0])
    assert sum(kernel.name == "logits" for kernel in kernels) == 8
    tiled = model_sampled.DESIGNS[1]
    assert tiled.tiled
    kernels = model_sampled.sampled(TARGET, H100, model_entries.load()[0], tiled)
    assert not any(kernel.name == "logits" for kernel in kernels)


def test_splits_are_those_of_the_backend() -> None:
    from bft_kernels.backends.triton.configs import splits_for

    row_blocks, splits, each = model_ours.splits_for(TARGET, GPUS["H100"], (128, 128))
    assert (row_blocks, each) == (64, 114)
    wanted = splits_for(row_blocks, 1024, torch.empty(0))  # of the interpreter's 4 processors
    assert wanted == math.ceil(4 * 4 / 64)
    assert splits == model_entries.SPLITS


def test_published_figures_are_reproduced() -> None:
    wide, narrow = model_peers.errors(), model_peers.errors(narrow=True)
    assert len(wide) + len(narrow) == len(model_peers.PUBLISHED) - 1
    assert max(map(abs, wide)) < 0.15
    assert all(error < 0 for error in narrow)  # the model misses something that they pay for
    calibrating = [figure for figure in model_peers.PUBLISHED if figure.calibrates]
    assert [abs(figure.error) < 0.02 for figure in calibrating] == [True]


def test_chunks_of_peers() -> None:
    # 128256 / 4096 is 31.3, up to 32 chunks; 1024 / 32 rows each.
    kernels = model_peers.liger(Shape(1024, 4096, 128_256), H100)
    assert sum(kernel.name == "logits" for kernel in kernels) == 32


def test_an_interval_holds_what_it_is_for() -> None:
    low, high = model.interval(1.0)
    assert low < 1 < high


@pytest.mark.parametrize("capacity", [1, 3, 7, 50])
def test_hit_rate_against_a_search_of_what_was_used_last(capacity: int) -> None:
    generator = torch.Generator().manual_seed(0)
    accesses = torch.randint(20, (400,), generator=generator).tolist()
    hits = 0
    for i, row in enumerate(accesses):
        before = accesses[:i]
        if row in before:
            last = i - 1 - before[::-1].index(row)
            hits += len(set(accesses[last + 1 : i])) < capacity
    assert hit_rate(accesses, capacity) == pytest.approx(hits / len(accesses))


def test_programs_take_turns_and_the_next_follows_one_that_ends() -> None:
    lists: list[Sequence[int]] = [[1, 2, 3], [10], [], [20, 21, 22]]
    assert list(interleaved(lists, resident=2, at_once=2)) == [1, 2, 10, 3, 20, 21, 22]
    assert sorted(interleaved(lists, resident=9, at_once=1)) == sorted(chain(*lists))


def test_bounds_are_the_sums_before_a_tile() -> None:
    generator = torch.Generator().manual_seed(0)
    e = torch.rand(3, 5, 4, generator=generator)  # 5 tiles, 2 parts of 3 and 2
    floor = torch.tensor([[0.0], [1.0], [100.0]])
    bounds = lower_bounds(e, floor, 2)
    for row in range(3):
        for tile in range(5):
            begin = 0 if tile < 3 else 3
            before = float(e[row, begin:tile].sum())
            assert bounds[row, tile] == pytest.approx(max(before, float(floor[row])))


def test_kept_entries_are_those_of_the_specification(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(24, 8, generator=generator)
    weight = torch.randn(700, 8, generator=generator)
    target = torch.randint(700, (24,), generator=generator)
    path = tmp_path / "inputs.pt"
    save_recorded(path, hidden, weight, target)
    found = model_entries.measure(path, 24, block=7)
    p = torch.softmax(hidden @ weight.T, 1)
    draws = uniforms(model_entries.SEED, range(24), torch.arange(700))
    for kept in found:
        chosen = (draws * kept.eps < p).scatter_(1, target[:, None], True)
        assert kept.entries == pytest.approx(float(chosen.sum()) / 24, abs=1.5 / 24)
        assert kept.distinct == pytest.approx(int(chosen.any(0).sum()), abs=1)
        assert kept.entries <= kept.listed_popular <= min(kept.listed, kept.candidates)
    popular = model_entries.popular_of(target)
    assert popular.tolist() == sorted(set(target.tolist()))
    model_entries.save(found, tmp_path / "kept.json")
    assert model_entries.load(tmp_path / "kept.json") == found
    model_entries.save(found[:1], tmp_path / "kept.json")
    assert model_entries.load(tmp_path / "kept.json") == found[:1]


def test_recorded_entries_load() -> None:
    known = model_entries.load()
    assert {kept.eps for kept in known} == set(model_entries.EPS)
    for kept in known:
        assert isinstance(kept, Kept)
        assert kept.entries <= kept.listed_popular <= min(kept.listed, kept.candidates)
        assert kept.entries <= 1 / kept.eps
        assert 0 < kept.hits_at(50e6 / 8192, listed=False) < 1
        assert kept.distinct <= kept.distinct_at(8192) <= kept.vocabulary


def test_compiled_figures_are_not_stale() -> None:
    """Else: ``python -m benchmarks model --compile``."""
    budget = json.loads(static.BUDGET.read_text())
    for gpu in GPUS.values():
        for kernel in ("linear_nll_forward", "logit_gradient", "list_entries", "gather_hidden"):
            slots = model_static.compiled(gpu.target, kernel).slots
            forms = [v for k, v in budget.items() if k.startswith(f"{gpu.target} {kernel} bf16")]
            # The budget is what a kernel must not exceed: it may have become shorter since.
            assert any(0.75 < slots / form < 1.15 for form in forms), f"{gpu.target} {kernel}"


def test_csv_and_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.csv"
    model.main(model.Config(gpus=("H100",), output=path))
    printed = capsys.readouterr().out
    assert "predicted, not measured" in printed
    assert "calibrates" in printed
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["kind"] for row in rows} >= {"published", "goal", "design", "engine", "other"}
    goals = [row for row in rows if row["kind"] == "goal"]
    assert all(
        (row["met"] == "True") == (float(row["times_g"]) <= float(row["limit"])) for row in goals
    )
    for goal in model_sampled.GOALS:
        parts = [float(row["seconds"]) for row in rows if row["kind"] == f"kernel of {goal.name}"]
        whole = max(float(row["seconds"]) for row in goals if row["name"] == goal.name)
        assert sum(parts) == pytest.approx(whole)
    with pytest.raises(SystemExit, match="gpus"):
        model.main(model.Config(gpus=("V100",)))
