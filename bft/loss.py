"""The training loss: its settings, its targets, its normaliser. Nothing here knows Hugging Face.

Notation: ``B`` rows of ``T`` positions, hidden size ``D``, vocabulary size ``V``, ``S`` documents.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from bft.schemes import load_scheme
from bft_kernels import BalancedLinearCrossEntropyLoss, balanced_linear_cross_entropy, linear_nll
from bft_kernels.checks import FLOAT_DTYPES, check_finite, check_tensor
from bft_kernels.settings import Settings, TrainingSettings
from bft_kernels.values import check_int
from bft_kernels.weighting import cu_seqlens_from_position_ids, shift_labels

IGNORE = -100
# What others call weights of tokens. A model's forward would take them and do nothing.
MISNAMED = ("weights", "token_weights", "loss_weight", "loss_weights", "loss_scale")


@dataclass(frozen=True)
class Head:
    """A language model's last layer, ``z = softcap(hidden @ weight.T + bias) / temperature``."""

    weight: Tensor  # [V, D]
    bias: Tensor | None = None  # [V]
    softcap: float | None = None
    temperature: float = 1.0
    # (a, b): adds a @ b.T to the product; a [..., r] lies as the hidden states do, b is [V, r].
    adapter: tuple[Tensor, Tensor] | None = None


# What a fused head calls, with positional arguments: hidden [B, T, D], head, target [B, T] int64
# aligned with hidden, cu_seqlens [S + 1] over the B * T positions (None: a row is a document),
# num_items and, only if the batch holds weights, token_weight [B, T], aligned as target is. It
# returns the loss, and what is kept as the statistics of the call.
LossFunction = Callable[..., tuple[Tensor, Any]]


