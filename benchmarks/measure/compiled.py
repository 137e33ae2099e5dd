"""Compiles kernels for a target that is not here, and reads what the compiler produced."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
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
    reserved: int = 1024  # bytes of shared memory that the system takes of each program
    brief: bool = False  # only the cases that differ most, to save time


# The vendors' tuning guides; the rate from peak flop/s, multiprocessors and boost clock (of sm_89
# and sm_120 the professional cards').
TARGETS = {
    "sm_80": Target("cuda", 80, 32, 65536, 164 * 1024, 64, 4, 1024),
    "sm_89": Target("cuda", 89, 32, 65536, 100 * 1024, 48, 4, 512, brief=True),
    "sm_90": Target("cuda", 90, 32, 65536, 228 * 1024, 64, 4, 2048),
    "sm_100": Target("cuda", 100, 32, 65536, 228 * 1024, 64, 4, 4096),
    "sm_120": Target("cuda", 120, 32, 65536, 100 * 1024, 48, 4, 512, brief=True),
    "gfx942": Target("hip", "gfx942", 64, 131072, 64 * 1024, 32, 4, 1024, reserved=0, brief=True),
}
# Instructions of a warp or warpgroup that multiply matrices.
_MMA = re.compile(r"\b(?:UTC\w*MMA|HGMMA|HMMA|QGMMA|IMMA|v_mfma\w*)\b")
# Loads from global memory: NVIDIA's, and AMD's by vector.
_LOAD = re.compile(r"\b(?:LDG(?:STS)?\b|(?:global|buffer|flat)_load_)")
_COPY = re.compile(r"\bLDGSTS\b")
# Addresses and texts of instructions.
Code = list[tuple[int, str]]


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
    copies: str  # of those that go to shared memory by themselves
    instructions: int
    issue_slots: int  # outside the main loop, a warp and tile
    epilogue: float | None  # cycles to issue them, of the main loop's tensor-core cycles
    loop: float | None  # cycles to issue the main loop itself, likewise
    copied: bool = False  # whether its operands must be copied, 16 bytes at once
    wide: bool = False  # whether it must load 16 bytes at once

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
    from benchmarks.measure.rehearsal import BRIEF, CASES, PEER_CASES

    target = TARGETS[name]
    usages: dict[str, Usage] = {}

    def collect(label: str, case: Callable[[], None], peer: bool) -> None:
        with compiling(target) as found:
            case()
        for kernel, constants, compiled in found:
            form = _form(kernel, constants, label)
            usages.setdefault(form, usage_of(name, target, form, peer, constants, compiled))

    for label, case in CASES.items():
        if not target.brief or label in BRIEF:
            collect(label, case, peer=False)
    if peers and target.backend == "cuda":
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
    code, registers, spilled = _read(compiled)
    warps = compiled.metadata.num_warps
    return usage_from(
        code,
        target=name,
        name=form,
        peer=peer,
        multiplies="tt.dot" in compiled.asm["ttir"],
        registers=registers,
        spilled=spilled,
        shared=compiled.metadata.shared,
        warps=warps,
        epilogue=_issue(target, outside_main_loop(code, detour=False), warps, constants, "D"),
        loop=_issue(target, len(main_loop(code)), warps, constants, "BLOCK_D"),
    )


def usage_from(code: Code, **known: Any) -> Usage:
    """What is known of a kernel, and what its machine code says."""
    target, resources = TARGETS[known["target"]], (known["registers"], known["shared"])
    return Usage(
        **known,
        blocks=_blocks(target, *resources, known["warps"]),
        tensor_core=tensor_core(code),
        loads=_widths(code, _LOAD),
        copies=_widths(code, _COPY),
        instructions=len(code),
        issue_slots=outside_main_loop(code),
    )


def _widths(code: Code, kind: re.Pattern[str]) -> str:
    found = {_width(text) for _, text in code if kind.search(text)}
    return "/".join(str(width) for width in sorted(found))


@cache
def _read(compiled: Any) -> tuple[Code, int, int]:
    """Instructions, registers of a thread, and bytes it spills."""
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]
        registers = int(re.findall(r"TotalNumVgprs: (\d+)", text)[-1])
        spilled = int(re.findall(r"ScratchSize: (\d+)", text)[-1])
        return amd_instructions(text), registers, spilled
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        resources = cuobjdump("-res-usage", cubin)
        code = disassemble(cubin)
    registers = int(re.findall(r"REG:(\d+)", resources)[-1])
    return code, registers, int(re.findall(r"STACK:(\d+)", resources)[-1])


def _issue(
    target: Target, slots: int, warps: int, constants: dict[str, Any], depth: str
) -> float | None:
    """Cycles to issue ``slots``, of a tile's tensor-core cycles; None where there is no tile.

    Args:
        target: the GPU.
        slots: instructions of a warp.
        warps: of a program.
        constants: of the kernel.
        depth: which of them is the length of the tile's dot products.
    """
    sizes = [constants.get(key) for key in ("BLOCK_N", "BLOCK_V", depth)]
    if not all(sizes) or "BLOCK_D" not in constants or "PRECISION" not in constants:
        return None
    if constants["PRECISION"] != "ieee" or "D" not in constants or "HAS_CAP" not in constants:
        return None
    rows, columns, width = (int(size) for size in sizes if size)
    return issue_share(target, slots * warps, rows * columns * width)


def issue_share(target: Target, slots: int, multiply_adds: int) -> float:
    """Cycles to issue a program's instructions, of its tensor cores' for so many products."""
    return (slots / target.schedulers) / (multiply_adds / target.multiply_adds)


def _blocks(target: Target, registers: int, shared: int, warps: int) -> int:
    """Programs that a multiprocessor holds at once. Registers are given out in eights."""
    by_registers = target.registers // (-(-registers // 8) * 8 * target.warp * warps)
    by_shared = target.shared // max(1, shared + target.reserved)
    return min(by_registers, by_shared, target.warps // warps)


def cuobjdump(flag: str, cubin: Path) -> str:
    """What Triton's copy of the tool prints."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    run = subprocess.run([tool, flag, cubin], capture_output=True, text=True, check=True)
    return run.stdout


