"""Compiles the kernels of ``csrc/cuda`` for GPUs that are not here, and reads nvcc's output."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from benchmarks.measure.compiled import (
    TARGETS,
    Code,
    Usage,
    cuobjdump,
    instructions,
    issue_share,
    main_loop,
    outside_main_loop,
    tensor_core,
    usage_from,
)
from benchmarks.measure.rehearsal import WIDTH

ROOT = Path(__file__).parents[2]
# What begins the names of these kernels, beside those of Triton's.
PREFIX = "cuda: "
TYPES = {"float": "f32", "unsigned int": "u32", "__nv_bfloat16": "bf16", "__half": "f16"}
# Kernels whose products are as deep as the model is wide; others, as a block or the batch is long.
OF_LOGITS = ("linear_nll_forward", "logit_gradient")
_MULTIPLY_ADDS = 16 * 8 * 16  # of mma.m16n8k16
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
    tiled: bool  # by tile.cuh or products.cuh: operands come through shared memory


def why_not() -> str | None:
    """What is missing to compile; None if nothing is."""
    return next(
        (f"no {name} on PATH" for name in ("nvcc", "c++filt") if not shutil.which(name)), None
    )


def compile_sources(targets: Sequence[str]) -> list[Usage]:
    """Every kernel of every file for those of the targets that nvcc knows, two files at a time."""
    command = ["nvcc", "--list-gpu-arch"]
    known = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    jobs = []
    with ThreadPoolExecutor(2) as pool:
        for target in targets:
            if TARGETS[target].backend != "cuda":
                continue
            if target.replace("sm_", "compute_") not in known:
                print(f"{target}: csrc/cuda is left out: this nvcc does not know it")
                continue
            sources = sorted(ROOT.glob("csrc/cuda/*.cu"))
            jobs += [pool.submit(_compile, target, source) for source in sources]
        return [usage for job in jobs for usage in job.result()]


def _compile(name: str, source: Path) -> list[Usage]:
    """Every kernel of one file for one target."""
    flags = runpy.run_path(str(ROOT / "csrc/ninja_build.py"))["COMMON_FLAGS"].split()
    with tempfile.TemporaryDirectory() as folder:
        probe, cubin = Path(folder, "probe.cu"), Path(folder, "probe.cubin")
        probe.write_text(_probe(source))
        command = ["nvcc", *flags, f"-arch={name}", "-cubin", "-keep", f"-keep-dir={folder}"]
        subprocess.run([*command, "-o", cubin, probe], cwd=ROOT, check=True)
        ptx = Path(folder, "probe.ptx").read_text()
        resources, sass = cuobjdump("-res-usage", cubin), cuobjdump("-sass", cubin)
    sizes = {what: int(x or 0) for what, x in re.findall(r"\.u32 probe_(\w+)(?: = (\d+))?;", ptx)}
    used = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+)", resources)
    # Not those of CUB.
    ours = {symbol: (int(r), int(s)) for symbol, r, s in used if symbol.startswith("_ZN3bft4cuda")}
    plain = _demangle(list(ours))
    parts = re.findall(r"Function : (\w+)\n(.*?)(?=Function : |\Z)", sass, re.DOTALL)
    code = {symbol: instructions(body) for symbol, body in parts if symbol in ours}
    assert code.keys() == ours.keys(), f"{source}: kernels without machine code"
    return [_usage(name, plain[symbol], code[symbol], *ours[symbol], sizes) for symbol in ours]


def _probe(source: Path) -> str:
    """The file, and the sizes of its launches as variables, whose values are found in the PTX."""
    sizes = {"tile": "kTileN * kTileV"}
    for kernel, threads, shared in _LAUNCH.findall(source.read_text()):
        sizes |= {f"threads_{kernel}": threads, f"shared_{kernel}": shared}
    lines = [f'#include "{header}"' for header in (source.relative_to(ROOT), "csrc/cuda/forward.h")]
    lines.append("namespace bft::cuda {")
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


def _demangle(symbols: list[str]) -> dict[str, str]:
    text = "\n".join(symbols)
    done = subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True)
    return dict(zip(symbols, done.stdout.splitlines(), strict=True))


def _usage(
    name: str, function: str, code: Code, registers: int, spilled: int, sizes: dict[str, int]
) -> Usage:
    """What one kernel takes.

    Args:
        name: of the target.
        function: the kernel, demangled.
        code: its instructions.
        registers, spilled: of a thread.
        sizes: the probe's variables.
    """
    match = re.search(r"::(\w+)_kernel(?:<([^>]*)>)?\(", function)
    assert match, f"{function}: expected bft::cuda::NAME_kernel"
    kernel, values = match[1], match[2].split(", ") if match[2] else []
    known = _kernels()[kernel]
    operand = values.pop(0) if known.typed else ""
    # A number is told with its name, and a switch only where it is on.
    pairs = [pair for pair in zip(known.switches, values, strict=True) if pair[1] != "false"]
    switches = [
        switch if value == "true" else f"{switch}={TYPES.get(value, value)}"
        for switch, value in pairs
    ]
    form = " ".join(filter(None, [kernel, TYPES.get(operand, operand), *switches]))
    aligned, warps = "aligned" in switches, sizes[f"threads_{kernel}"] // 32
    multiplies = known.tiled and operand in ("__nv_bfloat16", "__half")
    epilogue = loop = None
    if multiplies:
        target, turn = TARGETS[name], main_loop(code)
        loop = issue_share(target, len(turn), tensor_core(turn) * _MULTIPLY_ADDS)
        if kernel in OF_LOGITS:
            slots = outside_main_loop(code, detour=False) * warps
            epilogue = issue_share(target, slots, sizes["tile"] * WIDTH)
    return usage_from(
        code,
        target=name,
        name=PREFIX + form,
        peer=False,
        multiplies=multiplies,
        registers=registers,
        spilled=spilled,
        shared=sizes[f"shared_{kernel}"],  # none is static (csrc/cuda/device.h)
        warps=warps,
        epilogue=epilogue,
        loop=loop,
        copied=known.tiled and aligned,
        wide=aligned,
    )