@dataclass(frozen=True)
class HeadLoss(TrainingSettings):
    """The balanced loss of a fused head. See ``bft_kernels.balanced_linear_cross_entropy``.

    ``seed`` only matters to ``gradient="sampled"``. ``None`` draws one from torch's CPU generator
    at every call, which ``torch.manual_seed`` makes repeatable and a checkpoint resumes. A number
    gives every call the same draws, for tests. Ranks differ in both cases.

    ``scheme`` may also be a function's import path, ``package.module:name``; see
    :mod:`bft.schemes`.

    Raises what ``bft_kernels.BalancedLinearCrossEntropyLoss`` does for an option that cannot be.
    """

    max_buffer_bytes: int | None = Settings.max_buffer_bytes
    seed: int | None = None

    def __post_init__(self) -> None:
        options = {**vars(self), "scheme": load_scheme(self.scheme, self.window)}
        if options.pop("seed") is not None:
            check_int("seed", self.seed, -(2**63))
        BalancedLinearCrossEntropyLoss(**options)  # checks them
        if self.backend != "auto":
            _check_backend(self.backend)

    def __call__(
        self,
        hidden: Tensor,  # [B, T, D]
        head: Head,
        target: Tensor,  # [B, T] int64
        cu_seqlens: Tensor | None = None,  # [S + 1]
        num_items: int | Tensor | None = None,
        token_weight: Tensor | None = None,  # [B, T]
    ) -> tuple[Tensor, Any]:
        """The loss, a scalar in float32 (float64 for float64 inputs), and its token statistics.

        ``num_items`` is the sum of :meth:`count_items` over the optimizer step's micro-batches and
        ranks; ``None``: this call's. A step without labels has 0, and a loss of 0.
        """
        seed = draw_seed(self.seed) if self.gradient == "sampled" else None
        value, stats = balanced_linear_cross_entropy(
            hidden,
            target=target,
            ignore_index=IGNORE,
            cu_seqlens=cu_seqlens,
            num_items=num_items,
            token_weight=token_weight,
            return_stats=True,
            **vars(head),
            **{**vars(self), "scheme": load_scheme(self.scheme, self.window), "seed": seed},
        )
        return value, stats

    def count_items(self, target: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """What this loss divides by, int64 on ``target``'s device.

        That is the number of documents that hold a label, or of labelled tokens. The arguments are
        the first of what :func:`batch_targets` returns: weights change no number of items.
        """
        labelled = target != IGNORE
        if self.normalize == "token":
            return labelled.sum()
        if cu_seqlens is None:
            return labelled.any(-1).sum()
        before = torch.nn.functional.pad(labelled.flatten().cumsum(0), (1, 0))
        edges = cu_seqlens.to(before.device, torch.int64, non_blocking=True)
        return (before[edges].diff() > 0).sum()


def _check_backend(name: str) -> None:
    """Raises ValueError for a name that is no backend's, on whatever device it is to run."""
    hidden = torch.zeros(0, 1, dtype=torch.float32, device="cpu")
    weight = torch.zeros(1, 1, dtype=torch.float32, device="cpu")
    target = torch.zeros(0, dtype=torch.int64, device="cpu")
    with contextlib.suppress(RuntimeError):  # a backend that does not run on a CPU
        linear_nll(hidden, weight, target, backend=name)


def draw_seed(seed: int | None = None) -> int:
    """A seed in ``[0, 2**31)`` that no two ranks share, even where their generators agree.

    It is the CPU's generator's, whatever device the model is on: a device's would be waited for.
    """
    if seed is None:
        seed = int(torch.randint(2**31, (), dtype=torch.int64, device="cpu"))
    rank = dist.get_rank() if is_distributed() else 0
    # An odd stride keeps seeds of different ranks apart modulo 2**31, and the sampling hash is
    # independent over seeds.
    return (seed + rank * 0x9E3779B1) % 2**31


class Targets(NamedTuple):
    """What the positions of a batch are to predict, and where its documents lie."""

    target: Tensor  # [B, T] int64, aligned with the hidden states
    cu_seqlens: Tensor | None  # [S + 1] over the B * T positions; None: a row is a document
    token_weight: Tensor | None = None  # [B, T], aligned with target

    def documents(self) -> Tensor:
        """The document of each position, ``[B * T]`` int64."""
        place = torch.arange(self.target.numel(), dtype=torch.int64, device=self.target.device)
        if self.cu_seqlens is None:
            return place // self.target.shape[1]
        return torch.bucketize(place, self.cu_seqlens[1:].to(place).contiguous(), right=True)


def is_labelled(batch: Mapping[str, Any]) -> bool:
    """Whether a batch says what is to be predicted."""
    return any(batch.get(name) is not None for name in ("labels", "shift_labels", "targets"))


def batch_targets(batch: Mapping[str, Any], *, shift: bool = True) -> Targets:
    """Targets aligned with the hidden states, and document boundaries, of a batch.

    Boundaries come from the first of these that the batch holds: ``cu_seqlens``, ``cu_seq_lens_q``
    (flash attention's), ``position_ids`` that restart. Without any, each row is one document.
    ``labels`` are shifted: ``target[b, t] = labels[b, t + 1]``, and the last position of a document
    is ignored, so that no document is predicted from the one before it. ``shift_labels`` are taken
    as they are, and with ``shift=False`` so are ``labels``, as masked models expect them.
    ``token_weight`` lies where the labels lie, and is shifted with them. ``targets``, made before
    by :func:`aligned`, are handed on.

    Args:
        batch: ``labels`` or ``shift_labels [B, T]`` int64, ``position_ids [B, T]`` or ``[1, T]``
            or multimodal ones ``[3 or 4, B, T]``, ``cu_seqlens [S + 1]`` over the flattened
            ``B * T`` positions, ``token_weight [B, T]`` of floats.
        shift: whether ``labels`` are shifted.

    Raises:
        TypeError, ValueError: no labels, or shapes or types that do not fit.
    """
    if not is_labelled(batch):
        raise ValueError("labels: the batch holds neither labels nor shift_labels")
    known: Targets | None = batch.get("targets")
    if known is not None:
        return known
    name = "labels" if batch.get("shift_labels") is None else "shift_labels"
    rows = batch[name]
    if not isinstance(rows, Tensor) or rows.dim() != 2 or rows.dtype != torch.int64:
        got = f"{tuple(rows.shape)} {rows.dtype}" if isinstance(rows, Tensor) else type(rows)
        raise TypeError(f"{name}: got {got}, expected a tensor (B, T) of int64")
    cu_seqlens, positions = batch.get("cu_seqlens"), batch.get("position_ids")
    if cu_seqlens is None:
        cu_seqlens = batch.get("cu_seq_lens_q")
    if cu_seqlens is None and positions is not None:
        fits = positions.shape[-2:] in (rows.shape, (1, rows.shape[1]))
        if not fits or positions.shape[:-2] not in ((), (3,), (4,)):
            raise ValueError(
                f"position_ids: got shape {tuple(positions.shape)}, expected {tuple(rows.shape)}, "
                f"that of {name}, one row of it, or 3 or 4 such planes"
            )
        # Of four planes the first holds the text's positions, as in transformers. With only those
        # of time, height and width, models let all of a row see each other: it is one document.
        if positions.dim() == 2 or len(positions) == 4:
            text = positions if positions.dim() == 2 else positions[0]
            cu_seqlens = cu_seqlens_from_position_ids(text.expand(rows.shape))
    target = shift_labels(rows, cu_seqlens, IGNORE)  # checks that the boundaries fit, too
    shift = shift and name == "labels"
    target = target if shift else rows
    return Targets(target, cu_seqlens, _weight_of(batch.get("token_weight"), target, shift))


def _weight_of(weight: object, target: Tensor, shift: bool) -> Tensor | None:
    """A batch's ``token_weight [B, T]`` beside its target; its values are looked at on a CPU."""
    if weight is None:
        return None
    check_tensor("token_weight", weight, target.shape, FLOAT_DTYPES, target.device)
    assert isinstance(weight, Tensor)
    if shift:
        weight = torch.nn.functional.pad(weight[:, 1:], (0, 1))
    if weight.device.type == "cpu" and not torch.compiler.is_compiling():
        check_finite("token_weight", torch.where(target == IGNORE, 0, weight))
    return weight


def aligned(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch with ``targets`` in place of ``labels``, so that no model shifts them."""
    rest = {k: v for k, v in batch.items() if k not in ("labels", "token_weight")}
    return rest | {"targets": batch_targets(batch)}


def undo_rank_mean(loss: Tensor) -> Tensor:
    """``loss * world_size``: makes data parallelism add up ranks instead of averaging them.

    With ``num_items`` the loss is this rank's part of a sum, divided once by the global count. DDP
    and FSDP average gradients over ranks, which would divide again. Call ``backward`` on this
    function's result, and report ``loss`` itself, summed over ranks.

    ``accelerator.backward`` divides too: leave its ``gradient_accumulation_steps`` at 1.
    """
    return loss * (dist.get_world_size() if is_distributed() else 1)


def is_distributed() -> bool:
    """Whether this process is one of several that know each other."""
    return dist.is_available() and dist.is_initialized()
