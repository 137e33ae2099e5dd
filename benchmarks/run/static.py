"""``python -m benchmarks static``: compiles every shipped kernel without a GPU and judges it.

Each call of the Triton backend is rehearsed on meta tensors, with a driver that names a target and
has no device: kernels are compiled for the types, strides and constants of a real call, and never
launched. No value is read on the way, which also proves that the host never waits for the device.
nvcc, if there is one, compiles the kernels of ``csrc/cuda``.

A few forms of a kernel stand for the others (``compiled.chosen``); ``full`` compiles all.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from benchmarks.measure import compiled_cuda
from benchmarks.measure.compiled import TARGETS, Usage, compile_cases, in_eights
from benchmarks.results.loss_table import show

BUDGET = Path(__file__).parents[1] / "static_budget.json"
# Registers and bytes of shared memory by kernel and target: the most that a form takes.
Budget = dict[str, dict[str, list[int]]]


@dataclass(frozen=True)
class Config:
    """Fails where a kernel spills, lost its tensor-core instructions or grew past its budget."""

    targets: tuple[str, ...] = tuple(TARGETS)
    only: Literal["triton", "cuda"] | None = None
    """Only Triton's kernels, or only those of csrc/cuda."""
    full: bool = False
    """Compile all forms for all targets. Those that are not compiled otherwise have no budget, but
    may not spill either."""
    record: bool = False
    """Write the budget instead of comparing with it."""


def main(config: Config) -> None:
    """Compiles, prints and compares; SystemExit if a kernel spills or breaks its budget."""
    for target in config.targets:
        if target not in TARGETS:
            raise SystemExit(f"targets: got {target!r}, expected some of {', '.join(TARGETS)}")
    found: list[Usage] = []
    if config.only != "triton":
        found += _of_cuda(config)
    if config.only != "cuda":
        # In processes, because in threads Triton would compile one kernel at a time.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
            # The longest compilation first.
            targets = sorted(config.targets, key=lambda target: TARGETS[target].brief)
            jobs = [pool.submit(compile_cases, target, config.full) for target in targets]
            found += [usage for job in jobs for usage in job.result()]
    if found:
        _show(most(found), config.targets)
    budget: Budget = json.loads(BUDGET.read_text())
    if config.record:
        BUDGET.write_text(text_of(updated(budget, found)))
    elif wrong := complaints(found, budget):
        raise SystemExit("\n".join(wrong))
    else:
        print(f"{len(found)} kernels: none spills, all within their budget")


def _of_cuda(config: Config) -> list[Usage]:
    if missing := compiled_cuda.why_not():
        print(f"csrc/cuda is left out: {missing}")
        return []
    wanted = compiled_cuda.ALL if config.full else compiled_cuda.GATE
    return compiled_cuda.compile_sources([name for name in wanted if name in config.targets])


def most(found: Iterable[Usage]) -> Budget:
    """The most registers and shared memory that a form takes, among forms with a budget."""
    budget: Budget = {}
    for usage in found:
        if usage.budgeted:
            of_kernel = budget.setdefault(usage.key, {})
            registers, shared = of_kernel.get(usage.target, (0, 0))
            of_kernel[usage.target] = [max(registers, usage.registers), max(shared, usage.shared)]
    return budget


def updated(budget: Budget, found: list[Usage]) -> Budget:
    """The budget with new figures of the targets that were compiled."""
    compiled = {(usage.target, _is_cuda(usage.key)) for usage in found}
    new = most(found)
    merged = {}
    for key in sorted(budget.keys() | new.keys()):
        kept = {t: x for t, x in budget.get(key, {}).items() if (t, _is_cuda(key)) not in compiled}
        if figures := kept | new.get(key, {}):
            merged[key] = {target: figures[target] for target in TARGETS if target in figures}
    return merged


def _is_cuda(key: str) -> bool:
    return key.startswith(compiled_cuda.PREFIX)


def text_of(budget: Budget) -> str:
    """The budget as JSON, with a line for each kernel."""
    lines = [f" {json.dumps(key)}: {json.dumps(figures)}" for key, figures in budget.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def complaints(found: Iterable[Usage], budget: Budget) -> list[str]:
    """A line for each fault: a spill, a lost instruction, a broken budget."""
    wrong = []
    for usage in found:
        registers, shared = usage.registers, usage.shared
        takes = f"{registers} registers and {shared} shared bytes"
        faults = {
            f"spills {usage.spilled} bytes, expected 0": usage.spilled,
            "has no tensor-core instruction": usage.multiplies and not usage.tensor_core,
            f"no {usage.narrow} of 16 bytes at once": usage.narrow,
            f"does not fit a multiprocessor, with {takes}": not usage.fits,
        }
        allowed = budget.get(usage.key, {}).get(usage.target)
        if usage.budgeted and allowed is None:
            faults["has no budget; see --record"] = True
        elif usage.budgeted:
            more = in_eights(registers) > in_eights(allowed[0])
            faults[f"{registers} registers, expected {allowed[0]}"] = more
            faults[f"{shared} shared bytes, expected {allowed[1]}"] = shared > allowed[1]
        wrong += [f"{usage.name}: {what}" for what, is_so in faults.items() if is_so]
    return wrong


def _show(figures: Budget, targets: Iterable[str]) -> None:
    cells = [["kernel", *targets]]
    for key, of_kernel in sorted(figures.items()):
        taken = [of_kernel.get(target) for target in targets]
        cells.append([key, *(f"{x[0]}, {x[1] / 1024:.0f}" if x else "" for x in taken)])
    show("registers of a thread, KiB of shared memory of a program", cells, left=1)
