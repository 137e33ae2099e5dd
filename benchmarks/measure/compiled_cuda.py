"""Compiles the kernels of ``csrc/cuda`` for GPUs, without one, and reads nvcc's output."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from benchmarks.measure.compiled import MMA, Usage, cuobjdump
from csrc import ninja_build

ROOT = Path(__file__).parents[2]
# The names of these kernels begin with this, unlike those of Triton's.
PREFIX = "cuda: "
# All targets have the same code, of mma.sync. No other takes more than a few registers more than
# sm_90; sm_100 and sm_120 take fewer.
GATE = ("sm_90",)
ALL = (*GATE, "sm_80", "sm_89", "sm_100", "sm_120")
TYPES = {"float": "f32", "unsigned int": "u32", "__nv_bfloat16": "bf16", "__half": "f16"}
# A kernel: its template parameters, its name, and its body up to the brace at the line's start.
_KERNEL = re.compile(
    r"(?:template <([^<>]*)>\n)?__global__ [^;]*?\b(\w+)_kernel\((.*?)\n}\n", re.DOTALL
)
# A launch (csrc/cuda/launch.h): the kernel's name, its threads and its bytes of shared memory.
_LAUNCH = re.compile(r'\{\s*"(\w+)",[^;]*?,\s*([\w<>]+),\s*([\w<>]+),\s*stream\}')


@dataclass(frozen=True)
class _Kernel:
    """What the source says of a kernel."""

    switches: tuple[str, ...]  # template parameters after the type, if it has one
    typed: bool
    tiled: bool  # it uses tile.cuh or products.cuh: operands come through shared memory


def why_not() -> str | None:
    """The tool that is missing for compiling; None if none is."""
    return next(
        (f"no {name} on PATH" for name in ("nvcc", "c++filt") if not shutil.which(name)), None
    )


def compile_sources(targets: Sequence[str]) -> list[Usage]:
    """Compiles every kernel of every file for the targets that nvcc knows."""
    command = ["nvcc", "--list-gpu-arch"]
    known = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    jobs = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        # The longest files first, so that none is left for the end.
        sources = sorted(ROOT.glob("csrc/cuda/*.cu"), key=lambda x: x.name, reverse=True)
        for target in targets:
            if target.replace("sm_", "compute_") not in known:
                print(f"{target}: csrc/cuda is left out: this nvcc does not know it")
                continue
            jobs += [pool.submit(compile_source, target, source) for source in sources]
        return [usage for job in jobs for usage in job.result()]


def compile_source(target: str, source: Path) -> list[Usage]:
    """Compiles every kernel of one file for one target."""
    flags = ninja_build.COMMON_FLAGS.split()
    with tempfile.TemporaryDirectory() as folder:
        probe, cubin = Path(folder, "probe.cu"), Path(folder, "probe.cubin")
        probe.write_text(_probe(source))
        command = ["nvcc", *flags, f"-arch={target}", "-cubin", "-keep", f"-keep-dir={folder}"]
        subprocess.run([*command, "-o", cubin, probe], cwd=ROOT, check=True)
        ptx = Path(folder, "probe.ptx").read_text()
        # CUB's kernels, whose names do not begin so, are left out.
        ours = r"(?:void )?(bft::cuda::.*?)"
        resources = _demangled(cuobjdump(cubin, "-res-usage"))
        used = re.findall(rf"Function {ours}:\s+REG:(\d+) STACK:(\d+)", resources)
        sass = _demangled(cuobjdump(cubin, "-sass"))
        code = dict(re.findall(rf"Function : {ours}\n(.*?)(?=Function : |\Z)", sass, re.DOTALL))
    sizes = {what: int(x or 0) for what, x in re.findall(r"\.u32 probe_(\w+)(?: = (\d+))?;", ptx)}
    assert code.keys() == {name for name, *_ in used}, f"{source}: kernels without machine code"
    return [_usage(target, name, code[name], int(r), int(s), sizes) for name, r, s in used]


def _probe(source: Path) -> str:
    """The file with the sizes of its launches as variables, whose values the PTX then has."""
    sizes = {}
    for kernel, threads, shared in _LAUNCH.findall(source.read_text()):
        sizes |= {f"threads_{kernel}": threads, f"shared_{kernel}": shared}
    lines = [f'#include "{source.relative_to(ROOT)}"', "namespace bft::cuda {"]
    lines += [f'extern "C" __device__ unsigned probe_{x} = {value};' for x, value in sizes.items()]
    return "\n".join([*lines, "}", ""])


@cache
def _kernels() -> dict[str, _Kernel]:
    """Every kernel that the sources define."""
    found = {}
    for path in sorted(ROOT.glob("csrc/cuda/*.cu*")):
        for parameters, name, body in _KERNEL.findall(path.read_text()):
            typed = parameters.startswith("typename")
            own = parameters.split(",")[typed:] if parameters else []
            switches = [p.split()[-1].lower() for p in own]
            tiled = "next_products(" in body or "sum_products<" in body
            found[name] = _Kernel(tuple(switches), typed, tiled)
    return found


def _demangled(text: str) -> str:
    return subprocess.check_output(["c++filt"], input=text, text=True)


def _usage(
    target: str, function: str, code: str, registers: int, spilled: int, sizes: dict[str, int]
) -> Usage:
    """What one kernel takes, from its demangled name, its code and the probe's variables."""
    match = re.search(r"::(\w+)_kernel(?:<([^>]*)>)?\(", function)
    assert match, f"{function}: expected bft::cuda::NAME_kernel"
    kernel, values = match[1], match[2].split(", ") if match[2] else []
    known = _kernels()[kernel]
    operand = values.pop(0) if known.typed else ""
    # A number comes with its name, and a switch only if it is on.
    switches = [
        switch if value == "true" else f"{switch}={TYPES.get(value, value)}"
        for switch, value in zip(known.switches, values, strict=True)
        if value != "false"
    ]
    moves = {"LDG": "aligned" in switches, "LDGSTS": "aligned" in switches and known.tiled}
    return Usage(
        target=target,
        kernel=PREFIX + kernel,
        operands=TYPES.get(operand, operand),
        switches=tuple(switches),
        multiplies=known.tiled and operand in ("__nv_bfloat16", "__half"),
        tensor_core=MMA.search(code) is not None,
        registers=registers,
        spilled=spilled,
        shared=sizes[f"shared_{kernel}"],  # none is static (csrc/cuda/device.h)
        warps=sizes[f"threads_{kernel}"] // 32,
        budgeted=target in GATE,
        narrow=", ".join(what for what, must in moves.items() if must and not _wide(code, what)),
    )


def _wide(code: str, what: str) -> bool:
    """Whether there is a load, or a copy to shared memory, of 16 bytes at once.

    A copy counts as a load, too: ``LDGSTS`` begins with ``LDG``.
    """
    return bool(re.search(rf"\b{what}(?:STS)?(?:\.\w+)*\.128\b", code))
