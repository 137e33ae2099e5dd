"""Compiles kernels for a target that is not here, and reads what the compiler produced."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Target:
    """A GPU as far as these figures need it."""

    backend: str
    arch: int | str
    warp: int
    registers: int  # of a multiprocessor, 32 bits each
    shared: int  # bytes of a multiprocessor
    warps: int  # that a multiprocessor holds
    schedulers: int  # warp instructions it issues a cycle
    multiply_adds: int  # dense bfloat16, a cycle and multiprocessor


# NVIDIA's tuning guides; the rate from peak flop/s, multiprocessors and boost clock.
TARGETS = {
    "sm_80": Target("cuda", 80, 32, 65536, 164 * 1024, 64, 4, 1024),
    "sm_90": Target("cuda", 90, 32, 65536, 228 * 1024, 64, 4, 2048),
    "sm_100": Target("cuda", 100, 32, 65536, 228 * 1024, 64, 4, 4096),
}
# Instructions of a warp or warpgroup that multiply matrices.
_MMA = re.compile(r"\b(?:UTC\w*MMA|HGMMA|HMMA|QGMMA|IMMA)\b")


@dataclass(frozen=True)
class Usage:
    """What one compiled kernel takes."""

    target: str
    name: str  # the kernel and what distinguishes this form of it
    peer: bool
    multiplies: bool  # whether its source has a matrix product
    registers: int  # of a thread
    spilled: int  # bytes of local memory of a thread
    shared: int  # bytes of a program
    warps: int
    blocks: int  # programs a multiprocessor holds at once
    tensor_core: int  # instructions
    loads: str  # widths of loads from global memory, bits
    instructions: int
    issue_slots: int  # outside the main loop, a warp and tile
    epilogue: float | None  # cycles to issue them, of the main loop's tensor-core cycles

    @property
    def key(self) -> str:
        """Names the kernel in the budget."""
        return f"{self.target} {self.name}"


class _NoDevice:
    """A Triton driver that names a target and has nothing to launch on."""

    def __init__(self, target: Target) -> None:
        self.target = target

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget(self.target.backend, self.target.arch, self.target.warp)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


@contextmanager
def compiling(target: Target) -> Iterator[list[tuple[str, dict[str, Any], Any]]]:
    """Kernels that are launched inside are compiled, listed with their constants, and not run."""
    import triton
    from triton.runtime.jit import JITFunction

    found: list[tuple[str, dict[str, Any], Any]] = []
    launch = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = launch(self, *args, grid=grid, warmup=True, **kwargs)
        assert compiled.metadata.target.arch == target.arch, "compiled for another target before"
        constants = {k: v for k, v in kwargs.items() if k.isupper()}
        if all(compiled is not known for _, _, known in found):
            found.append((self.fn.__name__, constants, compiled))
        return compiled

    triton.runtime.driver.set_active(_NoDevice(target))
    JITFunction.run = run
    try:
        yield found
    finally:
        JITFunction.run = launch


def compile_cases(name: str, peers: bool) -> list[Usage]:
    """Every form of every kernel for one target."""
    from benchmarks.rehearsal import CASES, PEER_CASES

    target = TARGETS[name]
    usages: dict[str, Usage] = {}

    def collect(label: str, case: Callable[[], None], peer: bool) -> None:
        with compiling(target) as found:
            case()
        for kernel, constants, compiled in found:
            form = _form(kernel, constants, label)
            usages.setdefault(form, usage_of(name, target, form, peer, constants, compiled))

    for label, case in CASES.items():
        collect(label, case, peer=False)
    if peers:
        for label, case in PEER_CASES.items():
            try:
                collect(label, case, peer=True)
            except Exception as failure:  # a peer that is not there, or does not compile
                print(f"{name}: {label}: {type(failure).__name__}: {failure}")
    return list(usages.values())


def _form(kernel: str, constants: dict[str, Any], label: str) -> str:
    """The kernel, its switches that are on, and the case."""
    switches = [k.lower() for k, v in constants.items() if v is True]
    return " ".join([kernel.strip("_").removesuffix("_kernel"), label, *switches])


def usage_of(
    name: str, target: Target, form: str, peer: bool, constants: dict[str, Any], compiled: Any
) -> Usage:
    """What one compiled kernel takes, read from its machine code."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        resources = _cuobjdump("-res-usage", cubin)
        code = disassemble(cubin)
    registers = int(re.findall(r"REG:(\d+)", resources)[-1])
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    loads = {_width(text) for _, text in code if text.startswith("LDG") or " LDG" in text}
    slots = outside_main_loop(code)
    return Usage(
        target=name,
        name=form,
        peer=peer,
        multiplies="tt.dot" in compiled.asm["ttir"],
        registers=registers,
        spilled=int(re.findall(r"STACK:(\d+)", resources)[-1]),
        shared=shared,
        warps=warps,
        blocks=_blocks(target, registers, shared, warps),
        tensor_core=sum(bool(_MMA.search(text)) for _, text in code),
        loads="/".join(str(width) for width in sorted(loads)),
        instructions=len(code),
        issue_slots=slots,
        epilogue=_epilogue(target, slots, warps, constants),
    )


