"""The factor of a gradient that was made in the forward, by the CUDA backend's kernel."""

import math

import pytest
import torch

from bft_kernels.backends.cuda.scale import scale_
from tests.support.problems import DTYPES

pytestmark = pytest.mark.usefixtures("emulated_device")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("count", "start"), [(0, 0), (1, 0), (127, 0), (40_003, 0), (300, 3)])
def test_a_gradient_is_scaled_in_place_and_rounded_once(count, start, dtype):
    whole = torch.randn(start + count + 5).to(dtype)
    for factor in (1.0, 0.3, -2.5e-4):
        got = whole.clone()
        scale_(got[start : start + count], torch.tensor(factor))
        expected = whole.clone()
        expected[start : start + count] *= torch.tensor(factor)
        assert torch.equal(got, expected)


def test_a_factor_of_one_moves_nothing(emulated_device):
    x = torch.tensor([math.nan, math.inf, -0.0])
    before = x.view(torch.int32).clone()
    emulated_device.how = {"unwritten": True}  # nobody may read x
    scale_(x, torch.ones(()))
    assert torch.equal(x.view(torch.int32), before)
    with pytest.raises(RuntimeError, match="uninitialised"):
        scale_(x, torch.tensor(2.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"factor": 0}, "factor: there is no such argument"),
        ({"count": 1.5}, "count: got a value of another type"),
        ({"count": None}, "count: got a value of another type"),
    ],
)
def test_a_launch_refuses_what_it_does_not_take(emulated, change, message):
    with pytest.raises(TypeError, match=message):
        emulated.scale(**{"dtype": 0, "count": 0, "factor_ptr": 16, "stream": 0} | change)
    with pytest.raises(TypeError, match="count: is missing"):
        emulated.scale(dtype=0, factor_ptr=16, stream=0)
