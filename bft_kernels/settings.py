"""The options of the loss: one list, from which every layer takes what it needs.

The defaults and checks of the public functions' keywords, the schemas of the custom ops, the
modules, the table in docs/loss.md, ``bft.HeadLoss`` and the flags of ``bft`` follow from the fields
of :class:`Settings`. This file imports no torch, so that ``bft --help`` is quick.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from bft_kernels.values import (
    check_bool,
    check_choice,
    check_int,
    check_number,
    check_positive,
    check_type,
)

if TYPE_CHECKING:
    from torch import Tensor, dtype
else:
    Tensor = dtype = Any

SchemeFunction = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
SCHEMES = ("sft", "dft", "bft", "bft-v1", "bft-v1-code")
LOCAL_SCHEMES = ("sft", "dft")  # a token's weight depends on that token alone
CALLABLE = "callable"  # the scheme of a call whose weights are made outside of the ops


def check_scheme(name: str, value: object) -> None:
    """Raises unless ``value`` is one of :data:`SCHEMES` or a callable."""
    if isinstance(value, str):
        check_choice(name, value, SCHEMES)
    elif not callable(value):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a name or a callable")


def check_scheme_call(scheme: Callable[..., Any], name: str | None = None, **more: object) -> None:
    """Raises TypeError unless a callable takes the arguments of a scheme, and ``more`` by name."""
    try:
        signature = inspect.signature(scheme)
    except ValueError:  # of a function in C
        return
    try:
        signature.bind(None, None, **more)
    except TypeError as error:
        name = name or getattr(scheme, "__qualname__", type(scheme).__qualname__)
        arguments = ", ".join(("confidence", "cu_seqlens", *more))
        raise TypeError(
            f"scheme: {name} takes {signature}, expected ({arguments}), and a return value "
            "(token_weight, sequence_weight)"
        ) from error


def check_float_type(name: str, value: object) -> None:
    """Raises unless ``value`` is one of the dtypes that ``hidden`` may have."""
    from bft_kernels.checks import FLOAT_DTYPES  # and torch, see above

    check_choice(name, value, FLOAT_DTYPES)


def check_names(name: str, value: object, choices: Sequence[str]) -> None:
    """Raises unless ``value`` is a tuple or a list of some of ``choices``."""
    check_type(name, value, (tuple, list), "a tuple of names")
    assert isinstance(value, (tuple, list))
    for one in value:
        check_choice(name, one, choices)


# The ops that take options: token losses, weighted sums of them, and weights from token losses. An
# op's schema leaves out what it does not read: each argument costs host time in every call.
NLL, WEIGHTED, BALANCED = OPS = ("nll", "weighted", "balanced")
LOSSES, WEIGHTS = (NLL, WEIGHTED), (WEIGHTED, BALANCED)


def _option(
    default: Any,
    check: Callable[..., None],
    text: str,
    *,
    ops: tuple[str, ...] = LOSSES,
    **limits: Any,
) -> Any:
    """A field: its default, how a value is checked, a line of documentation, and who reads it."""
    checks = functools.partial(check, **limits) if limits else check
    metadata = {"check": checks, "help": text, "ops": ops, "choices": limits.get("choices")}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class TrainingSettings:
    """The options that a training run chooses. ``bft``'s flags and ``bft.HeadLoss`` inherit them.

    Field names are those of the public keywords, and class attributes are their defaults.
    """

    scheme: str | SchemeFunction = _option(  # noqa: RUF009  as the others
        "bft", check_scheme, "the weighting scheme: `sft`, `dft`, `bft`, `bft-v1`, `bft-v1-code`, "
        "or a function (in `bft` its import path, `module:name`)", ops=WEIGHTS,
    )  # fmt: skip
    window: int = _option(
        256, check_int, "labelled tokens in a window; with twice an answer's length or more, each "
        "window is the whole answer", low=1, ops=WEIGHTS,
    )  # fmt: skip
    gamma: float = _option(1.0, check_positive, "exponent of `bft-v1-code`", ops=WEIGHTS)
    gradient: str = _option(
        "exact", check_choice, "`exact`, or `sampled`: an unbiased sparse estimate",
        choices=("exact", "sampled"), ops=(NLL,),
    )  # fmt: skip
    eps: float = _option(
        2**-12, check_positive, "`sampled` always keeps an entry with `p >= eps`", high=1.0,
        ops=(NLL,),
    )  # fmt: skip
    backend: str = _option(
        "auto", check_type, "`auto` or a backend's name", kind=str, what="a name", ops=OPS
    )
    normalize: str = _option(
        "sequence", check_choice, "divide by documents (`sequence`) or by labels (`token`)",
        choices=("sequence", "token"), ops=(BALANCED,),
    )  # fmt: skip


@dataclass(frozen=True)
class Settings(TrainingSettings):
    """The options of one call, unchecked; see :func:`check_settings`."""

    ignore_index: int = _option(
        -100, check_int, "tokens with this target have loss 0 and get no gradient", low=-(2**63)
    )
    shift: bool = _option(
        False, check_bool, "labels are not shifted yet: position `t` predicts `target[..., t + 1]`",
        ops=(),
    )  # fmt: skip
    softcap: float | None = _option(
        None, check_positive, "`y -> softcap * tanh(y / softcap)`, before the temperature"
    )
    temperature: float = _option(1.0, check_positive, "divides the logits")
    label_smoothing: float = _option(
        0.0, check_number, "part of the label that is spread over the vocabulary", low=0.0, high=1.0
    )
    z_loss: float = _option(0.0, check_number, "factor of `lse**2`", low=0.0)
    reduction: str = _option(
        "mean", check_choice, "`mean` over labelled tokens, `sum` or `none`",
        choices=("none", "mean", "sum"), ops=(),
    )  # fmt: skip
    max_buffer_bytes: int | None = _option(
        None, check_int, "budget of the blocks of logits; the default depends on the device", low=1
    )
    check: bool | None = _option(
        None, check_bool, "`True` checks all values, `False` none, `None` those on the CPU"
    )
    return_stats: bool = _option(False, check_bool, "also return statistics of each token")
    hidden_variance: bool = _option(
        False, check_bool, "with `sampled`, also the expected squared error of rows of `dH`",
        ops=(NLL,),
    )  # fmt: skip
    out_dtype: dtype | None = _option(  # noqa: RUF009  as the others
        None, check_float_type, "type of the loss; by default that of the sums", ops=()
    )
    return_z_loss: bool = _option(
        False, check_bool, "also return the z-loss's part of the loss", ops=()
    )
    differentiable: Sequence[str] = _option(
        (), check_names, "statistics with a gradient: `lse`, `entropy`",
        choices=("lse", "entropy"), ops=(NLL,),
    )  # fmt: skip
    top_k: int = _option(
        0, check_int, "how many of the most probable tokens to return", low=0, ops=(NLL,)
    )


NAMES = tuple(option.name for option in fields(Settings))
values_of = operator.attrgetter(*NAMES)
_CHECKS = tuple((f.name, f.default, f.metadata["check"]) for f in fields(Settings))
_SCHEMA_TYPES = {
    "int": "int",
    "int | None": "int?",
    "float": "float",
    "float | None": "float?",
    "bool": "bool",
    "bool | None": "bool?",
    "str": "str",
    "str | SchemeFunction": "str",
    "dtype | None": "ScalarType?",
    "Sequence[str]": "str[]",
}
# By op: the names and values of the options that it takes, and the part of its schema for them.
TAKEN = {op: tuple(f.name for f in fields(Settings) if op in f.metadata["ops"]) for op in OPS}
options_of = {op: operator.attrgetter(*names) for op, names in TAKEN.items()}
SCHEMA = {
    op: ", ".join(
        f"{_SCHEMA_TYPES[str(f.type)]} {f.name}" for f in fields(Settings) if f.name in of
    )
    for op, of in TAKEN.items()
}


def check_settings(settings: Settings) -> None:
    """Raises unless every option is in its domain and all options go together.

    Raises:
        TypeError, ValueError: the message names the option.
    """
    for name, default, check in _CHECKS:
        value = getattr(settings, name)
        if value is not default:
            check(name, value)
    if settings.gradient == "sampled":
        for name in ("label_smoothing", "z_loss"):
            if getattr(settings, name):
                raise ValueError(
                    f"{name}: got {getattr(settings, name)} with gradient='sampled', expected 0: "
                    "the sample and its certificate are those of p - onehot(target). Use "
                    "gradient='exact'"
                )
        if "entropy" in settings.differentiable:
            raise ValueError(
                "differentiable: got 'entropy' with gradient='sampled', expected 'lse' or nothing: "
                "the sample is no estimate of the entropy's gradient. Use gradient='exact'"
            )
    elif settings.hidden_variance:
        raise ValueError("hidden_variance: got True with gradient='exact', expected 'sampled'")


def table(names: tuple[str, ...] = NAMES) -> str:
    """The options as a table in Markdown, for the documentation."""
    lines = ["| option | default | meaning |", "|---|---|---|"]
    for option in fields(Settings):
        if option.name in names:
            default = "2**-12" if option.name == "eps" else repr(option.default)
            lines.append(f"| `{option.name}` | `{default}` | {option.metadata['help']} |")
    return "\n".join(lines)
