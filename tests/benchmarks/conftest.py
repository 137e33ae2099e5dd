"""Result folders: an empty one, and a made-up one."""

import pytest

from benchmarks.results.folder import Folder
from benchmarks.results.schema import PARTS, append, full

# With what HTML, TeX and CSV would take for their own.
ODD = 'odd <b>&"$x$, loss'


@pytest.fixture
def run(tmp_path):
    """An empty folder of a run on a CPU."""
    made = Folder(tmp_path / "results", "cpu")
    made.open()
    return made


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Of two vocabularies, two weightings, a provider that cannot run, growth and training.

    Shared, so only to be read.
    """
    made = tmp_path_factory.mktemp("results")
    losses, grid, steps = [], [], []
    for vocabulary in (1000, 50_000):
        problem = {"shape": f"model-{vocabulary}", "inputs": "recorded", "tokens": 64, "width": 16}
        problem |= {"vocabulary": vocabulary, "dtype": "float32", "status": "ok"}

        def row(provider, weighting, mode, times_g, extra):
            kind = {"provider": provider, "weighting": weighting, "mode": mode}
            figures = {"seconds": times_g / 2, "times_g": times_g, "extra_bytes": extra}
            losses.append(full(kind | problem | figures))  # noqa: B023

        row("1G", "", "", 1.0, 0)
        for place, weighting in enumerate(("plain", "bft")):
            row("eager", weighting, "both", 3.0 + 2 * place, 2**30)
            row(ODD, weighting, "both", 5.0, 2**28)
            row("bft sampled", weighting, "both", 1.2, 22 * 2**20)
            row("bft sampled", weighting, "forward", 1.1, 2**22)
        missing = {"provider": "quack", "weighting": "bft", "mode": "both"}
        reason = {"status": "unavailable", "reason": "needs a <GPU>"}
        losses.append(full(missing | problem | reason))
        for tokens in (64, 1024):
            sizes = {"tokens": tokens, "width": 16, "vocabulary": vocabulary}
            taken = (3e-9 + 2e-12 * tokens) * vocabulary * 16
            grid.append({"provider": "bft sampled", "dtype": "float32", **sizes, "seconds": taken})
    for place, loss in enumerate(("eager", "sampled", "liger")):
        step = {"loss": loss, "weighting": "bft", "mode": "full", "model": "tiny"}
        step |= {"batch": 4, "length": 256}
        parts = {f"{part}_seconds": 0.1 * (1 + n) + place for n, part in enumerate(PARTS)}
        empty = (*parts, "tokens_per_second", "peak_bytes", "limit_bytes", "largest_batch")
        step |= dict.fromkeys(empty, "") | {"reason": "takes no weights"}
        if loss == "liger":
            steps.append(step)
            continue
        step["reason"] = ""
        speed = {"tokens_per_second": 512 * (1 + place), "peak_bytes": 2**31}
        steps.append(step | parts | speed)
        steps += [
            step | {"batch": "", "limit_bytes": gib * 2**30, "largest_batch": gib * (place + 1)}
            for gib in (4, 16)
        ]
    for name, rows in {"loss": losses, "scale": grid, "train": steps}.items():
        append(made / f"{name}.csv", rows)
    return made
