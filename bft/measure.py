"""What a model does between its head and its loss, measured instead of looked up.

:class:`StandIn` takes the head's place in the model's own forward and answers with known numbers.
The model's output then tells what it does to its logits, and its loss whether it shifts its labels.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bft.guard import describe
from bft.head import (
    EXPRESSIBLE,
    LogitTransform,
    UnsupportedModel,
    find_head,
    in_place_of,
    vocabulary_of,
)

_SAY_SHIFT = (
    "Say which labels it takes: patch_model(..., shift=True) if it predicts labels[t + 1] at t, "
    "shift=False if labels[t]."
)


def run_body(
    model: nn.Module,
    own: Callable[..., Any],
    call: Mapping[str, Any],
    *,
    measure: bool = False,
    labels_on: torch.device | None = None,
) -> tuple[Any, "StandIn"]:
    """A model's ``own`` forward with a stand-in for its head: its output, and the stand-in.

    ``call`` has the forward's arguments without labels. With ``measure`` the stand-in's answer is
    :func:`probe`, else it has no positions. The forward gets :func:`probe_labels` if ``labels_on``
    is their device.

    Raises:
        UnsupportedModel: the forward fails on those labels only, or is not the class's own.
    """
    outer, head = find_head(model)
    stand_in = StandIn(outer, head, measure)
    labels = {"labels": probe_labels(stand_in.vocabulary, labels_on)} if labels_on else {}
    with in_place_of(model, outer, stand_in):
        try:
            return own(**call, **labels, return_dict=True), stand_in
        except Exception as error:
            if labels and _succeeds(own, call):
                raise UnsupportedModel(
                    f"model: whether {type(model).__name__} shifts its labels could not be "
                    "measured: its forward failed on labels of a known batch "
                    f"({type(error).__name__}: {error}). {_SAY_SHIFT}"
                ) from error
            if _is_models_own(model, own) or isinstance(error, torch.OutOfMemoryError):
                raise
            raise UnsupportedModel(
                f"model: {describe(own)}, which took the place of forward before patch_model, "
                f"failed without labels ({type(error).__name__}: {error}). Where a trainer put it "
                "there, leave the model unpatched and return fused_loss(model, batch, loss)[0] "
                "from the trainer's compute_loss"
            ) from error


def _is_models_own(model: nn.Module, forward: Callable[..., Any]) -> bool:
    """Whether it is the class's forward, or accelerate's way around that."""
    wrapped = "_hf_hook" in model.__dict__ or "_original_forward" in model.__dict__
    return wrapped or getattr(forward, "__func__", None) is type(model).forward


def _succeeds(own: Callable[..., Any], call: Mapping[str, Any]) -> bool:
    try:
        own(**call, return_dict=True)
    except Exception:
        return False
    return True


class StandIn(nn.Module):
    """Takes the head's place in the model's own forward and keeps the hidden states it is given.

    Its answer stands for logits: no positions at all, or :func:`probe` in float64, whatever the
    model computes in, so that a scale is read off to full precision.
    """

    answer: Tensor  # of a measuring one

    def __init__(self, outer: nn.Module, head: Any, measure: bool) -> None:
        super().__init__()
        self.__dict__["head"] = outer  # not as a submodule
        self.vocabulary = vocabulary_of(head)
        self.measure = measure
        self.received: list[Tensor] = []

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["head"], name)  # models ask for lm_head.weight.dtype

    def forward(self, hidden: Tensor) -> Tensor:
        self.received.append(hidden)
        device = hidden.device
        wide = torch.float32 if device.type == "mps" else torch.float64
        if self.measure:
            self.answer = probe(self.vocabulary, device, wide)
            return self.answer.clone()  # some models write into their logits
        return torch.empty(1, 0, self.vocabulary, device=device, dtype=hidden.dtype)

    def hidden_for(self, target: Tensor) -> Tensor:
        """The hidden states ``[B, T, D]`` of ``target [B, T]``; raises if there are none."""
        if (times := len(self.received)) != 1:
            raise UnsupportedModel(
                f"model: its forward called its head {times} times, expected once"
            )
        hidden = self.received[0]
        if hidden.shape[:-1] != target.shape:
            raise ValueError(
                f"labels: got shape {tuple(target.shape)}, expected {tuple(hidden.shape[:-1])}, "
                "the positions that reach the head (logits_to_keep does not go with labels)"
            )
        return hidden


# A softcap is still a straight line at the first in float64, and flat at the second; float16 has
# both.
_TINY, _HUGE = 2.0**-24, 2.0**14


def probe(vocabulary: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """``[1, 5, V]``: zeros, tiny, huge, minus huge, and sizes from 1e-3 to 1e3 of both signs."""
    rows = torch.zeros(5, vocabulary, dtype=dtype, device=device)
    for row, value in enumerate((0.0, _TINY, _HUGE, -_HUGE)):
        rows[row] = value
    sign = 1 - 2 * (torch.arange(vocabulary, dtype=torch.int64, device=device) % 2)
    rows[4] = sign * torch.logspace(-3, 3, vocabulary, dtype=dtype, device=device)
    return rows[None]


@torch.no_grad()
def read_transform(sent: Tensor, logits: Any, name: str) -> LogitTransform:
    """The transform that made ``logits`` of :func:`probe`, which the stand-in sent.

    A softcap may be scaled: ``cap * tanh(s * y / cap)`` has a softcap of ``cap / s`` and a
    temperature of ``1 / s``.

    Raises:
        UnsupportedModel: the logits are not one such function of each entry; the message says what
            was seen.
    """
    if not isinstance(logits, Tensor) or logits.shape != sent.shape:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        _refuse(name, f"turns logits {tuple(sent.shape)} into {got}")
    zero, tiny, huge = logits[0, :3].double()
    offset = int((zero != 0).sum())
    if offset:
        _refuse(name, f"masks or adds to {offset} of {zero.numel()} entries of its logits")
    scale, limit = float(tiny[0]) / _TINY, float(huge[0])
    if not scale > 0:
        _refuse(name, f"multiplies its logits by {scale}")
    # A model that casts its logits to float32 gives the scale to that precision only.
    scale = 1.0 if abs(scale - 1) < 1e-6 else scale
    softcap = limit / scale if limit < 0.5 * scale * _HUGE else None
    transform = LogitTransform(softcap, 1.0 / scale)

    expected = transform(sent.double())
    error = (logits.double() - expected).abs() / expected.abs().clamp_min(1e-30)
    different = int((error > 16 * max(torch.finfo(logits.dtype).eps, 2**-52)).any(1).sum())
    if different:
        _refuse(name, f"changes {different} of {zero.numel()} logits other than by {transform}")
    return transform


def probe_labels(vocabulary: int, device: torch.device) -> Tensor:
    """``[1, 5]``: one label, at the last row of :func:`probe`, of a low logit."""
    labels = torch.full((1, 5), -100, dtype=torch.int64, device=device)
    labels[0, 4] = max(vocabulary - 1 - vocabulary % 2, 0)
    return labels


@torch.no_grad()
def read_shift(loss: Tensor, transform: LogitTransform, vocabulary: int, name: str) -> bool:
    """Whether the model shifts its labels, from its own loss of :func:`probe_labels`.

    If it does, it predicts the label from the row before, whose logits are all equal.

    Raises:
        UnsupportedModel: the loss is neither of the two cross-entropies.
    """
    wide = torch.float32 if loss.device.type == "mps" else torch.float64
    logits = transform(probe(vocabulary, loss.device, wide)[0, 3:])  # [2, V]
    label = int(probe_labels(vocabulary, loss.device)[0, 4])
    shifted, plain = (logits.logsumexp(1) - logits[:, label]).tolist()
    own = float(loss)
    shift = abs(own - shifted) <= abs(own - plain)
    nearest = shifted if shift else plain
    if not abs(own - nearest) <= 0.02 * abs(nearest):  # a narrow type's rounding
        raise UnsupportedModel(
            f"model: {name} computes {own:.6g} as its own loss of a known batch, expected "
            f"{shifted:.6g} (labels shifted by one) or {plain:.6g} (labels not shifted). "
            f"{_SAY_SHIFT}"
        )
    return shift


def _refuse(name: str, what: str) -> None:
    raise UnsupportedModel(f"model: {name} {what}. {EXPRESSIBLE}")
