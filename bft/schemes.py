"""Weighting schemes of others, as functions: patterns for one of your own.

A scheme is a function of ``confidence [n]``, the labels' probabilities, and ``cu_seqlens [S + 1]``,
the boundaries of documents in it. It returns the weight of each token, ``[n]``, and of each
document, ``[S]``. ``HeadLoss`` and the commands find it by its import path:
``scheme="bft.schemes:focal"``. Weights are constants: no gradient goes through them. The papers
take the mean over labelled tokens, which is ``normalize="token"``. A function with a parameter
``window`` that has no default gets the setting of that name.

``shuffled``, ``token_only`` and ``document_only`` are controls: each takes one thing away from
``bft``.
"""

import functools
import inspect
import math
import pkgutil
from typing import Any

import torch
from torch import Tensor

from bft_kernels import token_weights
from bft_kernels.settings import SCHEMES, check_scheme_call


def dft(confidence: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """``w = c``. Dynamic Fine-Tuning, arXiv 2508.05629; the same as ``scheme="dft"``."""
    return confidence, every_document(cu_seqlens, confidence)


def profit(confidence: Tensor, cu_seqlens: Tensor, threshold: float = 0.1) -> tuple[Tensor, Tensor]:
    """``w = 1`` where ``c >= threshold``, else 0. ProFit, arXiv 2601.09195, and its code."""
    return (confidence >= threshold).to(confidence), every_document(cu_seqlens, confidence)


def infosft(confidence: Tensor, cu_seqlens: Tensor, known: float = 0.93) -> tuple[Tensor, Tensor]:
    """``w = c max(0, 1 - logit(c) / logit(known))``. InfoSFT, arXiv 2605.14967, as its code has it.

    The paper's ``c (C - logit(c))`` is this times ``C = logit(known)``. Tokens of medium confidence
    weigh most, and those of ``c >= known`` nothing.
    """
    tiny = 1e-30  # whose logit is finite
    share = 1 - confidence.clamp_min(tiny).logit() / math.log(known / (1 - known))
    return confidence * share.clamp_min(0), every_document(cu_seqlens, confidence)


def focal(confidence: Tensor, cu_seqlens: Tensor, gamma: float = 2.0) -> tuple[Tensor, Tensor]:
    """``w = (1 - c)**gamma``. The focal loss, arXiv 1708.02002, with its factor as a constant."""
    return (1 - confidence) ** gamma, every_document(cu_seqlens, confidence)


def shuffled(confidence: Tensor, cu_seqlens: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """``bft``, its token weights in another order inside each document: drawn anew in each call.

    The control for *which* tokens are held back. The draws are from torch's CPU generator, which a
    checkpoint resumes.
    """
    weights = token_weights(confidence, cu_seqlens, scheme="bft", window=window)
    count = confidence.numel()
    draw = torch.rand(count, dtype=torch.float64, device="cpu").to(confidence.device)
    place = torch.arange(count, dtype=torch.int64, device=confidence.device)
    document = torch.searchsorted(cu_seqlens[1:].to(place), place, right=True)
    order = draw.argsort()
    order = order[document[order].argsort(stable=True)]  # drawn places, document by document
    return weights.token_weight[order], weights.sequence_weight


def token_only(confidence: Tensor, cu_seqlens: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """``bft``'s token weights, and the weight 1 for each document."""
    weights = token_weights(confidence, cu_seqlens, scheme="bft", window=window)
    return weights.token_weight, every_document(cu_seqlens, confidence)


def document_only(confidence: Tensor, cu_seqlens: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """``bft``'s document weights, and the weight 1 for each token."""
    weights = token_weights(confidence, cu_seqlens, scheme="bft", window=window)
    return torch.ones_like(confidence), weights.sequence_weight


def every_document(cu_seqlens: Tensor, like: Tensor) -> Tensor:
    """The same weight for each document, 1."""
    return like.new_ones(cu_seqlens.numel() - 1)


_LOADED: dict[str, Any] = {}  # for compiled code, which imports nothing


def load_scheme(scheme: Any, window: int | None = None) -> Any:
    """The function at an import path ``package.module:name``; names and functions as they are.

    One that asks for the ``window`` gets it, if it is given.

    Raises:
        ValueError: there is no such scheme, or it cannot be imported.
        TypeError: what is there cannot be called, or not with the two arguments of a scheme.
    """
    if isinstance(scheme, str) and scheme not in SCHEMES:
        scheme = _found(scheme)
    if window is None or not takes_window(scheme):
        return scheme
    return functools.partial(scheme, window=window)


@torch.compiler.assume_constant_result
def takes_window(scheme: Any) -> bool:
    """Whether a scheme is a function with a parameter ``window`` that has no default."""
    if not callable(scheme):
        return False
    try:
        option = inspect.signature(scheme).parameters.get("window")
    except ValueError:  # of a function in C
        return False
    return option is not None and option.default is option.empty


def _found(scheme: str) -> Any:
    """The function at an import path. Raises as :func:`load_scheme`."""
    if torch.compiler.is_compiling() and scheme in _LOADED:
        return _LOADED[scheme]
    if ":" not in scheme:
        names = ", ".join(map(repr, SCHEMES))
        path = "the import path of a function, as 'package.module:name'"
        raise ValueError(f"scheme: got {scheme!r}, expected one of {names}, or {path}")
    try:
        found = pkgutil.resolve_name(scheme)
    except Exception as error:  # a module may raise anything
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"scheme: {scheme!r} cannot be imported ({reason})") from error
    if not callable(found):
        raise TypeError(f"scheme: {scheme!r} is of {type(found)}, expected a function")
    check_scheme_call(found, repr(scheme), **({"window": 1} if takes_window(found) else {}))
    _LOADED[scheme] = found
    return found
