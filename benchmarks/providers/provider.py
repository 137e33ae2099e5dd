"""What must be known about a loss to compare it with others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

Run = Callable[..., Tensor]  # of a Problem and its weighting, see losses.py

# plain: the mean. dft: the mean of confidence x nll. bft: balanced, over documents. The gradient
# takes confidences and weights as constants.
WEIGHTINGS = ("plain", "dft", "bft")
# forward: no gradients. both: dH and dW. frozen: dH, of a head that is not trained (LoRA).
MODES = ("forward", "both", "frozen")

Products = tuple[int, int, int]  # for each of MODES, in G
# Logits are all kept, or computed again for the gradients: once, or once for each gradient.
KEPT, AGAIN, AGAIN_EACH = (1, 3, 2), (1, 4, 3), (1, 4, 4)


@dataclass(frozen=True)
class Provider:
    """One loss to compare."""

    name: str
    # The ways to run it, by name; the fastest one is reported.
    options: Mapping[str, Run]
    # The products that the method must do for the mean, and for a weighted loss.
    plain: Products
    weighted: Products
    weightings: tuple[str, ...] = WEIGHTINGS
    modes: tuple[str, ...] = MODES  # for the others see the backend's "exact"
    distribution: str = ""  # the distribution to install
    module: str = ""  # the module that must be importable
    gpu_only: bool = False
    compiles: bool = False  # it is slow to start
    backend: str = ""  # of this package, if it is ours
    eps: float | None = None  # of a sampled gradient
    allowed: float = 0.2  # largest relative error by rounding, sampling or filtering
    priority: int = 3  # the order if time is short

    @property
    def family(self) -> str:
        """The family; its providers share a process."""
        return f"bft {self.backend}" if self.backend else self.name

    def products(self, weighting: str, mode: str) -> int:
        """The products of a weighting and mode, in G."""
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
    """Lists a loss. ``installed`` names a distribution and its module: ``"trl: trl.kernels"``.

    Without ``weighted`` its products are those of the mean. ``options`` has the arguments of each
    way to run it, and ``more`` has fields of :class:`Provider`.
    """
    more["distribution"], _, more["module"] = installed.partition(": ")

    def add(run: Run) -> Run:
        ways = {key: partial(run, **how) for key, how in (options or {"": {}}).items()}
        PEERS.append(Provider(name, ways, plain, weighted or plain, **more))
        return run

    return add
