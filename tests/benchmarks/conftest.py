"""Result folders: an empty one, and a made-up one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.results.folder import Folder
from benchmarks.results.schema import PARTS, append

# With what HTML, TeX and CSV would take for their own.
ODD = 'odd <b>&"$x$, loss'


@pytest.fixture
def run(tmp_path: Path) -> Folder:
    """An empty folder of a run on a CPU."""
    made = Folder(tmp_path / "results", "cpu")
    made.open()
    return made


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two vocabularies, two weightings, a provider that cannot run, growth and training.

    Shared, so only to be read.
    """
    made = tmp_path_factory.mktemp("results")
    (made / "environment.json").write_text('{"peers": {"trl": "1.2.3"}, "nvidia_smi": {}}')
    facts = {"commit": "abc", "processor": "a <processor>", "threads": 2, "torch": "2.13"}
    losses: list[dict[str, Any]] = []
    for vocabulary in (1000, 50_000):
        problem = {"shape": f"model-{vocabulary}", "inputs": "recorded", "tokens": 64}
        problem |= {"width": 16, "vocabulary": vocabulary, "dtype": "float32"}
        columns = ("seconds", "spread", "times_g", "extra_bytes", "error_hidden", "reason")

        def row(
            provider: str,
            weighting: str,
            mode: str,
            *values: Any,
            problem: dict[str, Any] = problem,
            columns: tuple[str, ...] = columns,
        ) -> None:
            figures = dict.fromkeys(columns, "") | dict(zip(columns, values, strict=False))
            named = {"provider": provider, "weighting": weighting, "mode": mode}
            losses.append(named | problem | facts | {"load": 0.25} | figures)

        row("1G", "", "", 0.5, 0.01, 1.0)
        for place, weighting in enumerate(("plain", "bft")):
            row("eager", weighting, "both", 1.5 + place, 0.02, 3.0 + 2 * place, 2**30, 1e-7)
            row(ODD, weighting, "both", 2.5, 0.02, 5.0, 2**28)
            row("bft sampled", weighting, "both", 0.6, 0.02, 1.2, 22 * 2**20, 3e-3)
            row("bft sampled", weighting, "forward", 0.55, 0.02, 1.1, 2**22)
        row("quack", "bft", "both", "", "", "", "", "", "needs a <GPU>")
    append(made / "loss.csv", losses)
    grid = [
        {
            "provider": "bft sampled",
            "tokens": tokens,
            "width": 16,
            "vocabulary": vocabulary,
            "dtype": "float32",
            **facts,
            "seconds": (3e-9 + 2e-12 * tokens) * vocabulary * 16,
            "bare_product_seconds": 1e-12 * tokens * vocabulary * 16,
            "fitted_seconds": (3e-9 + 2e-12 * tokens) * vocabulary * 16,
        }
        for tokens in (64, 1024)
        for vocabulary in (1000, 50_000)
    ]
    append(made / "scale.csv", grid)
    steps = []
    for place, loss in enumerate(("eager", "sampled", "liger")):
        step: dict[str, Any] = {"loss": loss, "weighting": "bft", "mode": "full", "model": "tiny"}
        step |= {"batch": 4, "length": 256}
        empty = ("seconds", "spread", "tokens_per_second", "peak_bytes")
        empty += tuple(f"{part}_seconds" for part in PARTS)
        step |= dict.fromkeys((*empty, "limit_bytes", "largest_batch", "reason"), "")
        if loss == "liger":
            steps.append(step | {"reason": "takes no weights"})
            continue
        parts = {f"{part}_seconds": 0.1 * (1 + n) + place for n, part in enumerate(PARTS)}
        timed = parts | {
            "seconds": 2.0,
            "tokens_per_second": 512 * (1 + place),
            "peak_bytes": 2**31,
        }
        steps.append(step | timed)
        steps += [
            step | {"batch": "", "limit_bytes": gib * 2**30, "largest_batch": gib * (place + 1)}
            for gib in (4, 16)
        ]
    append(made / "train.csv", steps)
    return made
