"""The benchmark measures what it says."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

import benchmarks.loss
import benchmarks.record
import benchmarks.scale
from benchmarks.measure import extra_memory, step
from benchmarks.providers import PROVIDERS
from benchmarks.shapes import SHAPES, Recorded, Shape, make_problem


@pytest.mark.parametrize(
    "name", [name for name in ("bft exact", "bft sampled", "torch chunked") if name in PROVIDERS]
)
def test_providers_compute_the_mean_loss(name: str) -> None:
    problem = make_problem(Shape(64, 16, 500), torch.float32, "cpu")
    expected = PROVIDERS["eager"](problem)
    torch.testing.assert_close(PROVIDERS[name](problem), expected, rtol=1e-5, atol=1e-5)


def test_csv_has_a_row_a_provider(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    config = benchmarks.loss.Config(
        shape="tiny",
        device="cpu",
        repeats=1,
        providers=("eager", "bft exact"),
        memory=False,
        output=path,
    )
    benchmarks.loss.main(config)
    benchmarks.loss.main(config)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["provider"] for row in rows] == ["1G", "eager", "bft exact"] * 2
    assert float(rows[0]["times_g"]) == 1.0


def test_fit_finds_the_two_slopes() -> None:
    shapes = [Shape(n, 64, v) for n in (256, 4096) for v in (1000, 50_000)]
    exact = [benchmarks.scale.predict(shape, 3e-9, 2e-12) for shape in shapes]
    fixed, slope = benchmarks.scale.fit(shapes, exact)
    assert fixed == pytest.approx(3e-9)
    assert slope == pytest.approx(2e-12)


def test_scale_writes_a_row_a_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "scale.csv"
    config = benchmarks.scale.Config(
        width=32, tokens=(64, 256), vocabularies=(512, 2048), device="cpu", repeats=1, output=path
    )
    benchmarks.scale.main(config)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(int(row["tokens"]), int(row["vocabulary"])) for row in rows] == [
        (64, 512),
        (256, 512),
        (64, 2048),
        (256, 2048),
    ]
    assert "passes over dW" in capsys.readouterr().out


@pytest.mark.slow
def test_recorded_inputs_are_those_of_the_models_own_loss(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from bft.pretrained import PretrainedError, pretrained

    try:
        folder = pretrained("smollm2-135m")
    except PretrainedError as error:
        pytest.skip(str(error))
    texts = tmp_path / "texts.txt"
    texts.write_text("The heart pumps blood\nthrough the vessels.\n\n\nInsulin lowers glucose.\n")
    assert list(benchmarks.record.documents(texts)) == [
        "The heart pumps blood through the vessels.",
        "Insulin lowers glucose.",
    ]
    path = tmp_path / "inputs.pt"
    benchmarks.record.main(benchmarks.record.Config(texts, path, tokens=10))
    problem = make_problem(Recorded(path, 7), torch.float32, "cpu")
    assert problem.hidden.shape[0] == 7
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = transformers.AutoTokenizer.from_pretrained(folder)(
        "The heart pumps blood through the vessels.", return_tensors="pt"
    ).input_ids[:, :8]
    expected = model(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(PROVIDERS["bft exact"](problem), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_memory_of_eager_is_that_of_its_logits() -> None:
    shape = Shape(512, 64, 49_152)
    logits = shape.tokens * shape.vocabulary * 4
    eager = extra_memory("eager", shape, torch.float32, "cpu")
    ours = extra_memory("bft sampled", shape, torch.float32, "cpu")
    assert 1.9 * logits < eager < 4 * logits
    assert ours < logits
    # A frozen head has no gradient that could be taken for memory saved.
    assert extra_memory("bft balanced sampled, frozen head", shape, torch.float32, "cpu") > 2**20


@pytest.mark.parametrize("name", [name for name in PROVIDERS if name.startswith("bft")])
def test_speed(name: str, benchmark) -> None:
    """Not a threshold: `pytest --benchmark-only` compares versions of the code on one machine."""
    problem = make_problem(SHAPES["tiny"], torch.float32, "cpu")
    benchmark.pedantic(step, (name, problem), rounds=3, warmup_rounds=1)
