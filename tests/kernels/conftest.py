"""Shared by the kernel tests: seeds, problems, tolerances and allocation tracking.

Every run draws new inputs. The seed is printed with a failure; ``BFT_TEST_SEED=... pytest`` draws
the same inputs again, test by test.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import re
import runpy
import shutil
import subprocess
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache, wraps
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bft_kernels import linear_nll, ops
from bft_kernels.backends.cuda import native

RUN_SEED = int(os.environ.get("BFT_TEST_SEED") or int.from_bytes(os.urandom(4), "little"))

if importlib.util.find_spec("hypothesis"):  # a machine with a GPU may have pytest and no more
    import hypothesis

    # No database: a run must not depend on files an earlier one left. No deadline: the first
    # example pays for loading torch's kernels.
    hypothesis.settings.register_profile(
        "kernels", database=None, deadline=None, max_examples=60, print_blob=True
    )
    hypothesis.settings.load_profile("kernels")
    hypothesis.core.global_force_seed = RUN_SEED  # what --hypothesis-seed sets

# A statistical test fails where chance alone would give a p-value this small. The suite computes
# well under a thousand of them, so that a correct program fails less than one run in a million.
P_VALUE = 1e-9


def pytest_report_header() -> str:
    return f"kernel tests: BFT_TEST_SEED={RUN_SEED}"


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """A seed of this run and this test, which torch's generator also starts from."""
    # Its own for every test, so that a test fails alone as it fails in the whole suite.
    own = zlib.crc32(f"{RUN_SEED}:{request.node.name}".encode())
    print(f"BFT_TEST_SEED={RUN_SEED}")
    torch.manual_seed(own)
    return own


@pytest.fixture(autouse=True)
def one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    """Matrices this small gain nothing from more threads, and lose much on a machine whose other
    processes make them wait for each other. Tests with real work ask for ``all_threads``.
    """
    before = torch.get_num_threads()
    if "all_threads" not in request.fixturenames:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def all_threads() -> None:
    """See :func:`one_thread`."""


@pytest.fixture(scope="session")
def p_value() -> float:
    return P_VALUE


@dataclass
class Problem:
    """Inputs of the core op. Tensors are leaves that require gradients unless frozen."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    target: Tensor  # [N]
    bias: Tensor | None = None  # [V]
    frozen: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("hidden", "weight", "bias"):
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, tensor.detach().requires_grad_(name not in self.frozen))

    @property
    def args(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.hidden, self.weight, self.target

    @property
    def leaves(self) -> dict[str, Tensor]:
        """The tensors that require a gradient."""
        found = {"hidden": self.hidden, "weight": self.weight, "bias": self.bias}
        return {k: v for k, v in found.items() if v is not None and v.requires_grad}

    def copy(
        self, dtype: torch.dtype | None = None, *, device: str | None = None, **changes: Any
    ) -> Problem:
        """Leaves of its own with the same values, without gradients."""

        def clone(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.detach().clone().to(device, dtype or x.dtype)

        own = {"hidden": clone(self.hidden), "weight": clone(self.weight), "bias": clone(self.bias)}
        own["target"] = self.target.to(device)
        return replace(self, **{**own, **changes})

    def grads(self) -> dict[str, Tensor | None]:
        return {name: leaf.grad for name, leaf in self.leaves.items()}

    def gradients(self, loss: Tensor, retain: bool = False) -> dict[str, Tensor]:
        """Of the leaves; zeros where the loss does not reach them, as in a batch without labels."""
        leaves = self.leaves
        if not loss.requires_grad:
            return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
        found = torch.autograd.grad(loss, list(leaves.values()), retain_graph=retain)
        return dict(zip(leaves, found, strict=True))


def cancellation(p: Problem, loss_of: Callable[[Problem], Tensor]) -> dict[str, float]:
    """How far rounding grows in each gradient's sums: ``|terms| / |sum|``, in float64.

    The logits stand in for ``hidden`` and the unit matrix for ``weight``, which gives ``dz``.
    """
    wide = p.copy(torch.float64, frozen=("weight", "bias"))
    hidden, weight = wide.hidden.detach(), wide.weight
    unit = torch.eye(weight.shape[0], dtype=torch.float64)
    own = replace(wide, hidden=hidden @ weight.T, weight=unit)
    dz = own.gradients(loss_of(own))["hidden"]
    terms = {
        "hidden": (dz @ weight, dz.abs() @ weight.abs()),
        "weight": (dz.T @ hidden, dz.T.abs() @ hidden.abs()),
        "bias": (dz.sum(0), dz.abs().sum(0)),
    }
    return {k: float(size.norm() / total.norm()) for k, (total, size) in terms.items()}


def draw_problem(
    rows: int,
    width: int,
    vocabulary: int,
    *,
    ignored: float = 0.3,
    bias: bool = False,
    dtype: torch.dtype = torch.float64,
    scale: float = 1.0,
    frozen: tuple[str, ...] = (),
    ignore_index: int = -100,
) -> Problem:
    """Logits of standard deviation ``scale``; a token is ignored with probability ``ignored``."""
    hidden = torch.randn(rows, width, dtype=torch.float64) * scale
    weight = torch.randn(vocabulary, width, dtype=torch.float64) / math.sqrt(width)
    target = torch.randint(vocabulary, (rows,))
    target[torch.rand(rows) < ignored] = ignore_index
    offset = torch.randn(vocabulary, dtype=torch.float64) if bias else None
    offset = None if offset is None else offset.to(dtype)
    return Problem(hidden.to(dtype), weight.to(dtype), target, offset, frozen)


@pytest.fixture(scope="session")
def problem() -> Callable[..., Problem]:
    """:func:`draw_problem`; session-scoped, so that hypothesis tests may use it."""
    return draw_problem


@pytest.fixture(scope="session")
def cancels() -> Callable[..., dict[str, float]]:
    return cancellation


@pytest.fixture(scope="session")
def weighted_gradients() -> Callable[..., dict[str, Tensor]]:
    """Gradients of a problem's losses, each with a weight of its own."""

    def run(p: Problem, *, device: str = "cpu", **how: Any) -> dict[str, Tensor]:
        copy = p.copy(device=device)
        upstream = torch.linspace(0.5, 2, p.target.numel(), device=device)
        (linear_nll(*copy.args, bias=copy.bias, **how) * upstream).sum().backward()
        return {name: grad.cpu() for name, grad in copy.grads().items() if grad is not None}

    return run


