"""``python -m benchmarks report``: one page of all results, which needs no other file."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from tyro.conf import Positional

from benchmarks.results.figures import Panel, ours, render, svg
from benchmarks.results.readings import (
    PARTS,
    RESULTS,
    WEIGHTINGS,
    Row,
    digits,
    finite,
    grouped,
    latest,
    number,
    read,
    result_folders,
    values,
)
from benchmarks.run.plot import (
    GIB,
    SCALED,
    TRAINED,
    fitted,
    growth_figures,
    loss_panel,
    losses,
    problem_details,
    problem_title,
    scaled_title,
    train_figures,
    trained_ours,
    trained_title,
)
from benchmarks.run.scale import predict

_MODES = {
    "both": "forward and both gradients",
    "frozen": "frozen head: forward and the gradient of the hidden states",
    "forward": "forward alone",
}
# Facts of a run, as rows tell them.
_FACTS = {
    "processor": "Processor",
    "device": "Device",
    "threads": "Threads",
    "torch": "torch",
    "bft-kernels": "bft-kernels",
    "python": "Python",
    "packages": "Packages",
    "triton": "triton",
    "cuda": "CUDA",
    "commit": "Commit",
    "load": "Load at the start",
    "repeats": "Timed turns",
}


@dataclass(frozen=True)
class Config:
    """A self-contained HTML page with tables and figures of one or several result folders."""

    folders: Positional[tuple[Path, ...]] = ()
    """With loss.csv, scale.csv or train.csv in them; all of benchmarks/results by default."""
    output: Path = RESULTS / "report.html"
    """The page."""


@dataclass(frozen=True)
class Table:
    """Text cells; columns without any are left out."""

    columns: list[str]
    lines: list[tuple[bool, list[str]]]  # whether it is ours, and its cells


@dataclass(frozen=True)
class Part:
    """A heading with figures and tables below it."""

    title: str
    figures: Sequence[Markup]
    tables: Sequence[tuple[str, Table]]
    folded: bool = False


def main(config: Config) -> None:
    """Writes the page.

    Raises:
        SystemExit: a folder without a CSV.
    """
    config.output.parent.mkdir(parents=True, exist_ok=True)
    config.output.write_text(page(result_folders(config.folders)), encoding="utf-8")
    print(config.output)


def page(folders: Sequence[Path]) -> str:
    """HTML."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    inline = Inline()
    machines = []
    for index, folder in enumerate(folders):
        rows = {name: read(folder / f"{name}.csv") for name in ("loss", "scale", "train")}
        machines.append(
            {
                "anchor": f"machine-{index}",
                "name": folder.name,
                "facts": facts([row for file in rows.values() for row in file], folder),
                "parts": [
                    *loss_parts(rows["loss"], inline),
                    *other_parts(rows["scale"], rows["train"], inline),
                ],
                "absent": absent(rows["loss"], rows["train"]),
            }
        )
    return environment.get_template("report.html.jinja").render(machines=machines)


