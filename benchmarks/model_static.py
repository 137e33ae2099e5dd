"""What the compiler made of the kernels that the model needs: an input of it, like the ceilings."""

from __future__ import annotations

import json
import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure.compiled import TARGETS, disassemble, loops_of, usage_of

MODELLED = ("sm_80", "sm_90", "sm_100")
COMPILED = Path(__file__).with_name("model_static.json")
# Switches that make another kernel of the same source.
SWITCHES = ("EMIT", "SAMPLED", "POPULAR", "VALUES", "HAS_VALUES")


@dataclass(frozen=True)
class Compiled:
    """One kernel for one target."""

    slots: int  # instructions outside the products' loop, of a warp and tile
    outer: int  # instructions of its longest loop
    inner: int  # of which in the longest loop inside that; 0 where there is none
    warps: int
    resident: int  # programs that a multiprocessor holds
    block: dict[str, int]  # sizes of a tile

    @property
    def tile(self) -> tuple[int, int]:
        """Rows and columns of a tile of logits."""
        return self.block.get("BLOCK_N", self.block.get("BLOCK_B", 0)), self.block["BLOCK_V"]


@cache
def _load() -> dict[str, dict[str, Compiled]]:
    known = json.loads(COMPILED.read_text())
    return {
        target: {name: Compiled(**values) for name, values in kernels.items()}
        for target, kernels in known.items()
    }


def compiled(target: str, kernel: str) -> Compiled:
    """Figures of ``kernel``, named by its function and its switches."""
    return _load()[target][kernel]


def record() -> None:
    """Compiles for every target and writes the file. Needs Triton and cut-cross-entropy."""
    # A fresh process each: Triton has one target a process.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        found = {target: pool.submit(_compile, target) for target in MODELLED}
        known = {target: job.result() for target, job in found.items()}
    COMPILED.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


def _compile(name: str) -> dict[str, dict[str, Any]]:
    from benchmarks.measure.compiled import compiling
    from benchmarks.measure.rehearsal import PEER_CASES, ours

    with compiling(TARGETS[name]) as found:
        ours(torch.bfloat16)
        PEER_CASES["cut-cross-entropy bf16"]()
    kernels: dict[str, Compiled] = {}
    for kernel, constants, binary in found:
        switches = [key.lower().removeprefix("has_") for key in SWITCHES if constants.get(key)]
        key = " ".join([kernel.strip("_").removesuffix("_kernel"), *switches])
        figures = _figures(name, key, constants, binary)
        # Of forms with and without statistics, the shorter.
        if key not in kernels or figures.slots < kernels[key].slots:
            kernels[key] = figures
    return {key: asdict(figures) for key, figures in kernels.items()}


def _figures(name: str, key: str, constants: dict[str, Any], binary: Any) -> Compiled:
    usage = usage_of(name, TARGETS[name], key, False, constants, binary)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(binary.asm["cubin"])
        code = disassemble(cubin)
    loops = loops_of(code)

    def size(loop: tuple[int, int]) -> int:
        return sum(loop[0] <= address <= loop[1] for address, _ in code)

    longest = max(loops, key=size, default=(0, -1))
    within = [loop for loop in loops if longest[0] < loop[0] and loop[1] < longest[1]]
    return Compiled(
        slots=usage.issue_slots,
        outer=size(longest),
        inner=max(map(size, within), default=0),
        warps=usage.warps,
        resident=usage.blocks,
        block={k: v for k, v in constants.items() if k.startswith("BLOCK")},
    )
