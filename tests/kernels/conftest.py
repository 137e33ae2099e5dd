"""Fixtures of the kernel tests: seeds, devices, memory that shows what was not written.

Every run draws new inputs. The seed is printed with a failure; ``BFT_TEST_SEED=... pytest`` draws
the same inputs again, test by test.
"""

import importlib.util
import math
import os
import zlib
from functools import cache, wraps
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bft_kernels import dispatch, ops
from bft_kernels.backends.cuda import inputs, native
from tests.cuda.emulation import build
from tests.support.assembled import assemble_for
from tests.support.emulated_device import Address, Emulation
from tests.support.fake_device import FakeDevice, refuse_in_kernels

ROOT = Path(__file__).parents[2]
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


def pytest_report_header():
    return f"kernel tests: BFT_TEST_SEED={RUN_SEED}"


@pytest.fixture(autouse=True)
def seed(request):
    """A seed of this run and this test, which torch's generator also starts from."""
    # Its own for every test, so that a test fails alone as it fails in the whole suite.
    own = zlib.crc32(f"{RUN_SEED}:{request.node.name}".encode())
    print(f"BFT_TEST_SEED={RUN_SEED}")
    torch.manual_seed(own)
    return own


@pytest.fixture(autouse=True)
def one_thread(request):
    """Matrices this small gain nothing from more threads, and lose much on a machine whose other
    processes make them wait for each other. Tests with real work ask for ``all_threads``.
    """
    before = torch.get_num_threads()
    if "all_threads" not in request.fixturenames:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def nothing_chosen():
    """No backend was chosen before the test, where a fixture changes what may run."""
    dispatch.select.cache_clear()
    dispatch._offered.cache_clear()


@pytest.fixture
def all_threads():
    """See :func:`one_thread`."""


@pytest.fixture
def poison(monkeypatch):
    """``torch.empty`` and its kin give NaN instead of what was there, so that an unwritten output
    shows.

    Torch's deterministic algorithms fill them too, but are others than those under test, and cuBLAS
    refuses to be one of them.
    """

    def poisoned(make):
        @wraps(make)
        def allocate(*args, **how):
            made = make(*args, **how)
            return made.detach().fill_(unwritten(made.dtype)).requires_grad_(made.requires_grad)

        return allocate

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(Tensor, name, poisoned(getattr(Tensor, name)))


def unwritten(dtype):
    """What memory holds that nobody has written to: NaN where there is one."""
    return math.nan if dtype.is_floating_point else 99


@pytest.fixture
def on_device(request, monkeypatch):
    """Where there is no GPU, a device that refuses what one would: a mix with tensors of the CPU.

    Compilers do not trace it.
    """
    if torch.cuda.is_available() or "fresh_compiler" in request.fixturenames:
        yield
        return
    refuse_in_kernels(monkeypatch)
    with FakeDevice():
        yield


GUARD = 64
MARK = 123


@pytest.fixture
def guarded(monkeypatch):
    """What ``torch.empty``, ``torch.zeros`` and the same methods of tensors make has marks around
    it, which must stay; in empty tensors an unwritten element shows, as NaN where there is one.
    """
    made = []

    def guard(filled):
        def allocate(*shape, dtype=None, device=None):
            if isinstance(shape[0], Tensor):  # a method of it
                like, *shape = shape
                dtype, device = dtype or like.dtype, device or like.device
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
    monkeypatch.setattr(Tensor, "new_empty", guard(filled=True))
    monkeypatch.setattr(Tensor, "new_zeros", guard(filled=False))
    yield
    monkeypatch.undo()
    for whole in made:
        marks = torch.cat([whole[:GUARD], whole[-GUARD:]])
        assert bool((marks == torch.full_like(marks, MARK)).all())


@pytest.fixture
def fresh_compiler():
    """Compiled code of other tests does not count towards this one's limit of recompilations."""
    torch._dynamo.reset()
    # The cache on disk does not know when a custom op's backward changes. The other setting is
    # the default of torch 2.13; before, users make it (docs/loss.md).
    with (
        torch._functorch.config.patch(enable_autograd_cache=False),
        torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True),
    ):
        yield
    torch._dynamo.reset()


@pytest.fixture
def backend_under(monkeypatch):
    """Makes backends run under a dispatch mode, which custom ops keep out of their body."""
    select = ops.select

    def install(mode):
        class Watched:
            def __init__(self, backend):
                self.backend = backend

            def __getattr__(self, name):
                def run(*args):
                    with mode:
                        return getattr(self.backend, name)(*args)

                return run

        monkeypatch.setattr(ops, "select", lambda *args: Watched(select(*args)))

    return install


@pytest.fixture(scope="session")
def emulated():
    """``bft_kernels._cuda``, its device code run by the emulation."""
    if build.CXX is None:
        pytest.skip("needs a C++ compiler")
    return build.build_module(ROOT / "build/emulation")


@pytest.fixture
def emulated_device(emulated, monkeypatch, seed):
    """The ``cuda`` backend takes tensors on the CPU, and runs them in the emulation.

    The number of processors, which is drawn, decides into how many parts a vocabulary is split.
    """
    emulation = Emulation(emulated, seed)
    monkeypatch.setattr(native, "DEVICE", "cpu")
    monkeypatch.setattr(native, "kernels", lambda: emulation)
    monkeypatch.setattr(inputs, "processors", lambda _: 1 + seed % 3)
    monkeypatch.setattr(native, "address", Address)
    return emulation


@pytest.fixture
def cuda_backend(request):
    """The ``cuda`` backend on a GPU, or in the emulation where there is none.

    What was emulated says nothing of a GPU that is there: without the module nothing runs.
    """
    if not torch.cuda.is_available():
        request.getfixturevalue("emulated_device")
    elif importlib.util.find_spec("bft_kernels._cuda") is None:
        pytest.skip("bft_kernels._cuda is not built: nothing of this backend can run on the GPU")


@pytest.fixture(scope="session")
def assemble(tmp_path_factory):
    """Compiles a file of the repository for an architecture, once."""

    @cache
    def run(source, arch):
        return assemble_for(arch, ROOT / source, tmp_path_factory.mktemp("assembled"))

    return run