@pytest.fixture(scope="session")
def problem_from() -> type[Problem]:
    return Problem


def relative_error(got: Tensor, expected: Tensor) -> float:
    """``|got - expected| / |expected|`` in the Euclidean norm, in float64.

    The smallest subnormal of ``got``'s type is allowed in every element: below the normal numbers
    (6e-5 in float16) a type rounds to multiples of it, however small the value.
    """
    assert got.shape == expected.shape, f"shape {tuple(got.shape)}, not {tuple(expected.shape)}"
    kind = torch.finfo(got.dtype)
    floor = kind.smallest_normal * kind.eps * math.sqrt(got.numel())
    got, expected = got.detach().double(), expected.detach().double()
    beyond = ((got - expected).norm() - floor).clamp_min(0)
    return float(beyond / expected.norm().clamp_min(1e-300))


@pytest.fixture(scope="session")
def error() -> Callable[[Tensor, Tensor], float]:
    return relative_error


@pytest.fixture(scope="session")
def close() -> Callable[..., None]:
    """Asserts that ``got`` equals ``expected`` to ``tolerance`` of its largest entry (or of 1)."""

    def check(got: Any, expected: Any, tolerance: float = 1e-11, what: str = "") -> None:
        if isinstance(expected, dict):
            assert got.keys() == expected.keys()
            for name in expected:
                check(got[name], expected[name], tolerance, f"{what} {name}")
            return
        if expected is None or got is None:
            assert got is expected, f"{what}: got {got}, expected {expected}"
            return
        assert got.shape == expected.shape, f"{what}: {got.shape}, not {expected.shape}"
        if got.dtype == torch.bool:
            assert torch.equal(got, expected), what
            return
        got, expected = got.detach().double(), expected.detach().double()
        finite = torch.isfinite(expected)
        # Infinities must be the same ones, and a NaN is never right.
        assert torch.equal(got[~finite], expected[~finite]), what
        got, expected = got[finite], expected[finite]
        if expected.numel() == 0:
            return
        scale = float(expected.abs().max().clamp_min(1.0))
        worst = float((got - expected).abs().max())
        assert worst <= tolerance * scale, f"{what}: off by {worst:.3g} at a scale of {scale:.3g}"

    return check


_GOLDEN_RATIO = np.uint64(0x9E3779B97F4A7C15)


