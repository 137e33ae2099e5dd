"""``python -m benchmarks static``: what the compiler makes of every shipped kernel, without a GPU.

Each call of the Triton backend is rehearsed on meta tensors, with a driver that names a target and
has no device: kernels are compiled for the types, strides and constants of a real call, and never
launched. That no value is read on the way also proves that the host never waits for the device.
"""

from __future__ import annotations

import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.compiled import TARGETS, Usage, compile_cases
from benchmarks.results import append, environment

BUDGET = Path(__file__).with_name("static_budget.json")
# How much worse than recorded a kernel may become: another compiler schedules a little differently.
TOLERANCE = 1.03


@dataclass(frozen=True)
class Config:
    """Registers, spills, tensor-core instructions and issue slots of every shipped kernel."""

    targets: tuple[str, ...] = tuple(TARGETS)
    check: bool = False
    """Fail where a kernel spills, lost its tensor-core instructions or grew past its budget."""
    record: bool = False
    """Write the budget that `check` compares with."""
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
    # A fresh process each: Triton keeps what it compiled by device, and has one target a process.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context, max_tasks_per_child=1) as pool:
        jobs = [pool.submit(compile_cases, target, config.peers) for target in config.targets]
        found = [usage for job in jobs for usage in job.result()]
    console = Console()
    console = console if console.is_terminal else Console(width=170)
    for target in config.targets:
        console.print(_table(target, [usage for usage in found if usage.target == target]))
    if config.output is not None:
        facts = environment("cpu")
        append(config.output, [asdict(usage) | facts for usage in found])
    ours = [usage for usage in found if not usage.peer]
    if config.record:
        BUDGET.write_text(json.dumps({u.key: u.issue_slots for u in ours}, indent=1) + "\n")
    if config.check:
        wrong = complaints(ours, json.loads(BUDGET.read_text()))
        if wrong:
            raise SystemExit("\n".join(wrong))
        console.print(f"{len(ours)} kernels: none spills, all within their budget")


def complaints(found: list[Usage], budget: dict[str, int]) -> list[str]:
    """What is not as it must be, a line each."""
    wrong = []
    for usage in found:
        if usage.spilled:
            wrong.append(f"{usage.key}: spills {usage.spilled} bytes, expected 0")
        if usage.multiplies and not usage.tensor_core:
            wrong.append(f"{usage.key}: has no tensor-core instruction")
        if not usage.blocks:
            wrong.append(
                f"{usage.key}: does not fit a multiprocessor, with {usage.registers} registers "
                f"and {usage.shared} shared bytes"
            )
        allowed = budget.get(usage.key)
        if allowed is None:
            wrong.append(f"{usage.key}: has no budget; see --record")
        elif usage.issue_slots > allowed * TOLERANCE:
            wrong.append(f"{usage.key}: {usage.issue_slots} issue slots, expected {allowed}")
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
        "slots",
        "/ MMA",
        "loop / MMA",
    )
    for name in columns:
        left = name in ("kernel", "loads")
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
            str(usage.issue_slots),
            f"{usage.epilogue:.1%}" if usage.epilogue is not None else "",
            f"{usage.loop:.0%}" if usage.loop else "",
        )
    return table
