"""Weighting schemes of others, as functions: patterns for one of your own.

A scheme is a function of ``confidence [n]``, the labels' probabilities, and ``cu_seqlens [S + 1]``,
the boundaries of documents in it. It returns the weight of each token, ``[n]``, and of each
document, ``[S]``. ``HeadLoss`` and the commands find it by its import path:
``scheme="bft.schemes:focal"``. Weights are constants: no gradient goes through them. The papers
take the mean over labelled tokens, which is ``normalize="token"``.
"""

import inspect
import math
import pkgutil
from typing import Any

import torch
from torch import Tensor

from bft_kernels.settings import SCHEMES


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


def every_document(cu_seqlens: Tensor, like: Tensor) -> Tensor:
    """The same weight for each document, 1."""
    return like.new_ones(cu_seqlens.numel() - 1)


_LOADED: dict[str, Any] = {}  # for compiled code, which imports nothing


def load_scheme(scheme: Any) -> Any:
    """The function at an import path ``package.module:name``; names and functions as they are.

    Raises:
        ValueError: there is no such scheme, or it cannot be imported.
        TypeError: what is there cannot be called, or not with the two arguments of a scheme.
    """
    if not isinstance(scheme, str) or scheme in SCHEMES:
        return scheme
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
    _check_arguments(scheme, found)
    _LOADED[scheme] = found
    return found


def _check_arguments(scheme: str, function: Any) -> None:
    try:
        signature = inspect.signature(function)
    except ValueError:  # of a builtin
        return
    try:
        signature.bind(None, None)
    except TypeError as error:
        raise TypeError(
            f"scheme: {scheme!r} takes {signature}, expected (confidence, cu_seqlens), and a "
            "return value (token_weight, sequence_weight)"
        ) from error