def _mix64(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def draw_bits(seed: Any, rows: Any, columns: Any) -> np.ndarray:
    """The 32 bits behind each draw, from the definition in unsigned numpy arithmetic.

    ``seed`` is an int or an int64 array beside ``rows``; the result is uint32 ``[rows, columns]``.
    """
    seeds = np.atleast_1d(np.asarray(seed, dtype=np.int64)).view(np.uint64)
    rows = np.asarray(rows, dtype=np.int64).view(np.uint64)
    key = _mix64(_mix64(seeds + _GOLDEN_RATIO) + _GOLDEN_RATIO * rows)
    multiplier = (key >> np.uint64(32)).astype(np.uint32) | np.uint32(1)
    offset = (key & np.uint64(0xFFFFFFFF)).astype(np.uint32)
    x = multiplier[:, None] * np.asarray(columns).astype(np.uint32) + offset[:, None]
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        x ^= x >> np.uint32(shift)
        x *= np.uint32(factor)
    return x


@pytest.fixture(scope="session")
def raw_bits() -> Callable[[Any, Any, Any], np.ndarray]:
    return draw_bits


@pytest.fixture(scope="session")
def inclusion() -> Callable[[Tensor, float], Tensor]:
    """The exact chance of ``u * eps < p``, from all 2^24 values that ``u`` can take."""
    u = (np.arange(2**24, dtype=np.float32) + np.float32(0.5)) * np.float32(2**-24)

    def chance(p: Tensor, eps: float) -> Tensor:
        grid = u * np.float32(eps)  # never falls, so that a search counts
        kept = np.searchsorted(grid.astype(np.float64), p.double().numpy(), side="left")
        return torch.from_numpy(kept / 2**24)

    return chance


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """``torch.empty`` and its kin give NaN instead of what was there, so that an unwritten output
    shows.

    Torch's deterministic algorithms fill them too, but are others than those under test, and cuBLAS
    refuses to be one of them.
    """

    def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @wraps(make)
        def allocate(*args: Any, **how: Any) -> Tensor:
            made = make(*args, **how)
            return made.detach().fill_(unwritten(made.dtype)).requires_grad_(made.requires_grad)

        return allocate

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(Tensor, name, poisoned(getattr(Tensor, name)))


def unwritten(dtype: torch.dtype) -> float:
    """What memory holds that nobody has written to: NaN where there is one."""
    return math.nan if dtype.is_floating_point else 99


@pytest.fixture
def on_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Where there is no GPU, a device that refuses what one would: a mix with tensors of the CPU.

    Compilers do not trace it.
    """
    if torch.cuda.is_available() or "fresh_compiler" in request.fixturenames:
        yield
        return
    FAKE["refuse_in_kernels"](monkeypatch)
    with FAKE["FakeDevice"]():
        yield


GUARD = 64
MARK = 123


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What ``torch.empty`` and ``torch.zeros`` make has marks around it, which must stay; in empty
    tensors an unwritten element shows, as NaN where there is one.
    """
    made: list[Tensor] = []

    def guard(filled: bool) -> Any:
        def allocate(*shape: Any, dtype: Any = None, device: Any = None) -> Tensor:
            shape = torch.Size(shape[0] if shape and not isinstance(shape[0], int) else shape)
            dtype = dtype or torch.float32
            whole = torch.full((shape.numel() + 2 * GUARD,), MARK, dtype=dtype, device=device)
            inside = whole[GUARD : GUARD + shape.numel()]
            inside.fill_(unwritten(dtype) if filled else 0)
            made.append(whole)
            return inside.view(shape)

        return allocate

    monkeypatch.setattr(torch, "empty", guard(filled=True))
    monkeypatch.setattr(torch, "zeros", guard(filled=False))
    yield
    monkeypatch.undo()
    for whole in made:
        marks = torch.cat([whole[:GUARD], whole[-GUARD:]])
        assert bool((marks == torch.full_like(marks, MARK)).all())


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Compiled code of other tests does not count towards this one's limit of recompilations."""
    torch._dynamo.reset()
    # The cache on disk does not know when a custom op's backward changes.
    with torch._functorch.config.patch(enable_autograd_cache=False):
        yield
    torch._dynamo.reset()


@pytest.fixture
def backend_under(monkeypatch: pytest.MonkeyPatch) -> Callable[[TorchDispatchMode], None]:
    """Makes backends run under a dispatch mode, which custom ops keep out of their body."""
    select = ops.select

    def install(mode: TorchDispatchMode) -> None:
        class Watched:
            def __init__(self, backend: Any) -> None:
                self.backend = backend

            def __getattr__(self, name: str) -> Callable[..., Any]:
                def run(*args: Any) -> Any:
                    with mode:
                        return getattr(self.backend, name)(*args)

                return run

        monkeypatch.setattr(ops, "select", lambda *args: Watched(select(*args)))

    return install


@dataclass
class Allocations:
    """What a call asked of torch's CPU allocator, inside torch's own kernels too."""

    largest: int = 0  # bytes of the largest single block
    peak: int = 0  # bytes of all blocks alive at once, beyond those alive before
    sizes: list[int] = field(default_factory=list)


@pytest.fixture(scope="session")
def allocations() -> Callable[[Callable[[], object]], Allocations]:
    """Runs a function and reports its allocations; what it returns counts as alive."""

    def measure(run: Callable[[], object]) -> Allocations:
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile:
            held = run()
        assert profile.profiler is not None
        events = profile.profiler.kineto_results.events()
        events = sorted(events, key=lambda event: event.start_ns())
        changes = [event.nbytes() for event in events if event.name() == "[memory]"]
        del held
        result, alive = Allocations(), 0
        for change in changes:
            alive += change
            result.peak = max(result.peak, alive)
            if change > 0:
                result.sizes.append(change)
        result.largest = max(result.sizes, default=0)
        return result

    return measure


ROOT = Path(__file__).parents[2]
FAKE = runpy.run_path(str(Path(__file__).with_name("fake_device.py")))
DEVICE = runpy.run_path(str(Path(__file__).with_name("cuda_device.py")))
Emulation = DEVICE["Emulation"]


@pytest.fixture(scope="session")
def sampled() -> Callable[..., dict[str, Any]]:
    """Options of a sample of a problem in which every engine that computes in float32 keeps the
    same entries.
    """

    def options(p: Problem, seed: int = 7, eps: float = 2**-5) -> dict[str, Any]:
        return {"gradient": "sampled", "eps": eps, "seed": DEVICE["clear_seed"](p, seed, eps)}

    return options


@pytest.fixture(scope="session")
def emulated() -> Any:
    """``bft_kernels._cuda``, its device code run by the emulation."""
    build = runpy.run_path(str(ROOT / "csrc/emulation/build.py"))
    if build["CXX"] is None:
        pytest.skip("needs a C++ compiler")
    return build["build_module"](ROOT / "build/emulation")


@pytest.fixture(scope="session")
def emulation(emulated: Any) -> Emulation:
    return Emulation(emulated)


@pytest.fixture
def emulated_device(emulation: Emulation, monkeypatch: pytest.MonkeyPatch) -> Emulation:
    """The ``cuda`` backend takes tensors on the CPU, and runs them in the emulation."""
    emulation.how = {}
    monkeypatch.setattr(native, "DEVICE", "cpu")
    monkeypatch.setattr(native, "kernels", lambda: emulation.module)
    for name in ("certificate", "forward", "recompute", "sampled", "weights"):
        module = importlib.import_module(f"bft_kernels.backends.cuda.{name}")
        monkeypatch.setattr(module, "launch", emulation.launch, raising=False)
    return emulation


@pytest.fixture
def cuda_backend(request: pytest.FixtureRequest) -> None:
    """The ``cuda`` backend on a GPU, or in the emulation where there is none.

    What was emulated says nothing of a GPU that is there: without the module nothing runs.
    """
    if not torch.cuda.is_available():
        request.getfixturevalue("emulated_device")
    elif importlib.util.find_spec("bft_kernels._cuda") is None:
        pytest.skip("bft_kernels._cuda is not built: nothing of this backend can run on the GPU")


@dataclass
class Assembled:
    """A file of device code, compiled by nvcc without a warning and without a spill."""

    cubin: Path
    kernels: int

    def sass(self) -> dict[str, str]:
        """Machine code by kernel."""
        triton = pytest.importorskip("triton")
        cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        if not cuobjdump.exists():
            pytest.skip("needs cuobjdump")
        command = [cuobjdump, "-sass", self.cubin]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return dict(re.findall(r"Function : (\S+)\n(.*?)(?=\n\s*Function :|\Z)", text, re.S))


@pytest.fixture(scope="session")
def assemble(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Assembled]:
    """Compiles a file of the repository for an architecture, once."""
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    listed = subprocess.run(["nvcc", "--list-gpu-arch"], capture_output=True, text=True).stdout

    @cache
    def run(source: str, arch: str) -> Assembled:
        if arch.replace("sm_", "compute_") not in listed.split():
            pytest.skip(f"needs an nvcc that knows {arch}")
        cubin = tmp_path_factory.mktemp("assembled") / "kernels.cubin"
        command = ["nvcc", "-std=c++17", "-O3", f"-I{ROOT}", f"-arch={arch}", "-cubin"]
        command += ["-Xptxas=-v", "-Werror", "all-warnings", "-o", cubin, ROOT / source]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", done.stderr)
        assert set(spills) == {("0", "0")}
        return Assembled(cubin, len(spills))

    return run
