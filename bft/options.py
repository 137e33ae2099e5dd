"""The loss's options: their names, defaults and help. The flags, the YAML file and
:class:`bft.loss.HeadLoss` have them from here; what values they take, ``bft_kernels`` says.

Nothing here imports torch, which takes a second that ``--help`` does without.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from bft.loss import HeadLoss

Scheme = Literal["sft", "dft", "bft", "bft-v1", "bft-v1-code"]


@dataclass(frozen=True)
class LossOptions:
    """The loss as a command is told of it."""

    scheme: Scheme = "bft"
    """Token and sequence weights: bft, dft, sft, or the first versions of BFT."""
    window: int = 256
    """Labelled tokens in a confidence window; about a quarter of an answer is a good size."""
    gamma: float = 1.0
    """Exponent of bft-v1-code."""
    normalize: Literal["sequence", "token"] = "sequence"
    """Divide by the optimizer step's documents, or by its labelled tokens."""
    gradient: Literal["exact", "sampled"] = "exact"
    """The loss's gradient: the formula's, or its unbiased sparse estimate."""
    eps: float = 2**-12
    """Sampled gradient: entries with a probability below this are sampled."""
    backend: str = "auto"
    """Backend of the loss, see `bft info`."""
    max_buffer_mib: int | None = None
    """Memory of the loss's logit blocks; 64 on a CPU and 528 on a GPU if not given."""

    def loss(self) -> HeadLoss:
        """The loss that these options describe; raises what ``HeadLoss`` does if there is none."""
        from bft.loss import HeadLoss

        options = {field.name: getattr(self, field.name) for field in fields(LossOptions)}
        mib = options.pop("max_buffer_mib")
        return HeadLoss(**options, max_buffer_bytes=None if mib is None else mib * 2**20)


# Options that the values of another one ignore.
ONLY_WITH = {
    "window": ("scheme", ("bft", "bft-v1", "bft-v1-code")),
    "gamma": ("scheme", ("bft-v1-code",)),
    "eps": ("gradient", ("sampled",)),
}
