"""What a comparison leaves: compare.json, items.parquet, table.md and figures."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
import pandas as pd
from rich.console import Console

from bft.metrics import naming
from bft.study.arms import Arm, contrasts
from bft.study.statistics import POWER, Difference, Matrix, differences

matplotlib.use("Agg")
import matplotlib.pyplot as plt

if TYPE_CHECKING:
    from bft.study.compare import Study

logger = logging.getLogger(__name__)

# Columns of items that are no metric of a model.
_NO_METRIC = ("arm", "scheme", "window", "start", "seed", "id", "tokens", "majority")
TESTED = ("accuracy", "nll")  # metrics whose contrasts are tested; the first that is there is drawn
Tuned = dict[Arm, list[dict[str, Any]]]


def write(
    study: Study, tuned: Tuned, done: dict[tuple[Arm, int], dict[str, Any]], tested: dict[str, Any]
) -> dict[str, Any]:
    """Writes all files into the output folder; returns what compare.json holds."""
    from bft.study.compare import best, command_line, write_whole

    folder = study.config.output_dir
    items, left_out = paired(study, frame(tested["models"]))
    metrics = [name for name in items.columns if name not in _NO_METRIC]
    found = {
        metric: named(study, items, metric) for metric in TESTED if metric in metrics
    }  # of each contrast
    forgotten = {key: scored["forgetting"] for key, scored in tested["models"].items()}
    arms = {
        arm.name: {
            "scheme": arm.scheme,
            "window": arm.window,
            "start": arm.start,
            "learning_rate": best(tuned[arm]),
            "tried": tuned[arm],
            "at_the_edge": at_the_edge(study, tuned[arm]),
            "test": means(items[items["arm"] == arm.name], metrics),
            "forgetting": [forgotten[arm, seed] for seed in range(study.config.seeds)],
            "seconds": sum(done[arm, seed]["seconds"] for seed in range(study.config.seeds)),
        }
        for arm in study.arms
    }
    floors = {name: means(items[items["arm"] == name], metrics) for name in ("untrained", "start")}
    if "majority" in items.columns:
        one = items[items["arm"] == "untrained"]
        floors["commonest answer"] = {"accuracy": {"mean": float(one["majority"].mean())}}
    result = {
        "command": command_line(),
        "identity": study.plan["identity"],
        "steps": study.steps,
        "seeds": study.config.seeds,
        "items": int(items["id"].nunique()),
        "left_out": left_out,
        "test.jsonl (contents)": tested["digest"],
        "arms": arms,
        "floors": {name: floor for name, floor in floors.items() if floor},
        "forgetting": {name: forgotten.get(name) for name in ("untrained", "start")},
        "contrasts": {name: [one.to_dict() for one in rows] for name, rows in found.items()},
    }
    write_whole(folder / "compare.json", result)
    partial = folder / ".items.parquet.partial"
    with naming(partial):
        items.to_parquet(partial, index=False)
        os.replace(partial, folder / "items.parquet")
    lines = table(study, result, metrics)
    with naming(folder / "table.md"):
        (folder / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    draw_forest(found, folder / "forest.png")
    draw_curves(study, folder / "curves.png")
    if study.config.forgetting_file is not None:
        draw_forgetting(result, metrics, folder / "forgetting.png")
    console = Console()
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
    console.print(f"written to {folder}", markup=False)
    return result


# --- numbers -------------------------------------------------------------------------------------


def frame(models: dict[Any, dict[str, Any]]) -> pd.DataFrame:
    """A row for each model and item; ``seed`` is missing where there is none."""
    rows = []
    for key, scored in models.items():
        arm, seed = key if isinstance(key, tuple) else (None, None)
        name = key if arm is None else arm.name
        of = [] if arm is None else [arm.scheme, arm.window, arm.start]
        scheme, window, start = of or (None, None, None)
        known = {"arm": name, "scheme": scheme, "window": window, "start": start, "seed": seed}
        rows += [known | row for row in scored["rows"]]
    return pd.DataFrame(rows).astype({"window": "Int64", "seed": "Int64"})


def paired(study: Study, items: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    """The items that every run scored, with finite numbers; and how many others there were."""
    models = items.groupby(["arm", "seed"], dropna=False).ngroups
    whole = items.groupby("id")["nll"].agg(lambda nll: np.isfinite(nll.astype(float)).sum())
    kept = whole.index[whole == models]
    if not len(kept):
        raise ValueError(f"{study.config.file('test')}: no item has finite numbers of every run")
    if left := len(whole) - len(kept):
        logger.warning("%d of %d items are left out: a run has no finite nll", left, len(whole))
    return items[items["id"].isin(kept)].reset_index(drop=True), left


def matrix(items: pd.DataFrame, arm: str, metric: str) -> Matrix:
    """A metric of an arm, ``[S, N]``."""
    values = items[items["arm"] == arm].pivot(index="seed", columns="id", values=metric)
    return values.sort_index(axis=0).sort_index(axis=1).to_numpy(dtype=np.float64)


def named(study: Study, items: pd.DataFrame, metric: str) -> list[Difference]:
    """The named contrasts of a metric."""
    pairs = [
        (a.name, b.name, matrix(items, a.name, metric), matrix(items, b.name, metric))
        for a, b in contrasts(study.arms)
    ]
    return differences(pairs, draws=study.config.bootstrap)


def means(items: pd.DataFrame, metrics: Sequence[str]) -> dict[str, Any]:
    """Of each metric the mean over items and seeds, and that of each seed."""
    seeds = items.groupby("seed")[list(metrics)].mean() if items["seed"].notna().any() else None
    return {
        name: {"mean": float(items[name].mean())}
        | ({} if seeds is None else {"seeds": [float(value) for value in seeds[name]]})
        for name in metrics
        if len(items)
    }


def at_the_edge(study: Study, tried: list[dict[str, Any]]) -> bool:
    """Whether the best rate is the lowest or the highest that could be tried."""
    from bft.study.compare import best

    return best(tried) in (study.config.learning_rates[0], study.config.learning_rates[-1])


# --- the table -----------------------------------------------------------------------------------


def table(study: Study, result: dict[str, Any], metrics: Sequence[str]) -> list[str]:
    """table.md, line by line."""
    config = study.config
    lines = [
        f"`{result['command']}`",
        "",
        f"{config.model}; {result['steps']} steps; {result['seeds']} seeds; {result['items']} test "
        f"items ({result['left_out']} left out). Means over items and seeds; in brackets the "
        "lowest and the highest seed.",
        "",
        *_row("arm", "rate", *metrics, "forgetting", "minutes"),
        "|---|---:|" + "---:|" * (len(metrics) + 2),
    ]
    for name, arm in result["arms"].items():
        rate = f"{arm['learning_rate']:g}" + ("*" if arm["at_the_edge"] else "")
        cells = [_mean(arm["test"][metric]) for metric in metrics]
        lost = [_number(_average(arm["forgetting"]))]
        lines += _row(name, rate, *cells, *lost, f"{arm['seconds'] / 60:.1f}")
    for name, floor in result["floors"].items():
        cells = [_mean(floor[metric]) if metric in floor else "" for metric in metrics]
        lines += _row(name, "", *cells, _number(result["forgetting"].get(name)), "")
    if any(arm["at_the_edge"] for arm in result["arms"].values()):
        lines += ["", "\\* The lowest or highest rate that could be tried: a better one may exist."]
    for metric, rows in result["contrasts"].items():
        lines += ["", f"{metric}: differences, paired by seed and item", ""]
        lines += _row("contrast", "difference", "95% interval", "p (Holm)", "detectable", "")
        lines += ["|---|---:|---:|---:|---:|---|"]
        for row in rows:
            interval = f"[{row['low']:+.3f}, {row['high']:+.3f}]"
            numbers = (f"{row['mean']:+.3f}", interval, f"{row['p_holm']:.4f}")
            name = f"{row['a']} − {row['b']}"
            lines += _row(name, *numbers, _number(row["detectable"]), row["says"])
    lines += [
        "",
        f"Detectable: the difference that {POWER:.0%} of such studies would tell from 0, if it "
        "were the only contrast."
        + (" With one seed, intervals are over items only." if result["seeds"] == 1 else ""),
    ]
    return lines


def _row(*cells: str) -> list[str]:
    return ["| " + " | ".join(cells) + " |"]


def _mean(values: dict[str, Any]) -> str:
    seeds = values.get("seeds", [])
    spread = f" ({min(seeds):.3f}–{max(seeds):.3f})" if len(seeds) > 1 else ""
    return f"{values['mean']:.3f}{spread}"


def _average(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _number(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.3f}"


# --- figures -------------------------------------------------------------------------------------


def draw_forest(found: dict[str, list[Difference]], path: Path) -> None:
    """The differences of the first metric, with intervals and what could have been detected."""
    metric, rows = next(iter(found.items()))
    figure, axes = plt.subplots(figsize=(8, 1.4 + 0.35 * len(rows)), layout="constrained")
    for place, row in enumerate(reversed(rows)):
        axes.plot([-row.detectable, row.detectable], [place, place], color="0.85", lw=9, zorder=0)
        axes.plot([row.low, row.high], [place, place], color="C0")
        axes.plot([row.mean], [place], "o", color="C0")
    axes.set_yticks(range(len(rows)), [f"{row.a} − {row.b}" for row in reversed(rows)])
    axes.axvline(0, color="black", lw=0.8)
    axes.set_xlabel(f"difference in {metric}, 95% interval; grey: not detectable")
    _save(figure, path)


def draw_curves(study: Study, path: Path) -> None:
    """The NLL of a label in training, not weighted: a line an arm, the mean over seeds."""
    from bft.study.compare import step_rows

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for arm in study.arms:
        runs = [step_rows(study.folder(arm, seed)) for seed in range(study.config.seeds)]
        steps = [row["step"] for row in runs[0]]
        nll = np.array([[row["nll"] for row in run] for run in runs], dtype=np.float64)
        axes.plot(steps, nll.mean(0), label=arm.name)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("nll of a training label (nats)")
    axes.legend(fontsize=8)
    _save(figure, path)


def draw_forgetting(result: dict[str, Any], metrics: Sequence[str], path: Path) -> None:
    """What was learned against what was forgotten: a point an arm."""
    metric = next(name for name in TESTED if name in metrics)
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    points = {
        name: (_average(arm["forgetting"]), arm["test"][metric]["mean"])
        for name, arm in result["arms"].items()
    }
    for name in ("untrained", "start"):
        if name in result["floors"]:
            points[name] = (result["forgetting"][name], result["floors"][name][metric]["mean"])
    for place, (name, (lost, learned)) in enumerate(points.items()):
        marker = "ovs<D>p*"[place // 10 % 8]  # ten colours each
        axes.plot([lost or math.nan], [learned], marker, label=name)
    figure.legend(loc="outside right upper", fontsize=8)
    axes.set_xlabel("nll of a label of other text (nats)")
    axes.set_ylabel(f"test {metric}")
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    with naming(path):
        figure.savefig(path, dpi=120)
    plt.close(figure)