class Inline:
    """Panels as SVG inside the page, each with identifiers of its own."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, panel: Panel) -> Markup:
        self.count += 1
        text = svg(render([panel]))
        text = text[text.index("<svg ") :]  # without the XML declaration
        text = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>f{self.count}-", text)
        words = f'<svg role="img" aria-label="{escape(panel.words)}" '
        return Markup(text.replace("<svg ", words, 1))


def facts(rows: Sequence[Row], folder: Path) -> dict[str, str]:
    """Machine and versions, with all values where a folder has several."""
    found = {title: ", ".join(values(rows, column)) for column, title in _FACTS.items()}
    loads = [float(load) for load in values(rows, "load")]
    if loads:
        found[_FACTS["load"]] = " to ".join(dict.fromkeys(f"{f(loads):.2f}" for f in (min, max)))
    recorded = folder / "environment.json"
    if recorded.exists():
        more = json.loads(recorded.read_text(encoding="utf-8"))
        found["Started"] = str(more.get("started", ""))
        found["Driver"] = str(more.get("nvidia_smi", {}).get("driver_version", ""))
        peers = more.get("peers", {}).items()
        found["Peers"] = ", ".join(f"{name} {version}" for name, version in peers)
    return {title: text for title, text in found.items() if text}


def kind_title(weighting: str, mode: str) -> str:
    """A weighting and a mode in words."""
    words = ", ".join(filter(None, (WEIGHTINGS.get(weighting, weighting), _MODES.get(mode, mode))))
    return f"Loss {words}" if words else "Loss"


def loss_parts(rows: Sequence[Row], inline: Inline) -> list[Part]:
    """A part for each weighting and mode; those that are not a step of training are folded."""
    parts: list[Part] = []
    for (weighting, mode), problems in losses(rows).items():
        panels = [panel for same in problems.values() if (panel := loss_panel(same))]
        tables = [
            (f"{problem_title(same[-1])}, {problem_details(same[-1])}", loss_table(same))
            for same in problems.values()
            if any(row.get("seconds") for row in same)
        ]
        if tables:
            folded = bool(parts) and mode != "both"
            title = kind_title(weighting, mode)
            parts.append(Part(title, [inline(panel) for panel in panels], tables, folded))
    return parts


def cells(rows: Sequence[Row], column: str, form: Callable[[float], str] = digits) -> list[str]:
    """A column of figures; empty where there is none."""
    found = (number(row, column) for row in rows)
    return ["" if value is None else form(value) for value in found]


def table(columns: Mapping[str, Sequence[str]], own: Sequence[bool]) -> Table:
    """A table of its columns, without the empty ones."""
    full = {name: texts for name, texts in columns.items() if any(texts)}
    lines = [list(line) for line in zip(*full.values(), strict=True)]
    return Table(list(full), list(zip(own, lines, strict=True)))


def loss_table(rows: Sequence[Row]) -> Table:
    """What was timed on one problem, the fastest first."""
    timed = sorted(
        (row for row in rows if row.get("seconds")), key=lambda row: number(row, "seconds") or 0.0
    )

    def percent(value: float) -> str:
        return f"{value:.1%}"

    def tokens_per_second(row: Row) -> str:
        taken = number(row, "seconds") or 0.0
        return f"{float(row['tokens']) / taken:,.0f}" if row["provider"] != "1G" else ""

    return table(
        {
            "": [row["provider"] for row in timed],
            "x G": cells(timed, "times_g", "{:.2f}".format),
            "seconds": cells(timed, "seconds"),
            "spread": cells(timed, "spread", percent),
            "tokens/s": [tokens_per_second(row) for row in timed],
            "extra MiB": cells(timed, "extra_bytes", lambda v: f"{v / 2**20:,.0f}"),
            "Gflop/s": cells(timed, "flops_per_second", lambda v: digits(v / 1e9)),
            "GB/s": cells(timed, "bytes_per_second", lambda v: digits(v / 1e9)),
            "error of dH": cells(timed, "error_hidden", "{:.1e}".format),
            "error of dW": cells(timed, "error_weight", "{:.1e}".format),
            "note": [_note(row) for row in timed],
        },
        [ours(row["provider"]) for row in timed],
    )


def _note(row: Row) -> str:
    """What `gpu` says of a result that is not right."""
    status = row.get("status", "")
    return "" if status in ("", "ok") else f"{status}: {row.get('reason', '')}"


def other_parts(scale: Sequence[Row], train: Sequence[Row], inline: Inline) -> list[Part]:
    """Growth, steps and largest batches."""
    figures = (growth_figures(scale) if scale else {}) | train_figures(train)
    parts = {
        "scale": ("Growth with tokens and vocabulary", scale_tables(scale)),
        "train": ("A step of fine-tuning", step_tables(train)),
        "parts": ("Where a step's time goes", []),
        "batch": ("Largest batch that fits", batch_tables(train)),
    }
    return [
        Part(title, [inline(panel) for panel in figures[name]], tables)
        for name, (title, tables) in parts.items()
        if name in figures
    ]


def scale_tables(rows: Sequence[Row]) -> list[tuple[str, Table]]:
    """Seconds beside the bare product and beside the fitted line, a table a provider."""
    found = []
    for same in grouped(rows, *SCALED).values():
        timed = latest(same, "tokens", "width", "vocabulary")
        columns = {
            name: [f"{int(row[column]):,}" for row in timed]
            for name, column in (("N", "tokens"), ("V", "vocabulary"), ("D", "width"))
        }
        columns["seconds"] = cells(timed, "seconds")
        columns["x bare product"] = ratios(timed, "seconds", "bare_product_seconds", "{:.2f}")
        # The column of the CSV is of each run's own fit; rows may be of several runs.
        shapes, times, line = fitted(timed)
        if line is not None:
            expected = [predict(shape, *line) for shape in shapes]
            columns["fitted seconds"] = [digits(value) for value in expected]
            columns["over fitted"] = [
                f"{taken / value:.2f}" for taken, value in zip(times, expected, strict=True)
            ]
        found.append((scaled_title(same[0]), table(columns, [False] * len(timed))))
    return found


def ratios(rows: Sequence[Row], over: str, under: str, form: str) -> list[str]:
    """One column over another; empty where either is."""
    pairs = ((number(row, over), number(row, under)) for row in rows)
    return [form.format(a / b) if a is not None and b else "" for a, b in pairs]


def step_tables(rows: Sequence[Row]) -> list[tuple[str, Table]]:
    """Steps of fine-tuning, a table a model, mode and weighting, the fastest first."""
    timed = [row for row in rows if finite(number(row, "tokens_per_second"))]
    found = []
    for same in grouped(timed, *TRAINED, "batch").values():
        ranked = sorted(
            latest(same, "loss"),
            key=lambda row: -(number(row, "tokens_per_second") or 0.0),
        )
        columns = {
            "": [row["loss"] for row in ranked],
            "tokens/s": cells(ranked, "tokens_per_second"),
            "seconds": cells(ranked, "seconds"),
            "spread": cells(ranked, "spread", "{:.1%}".format),
            **parts_columns(ranked),
            "peak GiB": cells(ranked, "peak_bytes", lambda v: f"{v / GIB:.2f}"),
        }
        title = f"{trained_title(same[0])}, batch {same[0]['batch']} x {same[0]['length']} tokens"
        found.append((title, table(columns, [trained_ours(row) for row in ranked])))
    return found


def parts_columns(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Seconds of the parts of a step."""
    return {part.replace("_", ", "): cells(rows, f"{part}_seconds") for part in PARTS}


