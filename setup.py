"""Declares the extension modules, without torch; csrc/ninja_build.py compiles them.

BFT_BUILD chooses:

    auto (default)  each module that this machine can compile, with the reason for those left out
    cpu             bft_kernels._cpu, or an error
    cuda            bft_kernels._cpu and bft_kernels._cuda, or an error
    none            pure Python: needs neither a compiler nor pybind11 nor ninja
"""

import os
import sys
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.errors import CompileError

sys.path.insert(0, str(Path(__file__).parent / "csrc"))  # pip does not put the root on sys.path
from ninja_build import CUDA_ARCHITECTURES, NinjaBuildExt

MODULES = {"auto": ["cpu", "cuda"], "cpu": ["cpu"], "cuda": ["cuda", "cpu"], "none": []}
MODE = os.environ.get("BFT_BUILD") or "auto"
if MODE not in MODULES:
    raise SystemExit(f"BFT_BUILD: got {MODE!r}, expected one of {', '.join(MODULES)}")

_ON_CUDA = (
    f"bft_kernels._cuda: nvcc compiles for {len(CUDA_ARCHITECTURES)} kinds of GPU, which takes "
    "minutes. TORCH_CUDA_ARCH_LIST=9.0 compiles for one; without a GPU, BFT_BUILD=cpu leaves it out"
)


class BuildExt(NinjaBuildExt):
    """Treats a module that cannot be built as an error, except in auto mode."""

    def build_extensions(self):
        """Build each module; keep in self.extensions those that were built."""
        for ext in list(self.extensions):
            if ext.name.endswith("_cuda"):
                print(_ON_CUDA, file=sys.stderr)
            try:
                self.build_extension(ext)
            except CompileError as error:
                if MODE != "auto":
                    message = f"BFT_BUILD={MODE} cannot build {ext.name}: {error}"
                    raise CompileError(message) from None
                print(f"BFT_BUILD=auto leaves out {ext.name}: {error}", file=sys.stderr)
                self.extensions.remove(ext)
                # An older build of it in the source tree would be imported in its place.
                Path(self.get_ext_filename(ext.name)).unlink(missing_ok=True)


def extension(name):
    """Return bft_kernels._NAME: the kernels of csrc/NAME and their binding."""
    kernels = [path for kind in ("cpp", "cu") for path in glob(f"csrc/{name}/*.{kind}")]
    return Extension(f"bft_kernels._{name}", [f"csrc/bindings/{name}.cpp", *sorted(kernels)])


setup(ext_modules=[extension(name) for name in MODULES[MODE]], cmdclass={"build_ext": BuildExt})
