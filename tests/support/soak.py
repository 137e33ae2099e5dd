"""What of a full matrix runs in every suite, and what in the soak."""

from itertools import product

import pytest


def soaked(*axes, plain):
    """All combinations; those for which ``plain`` does not hold are left to the soak."""
    return [
        pytest.param(*case, marks=() if plain(*case) else pytest.mark.soak)
        for case in product(*axes)
    ]