def batch_tables(rows: Sequence[Row]) -> list[tuple[str, Table]]:
    """Largest batches, a table a model, mode and weighting, a column a limit."""
    tried = [row for row in rows if finite(number(row, "largest_batch"))]
    found = []
    for same in grouped(tried, *TRAINED).values():
        same = latest(same, "loss", "limit_bytes")
        names = {row["loss"]: trained_ours(row) for row in same}
        columns = {"": list(names)}
        for limit in sorted({number(row, "limit_bytes") or 0.0 for row in same}):
            fits = {
                row["loss"]: digits(number(row, "largest_batch") or 0.0)
                for row in same
                if (number(row, "limit_bytes") or 0.0) == limit
            }
            columns[f"{limit / GIB:g} GiB"] = [fits.get(name, "") for name in names]
        title = f"{trained_title(same[0])}, sequences of {same[0]['length']} tokens"
        found.append((title, table(columns, list(names.values()))))
    return found


def absent(loss: Sequence[Row], train: Sequence[Row]) -> Table:
    """Who could not run, where, and why."""
    found: dict[tuple[str, str], list[str]] = {}
    rows = [row for row in loss if row["provider"] != "1G"]
    missing = [row for row in rows if not row.get("seconds")]
    for (provider, status, reason), same in grouped(
        missing, "provider", "status", "reason"
    ).items():
        why = ": ".join(filter(None, (status, reason)))
        found.setdefault((provider, why), []).append(_where(same, rows))
    for row in train:
        if row.get("reason") and not row.get("largest_batch"):
            where = f"fine-tuning, {trained_title(row)}"
            found.setdefault((row["loss"], row["reason"]), []).append(where)
    return table(
        {
            "": [name for name, _ in found],
            "why": [why for _, why in found],
            "where": ["; ".join(dict.fromkeys(places)) for places in found.values()],
        },
        [ours(name) for name, _ in found],
    )


def _where(some: Sequence[Row], rows: Sequence[Row]) -> str:
    """What tells these rows from all: weighting, mode and problem."""
    told: tuple[Callable[[Row], str], ...] = (
        lambda row: WEIGHTINGS.get(row.get("weighting", ""), row.get("weighting", "")),
        lambda row: row.get("mode", ""),
        problem_title,
    )
    parts = []
    for tell in told:
        here = dict.fromkeys(tell(row) for row in some)
        if set(here) != {tell(row) for row in rows}:
            parts.append(" and ".join(here))
    return ", ".join(parts) or "everywhere"
