"""What is to know of a loss to compare it with others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

Run = Callable[..., Tensor]  # of a Problem and its weighting, see losses.py

# plain: the mean. dft: the mean of confidence x nll. bft: balanced, over documents. The confidence
# and the weights are constants to the gradient.
WEIGHTINGS = ("plain", "dft", "bft")
# forward: no gradients. both: dH and dW. frozen: dH, of a head that is not trained (LoRA).
MODES = ("forward", "both", "frozen")

Products = tuple[int, int, int]  # in each of MODES, in G
# All logits are kept, or they are computed again for a gradient: for one product, or for each.
KEPT, AGAIN, AGAIN_EACH = (1, 3, 2), (1, 4, 3), (1, 4, 4)


@dataclass(frozen=True)
class Provider:
    """One loss to compare."""

    name: str
    # Ways to run it by name; of several the fastest here is reported.
    options: Mapping[str, Run]
    # Products that the method must do: of the mean, and of a weighted loss.
    plain: Products
    weighted: Products
    weightings: tuple[str, ...] = WEIGHTINGS
    modes: tuple[str, ...] = MODES  # of the others a backend's "exact" has the figures
    distribution: str = ""  # that it is installed from
    module: str = ""  # what must be importable
    gpu_only: bool = False
    compiles: bool = False  # is slow to start
    backend: str = ""  # of this package
    eps: float | None = None  # of a sampled gradient
    allowed: float = 0.2  # relative error that passes for rounding, sampling or filtering
    priority: int = 3  # who comes first where time is short

    @property
    def family(self) -> str:
        """Providers of one share a process."""
        return f"bft {self.backend}" if self.backend else self.name

    def products(self, weighting: str, mode: str) -> int:
        """In G."""
        return (self.plain if weighting == "plain" else self.weighted)[MODES.index(mode)]


PEERS: list[Provider] = []


def peer(
    name: str,
    plain: Products,
    weighted: Products | None = None,
    installed: str = "",
    options: Mapping[str, Mapping[str, Any]] | None = None,
    **more: Any,
) -> Callable[[Run], Run]:
    """Lists a loss, ``installed`` from a distribution that has a module: ``"trl: trl.kernels"``.

    ``weighted`` products are those of the mean if not given, ``options`` the arguments of each way
    to run it, and ``more`` fields of :class:`Provider`.
    """
    more["distribution"], _, more["module"] = installed.partition(": ")

    def add(run: Run) -> Run:
        ways = {key: partial(run, **how) for key, how in (options or {"": {}}).items()}
        PEERS.append(Provider(name, ways, plain, weighted or plain, **more))
        return run

    return add
