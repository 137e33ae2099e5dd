"""Signs that a weighting does nothing, or that it lets a model learn only what it knows."""

import logging
from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import Any

from bft_kernels.settings import LOCAL_SCHEMES, SCHEMES

logger = logging.getLogger(__name__)

SPAN = 5  # steps whose means are compared, the first and the last of a run
FALLS, RISES = 0.8, 1.1  # of the weighted loss and the nll, as multiples of the first means


def warn_of_window(scheme: str, window: int, labels: Sequence[int]) -> None:
    """Warns where each window of half of the answers is the whole answer.

    ``labels`` are the numbers of labelled tokens of the documents. A window of ``bft`` reaches half
    its length to each side, so that it must be twice as long as the answer.
    """
    if scheme in LOCAL_SCHEMES or scheme not in SCHEMES:
        return
    typical = median(labels)
    if window >= (2 if scheme == "bft" else 1) * typical:
        logger.warning(
            "window: %d labelled tokens, and half of the answers have at most %g: each of their "
            "windows is the whole answer, so that a longer window would be the same",
            window,
            typical,
        )


def collapse(rows: Sequence[Mapping[str, Any]]) -> str:
    """What tells of a collapse in a run's rows so far, in words; empty if nothing does.

    The weighted loss falls while the nll rises: the likely tokens, which carry the weight, become
    likelier, at the cost of the others.
    """
    if len(rows) < 2 * SPAN:
        return ""
    first, last = (
        {name: fmean(row[name] for row in part) for name in ("loss", "nll", "confident_weight")}
        for part in (rows[:SPAN], rows[-SPAN:])
    )
    if not (last["loss"] < FALLS * first["loss"] and last["nll"] > RISES * first["nll"]):
        return ""
    return (
        f"the weighted loss has fallen from {first['loss']:.3g} to {last['loss']:.3g} while the "
        f"nll has risen from {first['nll']:.3g} to {last['nll']:.3g}, and "
        f"{last['confident_weight']:.0%} of the weight lies on labels of a confidence above 0.9 "
        f"({first['confident_weight']:.0%} at the start): the model learns what it knows. Try a "
        "lower rate, a shorter window, or a start from a model that SFT has tuned for a while"
    )