def disassemble(cubin: Path) -> Code:
    """Address and text of each instruction of a compiled kernel."""
    return instructions(cuobjdump("-sass", cubin))


_BRANCH = re.compile(r"BRA.*?0x([0-9a-f]+)")


def instructions(sass: str) -> Code:
    """Address and text of each instruction."""
    found = re.findall(r"/\*([0-9a-f]{4,6})\*/\s+(?:@!?U?P\w+\s+)?(.+?);", sass)
    return [(int(address, 16), text) for address, text in found]


def amd_instructions(assembly: str) -> Code:
    """A number and the text of each instruction; branches as NVIDIA's have them, to a number."""
    body = assembly.partition("\n.Lfunc_end")[0]
    found: Code = []
    labels: dict[str, int] = {}
    for line in body.splitlines():
        text = line.split(";")[0].strip()
        if label := re.match(r"(\.LBB\w+):", text):
            labels[label.group(1)] = len(found)
        elif text and line[0].isspace() and not text.startswith("."):
            found.append((len(found), text))
    branch = re.compile(r"s_c?branch\w*\s+(\.LBB\w+)")
    return [
        (at, f"BRA {labels[jump.group(1)]:#x}" if (jump := branch.match(text)) else text)
        for at, text in found
    ]


def _width(text: str) -> int:
    """Bits that a thread loads at once."""
    if match := re.search(r"_load_(?:dword(?:x(\d))?|[us](byte|short))", text):
        return {"byte": 8, "short": 16}.get(match.group(2), 32 * int(match.group(1) or 1))
    match = re.search(r"\.(128|64|U?S?16|U8|S8)\b", text)
    return 32 if match is None else int(match.group(1).lstrip("US"))


def loops_of(code: Code) -> list[tuple[int, int]]:
    """First and last address of each loop: from where a branch leads back to, to the branch."""
    return [(to, at) for at, to in _branches(code) if to <= at]


def _loops(code: Code) -> tuple[list[tuple[int, int]], tuple[int, int] | None]:
    """All loops, and the shortest one with a matrix instruction."""
    found = loops_of(code)
    products = [address for address, text in code if _MMA.search(text)]
    main = [loop for loop in found if any(loop[0] <= at <= loop[1] for at in products)]
    return found, min(main, key=lambda loop: loop[1] - loop[0], default=None)


def _branches(code: Code) -> list[tuple[int, int]]:
    """From and to which address."""
    return [(a, int(match.group(1), 16)) for a, t in code if (match := _BRANCH.match(t))]


def main_loop(code: Code) -> Code:
    """One turn of the loop of the matrix products; empty where there is none."""
    _, main = _loops(code)
    return [] if main is None else [line for line in code if main[0] <= line[0] <= main[1]]


def tensor_core(code: Code) -> int:
    """How many instructions multiply matrices."""
    return sum(bool(_MMA.search(text)) for _, text in code)


def outside_main_loop(code: Code, *, detour: bool = True) -> int:
    """Instructions that a tile takes outside the loop of its matrix products.

    The main loop is the shortest one with a matrix instruction; a tile is the shortest loop around
    that one, or all of the program.

    Args:
        code: addresses and texts.
        detour: also, where tiles are looped over, the longest part that a branch skips: in the
            forward, what only a tile that holds a target or the end of the vocabulary does.
    """
    loops, first = _loops(code)
    if first is None:
        return len(code)

    def inside(address: int, part: tuple[int, int]) -> bool:
        return part[0] <= address <= part[1]

    around = [loop for loop in loops if loop[0] < first[0] and loop[1] > first[1]]
    tile = min(around, key=lambda loop: loop[1] - loop[0], default=(0, code[-1][0]))
    skips = [
        (at + 1, to - 1)
        for at, to in _branches(code)
        if around and not detour and tile[0] <= at < to <= tile[1] and not at < first[0] < to
    ]
    skipped = max(skips, key=lambda part: part[1] - part[0], default=(0, -1))
    return sum(inside(a, tile) and not inside(a, first) and not inside(a, skipped) for a, _ in code)
