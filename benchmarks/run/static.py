"""``python -m benchmarks static``: what the compiler makes of every shipped kernel, without a GPU.

Each call of the Triton backend is rehearsed on meta tensors, with a driver that names a target and
has no device: kernels are compiled for the types, strides and constants of a real call, and never
launched. That no value is read on the way also proves that the host never waits for the device.
The kernels of ``csrc/cuda`` are compiled by nvcc, where there is one.
"""

from __future__ import annotations

import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from benchmarks.measure import compiled_cuda
from benchmarks.measure.compiled import TARGETS, Usage, compile_cases
from benchmarks.results.schema import append, environment

BUDGET = Path(__file__).parents[1] / "static_budget.json"
# How much worse than recorded a kernel may become: another compiler schedules a little differently.
TOLERANCE = 1.03


@dataclass(frozen=True)
class Config:
    """Registers, spills, tensor-core instructions and issue slots of every shipped kernel."""

    targets: tuple[str, ...] = tuple(TARGETS)
    only: Literal["triton", "cuda"] | None = None
    """Only Triton's kernels, or only those of csrc/cuda."""
    check: bool = False
    """Fail where a kernel spills, lost its tensor-core instructions or wide loads, or grew past
    its budget."""
    record: bool = False
    """Write what was compiled to the budget that `check` compares with."""
    peers: bool = True
    """Also the kernels of Liger-Kernel and cut-cross-entropy, where they are installed."""
    output: Path | None = None
    """Append long-form CSV here."""


def main(config: Config) -> None:
    """Compiles, prints and compares.

    Raises:
        SystemExit: an unknown target, or, with ``check``, a kernel that is not as it must be.
    """
    for target in config.targets:
        if target not in TARGETS:
            raise SystemExit(f"targets: got {target!r}, expected some of {', '.join(TARGETS)}")
    found: list[Usage] = []
    missing = compiled_cuda.why_not()
    if config.only != "triton" and missing:
        print(f"csrc/cuda is left out: {missing}")
    elif config.only != "triton":
        found += compiled_cuda.compile_sources(config.targets)
    if config.only != "cuda":
        # A fresh process each: Triton keeps what it compiled by device, and has one target a
        # process.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(2, mp_context=context, max_tasks_per_child=1) as pool:
            jobs = [pool.submit(compile_cases, target, config.peers) for target in config.targets]
            found += [usage for job in jobs for usage in job.result()]
    console = Console()
    console = console if console.is_terminal else Console(width=170)
    for target in config.targets:
        if rows := [usage for usage in found if usage.target == target]:
            console.print(_table(target, rows))
    if config.output is not None and found:
        facts = environment("cpu")
        append(config.output, [asdict(usage) | facts for usage in found])
    ours = [usage for usage in found if not usage.peer]
    if config.record:
        BUDGET.write_text(_updated(json.loads(BUDGET.read_text()), ours))
    if config.check:
        wrong = complaints(ours, json.loads(BUDGET.read_text()))
        if wrong:
            raise SystemExit("\n".join(wrong))
        console.print(f"{len(ours)} kernels: none spills, all within their budget")


def _is_cuda(key: str) -> bool:
    """Whether the key of a budget names a kernel of csrc/cuda."""
    return key.partition(" ")[2].startswith(compiled_cuda.PREFIX)


def _budget_of(usage: Usage) -> Any:
    """What is recorded: issue slots, and where nvcc chooses the registers, these and the memory."""
    if not _is_cuda(usage.key):
        return usage.issue_slots
    return {"slots": usage.issue_slots, "registers": usage.registers, "shared": usage.shared}


def _updated(budget: dict[str, Any], found: list[Usage]) -> str:
    """The text of the budget: of what was compiled the new one, of others what it was."""
    compiled = {(usage.target, _is_cuda(usage.key)) for usage in found}
    kept = {k: v for k, v in budget.items() if (k.partition(" ")[0], _is_cuda(k)) not in compiled}
    kept |= {usage.key: _budget_of(usage) for usage in found}
    return (
        "{\n" + ",\n".join(f" {json.dumps(k)}: {json.dumps(v)}" for k, v in kept.items()) + "\n}\n"
    )


def complaints(found: list[Usage], budget: dict[str, Any]) -> list[str]:
    """What is not as it must be, a line each."""
    wrong = []
    for usage in found:
        if usage.spilled:
            wrong.append(f"{usage.key}: spills {usage.spilled} bytes, expected 0")
        if usage.multiplies and not usage.tensor_core:
            wrong.append(f"{usage.key}: has no tensor-core instruction")
        if usage.copied and "128" not in usage.copies.split("/"):
            wrong.append(f"{usage.key}: copies nothing asynchronously, 16 bytes at once")
        if usage.wide and "128" not in usage.loads.split("/"):
            wrong.append(f"{usage.key}: loads {usage.loads} bits at once, expected 128 among them")
        if not usage.blocks:
            wrong.append(
                f"{usage.key}: does not fit a multiprocessor, with {usage.registers} registers "
                f"and {usage.shared} shared bytes"
            )
        allowed = budget.get(usage.key)
        if allowed is None:
            wrong.append(f"{usage.key}: has no budget; see --record")
            continue
        if not isinstance(allowed, dict):
            allowed = {"slots": allowed}
        if usage.issue_slots > allowed["slots"] * TOLERANCE:
            wrong.append(
                f"{usage.key}: {usage.issue_slots} issue slots, expected {allowed['slots']}"
            )
        for what, amount in (("registers", usage.registers), ("shared", usage.shared)):
            if amount > allowed.get(what, amount):
                wrong.append(f"{usage.key}: {amount} {what}, expected {allowed[what]}")
    return wrong


def _table(target: str, found: list[Usage]) -> Table:
    table = Table(title=target)
    columns = (
        "kernel",
        "regs",
        "spill",
        "smem",
        "blocks/SM",
        "MMA",
        "loads",
        "copies",
        "slots",
        "/ MMA",
        "loop / MMA",
    )
    for name in columns:
        left = name in ("kernel", "loads", "copies")
        table.add_column(name, justify="left" if left else "right", no_wrap=True)
    for usage in found:
        table.add_row(
            usage.name,
            str(usage.registers),
            str(usage.spilled),
            str(usage.shared),
            str(usage.blocks),
            str(usage.tensor_core),
            usage.loads,
            usage.copies,
            str(usage.issue_slots),
            f"{usage.epilogue:.1%}" if usage.epilogue is not None else "",
            f"{usage.loop:.0%}" if usage.loop else "",
        )
    return table
