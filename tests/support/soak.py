"""What of a full matrix runs in every suite, and what in the soak."""

from itertools import product

import pytest
import torch

HAS_GPU = torch.cuda.is_available()


def soaked(*axes, plain):
    """All combinations; those for which ``plain`` does not hold are left to the soak.

    On a GPU, where nothing is interpreted or emulated, none are.
    """
    return [
        pytest.param(*case, marks=() if HAS_GPU or plain(*case) else pytest.mark.soak)
        for case in product(*axes)
    ]