def _epilogue(target: Target, slots: int, warps: int, constants: dict[str, Any]) -> float | None:
    """Cycles to issue ``slots``, of the tensor-core cycles of a tile; None where there is none."""
    sizes = [constants.get(key) for key in ("BLOCK_N", "BLOCK_V", "D")]
    if not all(sizes) or "BLOCK_D" not in constants or "PRECISION" not in constants:
        return None
    if constants["PRECISION"] != "ieee":
        return None
    rows, columns, width = (int(size) for size in sizes if size)
    return (slots * warps / target.schedulers) / (rows * columns * width / target.multiply_adds)


def _blocks(target: Target, registers: int, shared: int, warps: int) -> int:
    """Programs that a multiprocessor holds at once. Registers are given out in eights."""
    by_registers = target.registers // (-(-registers // 8) * 8 * target.warp * warps)
    by_shared = target.shared // (shared + 1024)
    return min(by_registers, by_shared, target.warps // warps)


def _cuobjdump(flag: str, cubin: Path) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    run = subprocess.run([tool, flag, cubin], capture_output=True, text=True, check=True)
    return run.stdout


def disassemble(cubin: Path) -> list[tuple[int, str]]:
    """Address and text of each instruction of a compiled kernel."""
    return instructions(_cuobjdump("-sass", cubin))


def instructions(sass: str) -> list[tuple[int, str]]:
    """Address and text of each instruction."""
    found = re.findall(r"/\*([0-9a-f]{4,6})\*/\s+(?:@!?U?P\w+\s+)?(.+?);", sass)
    return [(int(address, 16), text) for address, text in found]


def _width(text: str) -> int:
    """Bits that a thread loads at once."""
    match = re.search(r"\.(128|64|U?S?16|U8|S8)\b", text)
    return 32 if match is None else int(match.group(1).lstrip("US"))


def loops_of(code: list[tuple[int, str]]) -> list[tuple[int, int]]:
    """First and last address of each loop: from where a branch leads back to, to the branch."""
    loops = []
    for address, text in code:
        match = re.match(r"BRA.*?0x([0-9a-f]+)", text)
        if match and int(match.group(1), 16) <= address:
            loops.append((int(match.group(1), 16), address))
    return loops


def outside_main_loop(code: list[tuple[int, str]]) -> int:
    """Instructions that a tile takes outside the loop of its matrix products.

    The main loop is the shortest one with a matrix instruction; a tile is the shortest loop around
    that one, or all of the program.
    """
    loops = loops_of(code)
    products = [address for address, text in code if _MMA.search(text)]

    def inside(address: int, loop: tuple[int, int]) -> bool:
        return loop[0] <= address <= loop[1]

    main = [loop for loop in loops if any(inside(address, loop) for address in products)]
    if not main:
        return len(code)
    first = min(main, key=lambda loop: loop[1] - loop[0])
    around = [loop for loop in loops if loop[0] < first[0] and loop[1] > first[1]]
    tile = min(around, key=lambda loop: loop[1] - loop[0], default=(0, code[-1][0]))
    return sum(inside(a, tile) and not inside(a, first) for a, _ in code)
