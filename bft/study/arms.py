"""The arms of a comparison: a scheme, its window where it has one, and where its runs start."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bft.schemes import load_scheme, takes_window
from bft_kernels.settings import LOCAL_SCHEMES, SCHEMES

COLD, WARM = "cold", "warm"
CONTROLS = {
    name: f"bft.schemes:{name.replace('-', '_')}"
    for name in ("shuffled", "token-only", "document-only")
}


@dataclass(frozen=True)
class Arm:
    """What is compared. Its name is that of its folder, too."""

    scheme: str  # as it was given
    window: int | None  # in labelled tokens; None where the scheme has none
    start: str  # COLD: the model as it is given; WARM: the common SFT checkpoint

    @property
    def name(self) -> str:
        """Words of letters, digits, dots and hyphens."""
        parts = [self.scheme, *([] if self.window is None else [f"w{self.window}"]), self.start]
        return re.sub(r"[^\w.-]+", "-", "-".join(parts))

    @property
    def path(self) -> str:
        """The scheme as :class:`bft.TrainConfig` takes it: its name, or its import path."""
        return CONTROLS.get(self.scheme, self.scheme)


def has_window(scheme: str) -> bool:
    """Whether a window changes the scheme's weights. Raises as :func:`bft.schemes.load_scheme`."""
    path = CONTROLS.get(scheme, scheme)
    if path in SCHEMES:
        return path not in LOCAL_SCHEMES
    return bool(takes_window(load_scheme(path)))


def make_arms(schemes: Sequence[str], windows: Sequence[int], starts: Sequence[str]) -> list[Arm]:
    """Every scheme at every window that it has, from every start; each once, in this order."""
    arms = [
        Arm(scheme, window, start)
        for start in starts
        for scheme in schemes
        for window in (windows if has_window(scheme) else [None])
    ]
    return list(dict.fromkeys(arms))


def contrasts(arms: Sequence[Arm]) -> Iterator[tuple[Arm, Arm]]:
    """The pairs that are tested: each arm against sft, and bft's controls against bft.

    Both of a pair have the same start, and those of the controls the same window.
    """
    known = set(arms)
    for arm in arms:
        sft = Arm("sft", None, arm.start)
        if arm != sft and sft in known:
            yield arm, sft
    for arm in arms:
        bft = Arm("bft", arm.window, arm.start)
        if arm.scheme in CONTROLS and bft in known:
            yield (bft, arm) if arm.scheme == "shuffled" else (arm, bft)
