"""Result folders: an empty one, and a made-up one."""

import pytest

from benchmarks.results.folder import Folder
from benchmarks.results.schema import PARTS, STEP_COLUMNS, append, full

# With what HTML, TeX and CSV would take for their own.
ODD = 'odd <b>&"$x$, loss'


@pytest.fixture
def run(tmp_path):
    """An empty folder of a run on a CPU."""
    return Folder(tmp_path / "results", "cpu")


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Of two vocabularies, two weightings, a provider that cannot run, growth and training.

    Shared, so only to be read.
    """
    made = tmp_path_factory.mktemp("results")
    losses, grid, steps = [], [], []
    columns = ("provider", "weighting", "mode", "seconds", "times_g", "extra_bytes")
    for vocabulary in (1000, 50_000):
        sizes = {"tokens": 64, "width": 16, "vocabulary": vocabulary, "dtype": "float32"}
        problem = sizes | {"shape": f"model-{vocabulary}", "inputs": "recorded", "status": "ok"}
        figures = [("1G", "", "", 0.5, 1.0, 0)]
        for weighting, times_g in (("plain", 3.0), ("bft", 5.0)):
            figures += [
                ("eager", weighting, "both", 1.5, times_g, 2**30),
                (ODD, weighting, "both", 2.5, 5.0, 2**28),
                ("bft sampled", weighting, "both", 0.6, 1.2, 22 * 2**20),
                ("bft sampled", weighting, "forward", 0.55, 1.1, 2**22),
            ]
        losses += [full(problem | dict(zip(columns, one, strict=True))) for one in figures]
        missing = {"provider": "quack", "weighting": "bft", "mode": "both"}
        reason = {"status": "unavailable", "reason": "needs a <GPU>"}
        losses.append(full(problem | missing | reason))
        for tokens in (64, 1024):
            taken = (3e-9 + 2e-12 * tokens) * vocabulary * 16
            row = sizes | {"tokens": tokens, "seconds": taken}
            grid.append({"provider": "bft sampled"} | row)
    empty = dict.fromkeys(STEP_COLUMNS, "") | {"batch": 4, "length": 256}
    for place, loss in enumerate(("eager", "sampled", "liger")):
        step = empty | {"loss": loss, "weighting": "bft", "mode": "full", "model": "tiny"}
        if loss == "liger":
            steps.append(step | {"reason": "takes no weights"})
            continue
        parts = {f"{part}_seconds": 0.1 * (1 + n) + place for n, part in enumerate(PARTS)}
        speed = {"tokens_per_second": 512 * (1 + place), "peak_bytes": 2**31}
        steps.append(step | parts | speed)
        steps += [
            step | {"batch": "", "limit_bytes": gib * 2**30, "largest_batch": gib * (place + 1)}
            for gib in (4, 16)
        ]
    for name, rows in {"loss": losses, "scale": grid, "train": steps}.items():
        append(made / f"{name}.csv", rows)
    return made
