"""Compiles kernels for a GPU without one, and reads what the compiler produced."""

from __future__ import annotations

import functools
import operator
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch


@dataclass(frozen=True)
class Target:
    """The properties of a GPU that these figures need."""

    backend: str
    arch: int | str
    warp: int
    registers: int  # of a multiprocessor, 32 bits each
    shared: int  # bytes that a program may have
    brief: bool = False  # compile only kernels with tiles: the others are those of sm_90


# The vendors' tuning guides.
TARGETS = {
    "sm_80": Target("cuda", 80, 32, 65536, 163 * 1024, brief=True),
    "sm_89": Target("cuda", 89, 32, 65536, 99 * 1024, brief=True),
    "sm_90": Target("cuda", 90, 32, 65536, 227 * 1024),
    "sm_100": Target("cuda", 100, 32, 65536, 227 * 1024, brief=True),
    "sm_120": Target("cuda", 120, 32, 65536, 99 * 1024, brief=True),
    "gfx942": Target("hip", "gfx942", 64, 131072, 64 * 1024),
}
# Instructions of a warp or warpgroup that multiply matrices.
MMA = re.compile(r"\b(?:UTC\w*MMA|HGMMA|HMMA|QGMMA|IMMA|v_mfma\w*)\b")


@dataclass(frozen=True)
class Usage:
    """What one compiled kernel takes."""

    target: str
    kernel: str
    operands: str  # types; empty for kernels without products
    switches: tuple[str, ...]  # what distinguishes this form of the kernel
    multiplies: bool  # whether its source has a matrix product
    tensor_core: bool  # whether its machine code has an instruction for that
    registers: int  # of a thread
    spilled: int  # bytes of local memory of a thread
    shared: int  # bytes of a program
    warps: int
    narrow: str = ""  # the access that should move 16 bytes at once and does not
    budgeted: bool = True  # whether it is held to the budget of its kernel

    @property
    def key(self) -> str:
        """The name of the kernel in the budget."""
        return " ".join(filter(None, (self.kernel, self.operands)))

    @property
    def name(self) -> str:
        """The name of the form."""
        return " ".join((self.target, self.key, *self.switches))

    @property
    def fits(self) -> bool:
        """Whether a multiprocessor has room for a program. Registers are given out in eights."""
        target = TARGETS[self.target]
        registers = in_eights(self.registers) * target.warp * self.warps
        return registers <= target.registers and self.shared <= target.shared


def in_eights(registers: int) -> int:
    """The registers that a thread gets if it needs so many."""
    return -(-registers // 8) * 8


@dataclass(frozen=True)
class Launch:
    """A call of a Triton kernel; two are equal if they need the same form of the kernel."""

    run: Callable[[], Any] = field(compare=False)  # compiles
    kernel: str
    switches: frozenset[str]  # constants that are on
    sizes: frozenset[tuple[str, int]]  # of tiles, and bytes of an element of each tensor
    types: frozenset[tuple[str, str]]  # of the tensors

    def contains(self, other: Launch) -> bool:
        """Whether the other form's code is a part of this one's, whatever the types."""
        return (
            self.kernel == other.kernel
            and self.switches >= other.switches
            and self.sizes >= other.sizes
        )

    @property
    def tiled(self) -> bool:
        """Whether it makes tiles of a product, whose sizes depend on the target."""
        return any(name == "BLOCK_N" for name, _ in self.sizes)

    @property
    def operands(self) -> str:
        """Bits of an element of a product's operands, and of the tensors that they come from."""
        sizes = dict(self.sizes)
        if "OPERAND" not in sizes:
            return ""
        stored = max(sizes.get(name, 0) for name in ("hidden_ptr", "weight_ptr", "OPERAND"))
        wide = f" of {8 * stored}" if stored > sizes["OPERAND"] else ""
        return f"{8 * sizes['OPERAND']}{wide} bit"


def _no_device(target: Target) -> Any:
    """A Triton driver that names a target and has nothing to launch on."""
    from triton.backends.compiler import GPUTarget

    return SimpleNamespace(
        get_current_target=lambda: GPUTarget(target.backend, target.arch, target.warp),
        get_current_device=lambda: target.arch,  # the key under which Triton keeps what it compiled
        get_current_stream=lambda device=None: 0,
        get_active_torch_device=lambda: torch.device("meta"),
    )


def rehearsed(target: Target, calls: Iterable[Callable[[], None]]) -> list[Launch]:
    """The kernels that the calls launch, each form once; they are neither compiled nor run."""
    import triton
    from triton.runtime.jit import JITFunction

    found: dict[Launch, None] = {}
    compile_for_launch = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        def compiling() -> Any:
            return compile_for_launch(self, *args, grid=grid, warmup=True, **kwargs)

        given = dict(zip(self.arg_names, args, strict=False)) | kwargs  # the rest by name
        found.setdefault(_launch(compiling, self.fn.__name__, given))

    triton.runtime.driver.set_active(_no_device(target))
    with mock.patch.object(JITFunction, "run", run):
        for call in calls:
            call()
    return list(found)


def _launch(compiling: Callable[[], Any], name: str, given: dict[str, Any]) -> Launch:
    """The form that a kernel's arguments need; names of constants are in capitals."""
    switches, sizes, types = set(), {}, {}
    records = [value._asdict() for value in given.values() if isinstance(value, tuple)]
    for key, value in functools.reduce(operator.or_, records, given).items():
        if isinstance(value, torch.Tensor):  # an optional tensor is a switch
            sizes[key], types[key] = value.itemsize, str(value.dtype)
            switches.add(key.removesuffix("_ptr"))
        elif isinstance(value, float):
            switches.add(key)
        elif key == "OPERAND":
            sizes[key], types[key] = value.primitive_bitwidth // 8, str(value)
        elif isinstance(value, bool) or key == "POPULAR":
            switches |= {key.lower()} if value else set()
        elif isinstance(value, int) and (key.startswith(("BLOCK", "num_", "maxnreg", "D"))):
            sizes[key] = value
    kernel = name.strip("_").removesuffix("_kernel")
    return Launch(
        compiling, kernel, frozenset(switches), frozenset(sizes.items()), frozenset(types.items())
    )


def chosen(launches: list[Launch]) -> list[Launch]:
    """Forms that no other contains, the first of equal ones; and forms with each switch off.

    A switch may choose between two pieces of code, so the code behind "else" is compiled too, once
    for each kind of operands.
    """
    switches: dict[str, set[str]] = {}
    for launch in launches:
        switches.setdefault(launch.kernel, set()).update(launch.switches)

    def off(launch: Launch) -> set[tuple[str, str, str]]:
        others = switches[launch.kernel] - launch.switches
        return {(launch.kernel, launch.operands, switch) for switch in others}

    largest_first = sorted(launches, key=lambda x: -len(x.switches) - len(x.sizes))
    kept: list[Launch] = []
    for launch in largest_first:
        if not any(other.contains(launch) for other in kept):
            kept.append(launch)
    covered = set().union(*map(off, kept))
    for launch in reversed(largest_first):
        if new := off(launch) - covered:
            kept.append(launch)
            covered |= new
    return kept


def compile_cases(name: str, full: bool) -> list[Usage]:
    """Compiles the chosen forms for one target, held to a budget; with ``full`` all others too."""
    from benchmarks.measure.rehearsal import CASES, GATE

    target = TARGETS[name]
    launches = rehearsed(target, (CASES[label] for label in GATE))
    gate = [launch for launch in chosen(launches) if launch.tiled or not target.brief]
    usages = [usage_of(name, launch) for launch in gate]
    if full:
        others = [launch for launch in rehearsed(target, CASES.values()) if launch not in gate]
        usages += [replace(usage_of(name, launch), budgeted=False) for launch in others]
    return usages


def usage_of(name: str, launch: Launch) -> Usage:
    """What one compiled kernel takes, read from its machine code."""
    compiled = launch.run()
    assert compiled.metadata.target.arch == TARGETS[name].arch, "compiled for another target before"
    if "amdgcn" in compiled.asm:
        code, told = compiled.asm["amdgcn"], ("TotalNumVgprs: ", "ScratchSize: ")
    else:
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder, "kernel.cubin")
            cubin.write_bytes(compiled.asm["cubin"])
            code, told = cuobjdump(cubin, "-sass", "-res-usage"), ("REG:", "STACK:")
    registers, spilled = (int(re.findall(rf"{what}(\d+)", code)[-1]) for what in told)
    return Usage(
        target=name,
        kernel=launch.kernel,
        operands=launch.operands,
        switches=tuple(sorted(launch.switches)),
        multiplies="tt.dot" in compiled.asm["ttir"],
        tensor_core=MMA.search(code) is not None,
        registers=registers,
        spilled=spilled,
        shared=compiled.metadata.shared,
        warps=compiled.metadata.num_warps,
    )


def cuobjdump(cubin: Path, *flags: str) -> str:
    """The output of Triton's copy of the tool."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    run = subprocess.run([tool, *flags, cubin], capture_output=True, text=True, check=True)
    return run.stdout
