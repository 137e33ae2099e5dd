"""The roofline: peaks, operations, bytes and times by hand."""

import pytest

from benchmarks.measure import roofline
from benchmarks.measure.roofline import GPUS, KEPT, Work, exact, product, sampled
from benchmarks.shapes import Shape

H100 = GPUS["H100"]
SHAPE = Shape(8192, 4096, 131_072)
G = 2 * 8192 * 4096 * 131_072


def operations(works):
    return sum(work.operations for work in works) / G


def moved(works, name):
    return sum(work.bytes for work in works if work.name == name)


def test_the_rate_of_products_is_that_of_the_published_time():
    # 3 * 2 * 8192 * 4096 * 151936 = 3.059e13 operations in 42 ms are 728.3e12 a second.
    assert roofline.PRODUCTS * H100.operations["bfloat16"] == pytest.approx(728.3e12, rel=1e-4)
    assert pytest.approx(0.7361, rel=1e-4) == roofline.PRODUCTS


def test_a_kernel_takes_what_its_scarcer_takes():
    assert Work("", operations=728.3e12).seconds(H100) == pytest.approx(1, rel=1e-4)
    assert Work("", bytes=0.9 * 3.35e12, launches=2).seconds(H100) == pytest.approx(1 + 6e-6)
    both = Work("", operations=728.3e9, bytes=0.9 * 3.35e12)
    assert both.seconds(H100) == pytest.approx(1 + 3e-6)
    half = Work("", operations=728.3e12, operand="fp8").seconds(H100)
    assert half == pytest.approx(0.5, rel=1e-3)
    with pytest.raises(KeyError, match="fp8"):
        Work("", operations=1, operand="fp8").seconds(GPUS["A100"])


@pytest.mark.parametrize(
    ("operand", "adds", "bytes_"),
    [
        ("bfloat16", False, 2 * (3 * 7 + 7 * 5) + 4 * 3 * 5),
        ("int8", True, 1 * (3 * 7 + 7 * 5) + 2 * 4 * 3 * 5),
    ],
)
def test_a_product_moves_its_operands_and_result(operand, adds, bytes_):
    work = product("", 3, 5, 7, operand, adds=adds)
    assert (work.operations, work.bytes) == (2 * 3 * 5 * 7, bytes_)


def test_chunks_are_those_of_the_backend():
    # 512 MiB hold 1024 rows of 131072 float32 logits; the default has room for their bits too.
    assert roofline.chunks(SHAPE, 2**29) == [1024] * 8
    assert [work.name for work in sampled(SHAPE, 180)].count("logits") == 8


def test_the_exact_loss_by_hand():
    modes = ("forward", "frozen", "both")
    assert [operations(exact(SHAPE, mode)) for mode in modes] == [1, 2, 3]
    works = exact(SHAPE)
    # The float32 logits are read once for the loss; dy reads them, and is written in bfloat16.
    assert moved(works, "loss") == 4 * 8192 * 131_072
    assert moved(works, "dy") == 6 * 8192 * 131_072
    # dW is written once and added to seven times; each of 8 chunks reads its dy and its hidden.
    operands = 8 * 2 * (131_072 * 1024 + 1024 * 4096)
    assert moved(works, "dW") == operands + 4 * 131_072 * 4096 * (1 + 2 * 7)
    # 3 products of 12.079 ms; 10.74 GB of logits and the rounding at 3.015 TB/s; 129 launches.
    by_hand = 36.24e-3 + 10.737e9 / 3.015e12 + 6 * 131_072 * 4096 / 3.015e12 + 129 * 3e-6
    assert roofline.seconds(works, H100) == pytest.approx(by_hand, rel=1e-3)


def test_what_the_sampled_gradient_gathers():
    works = sampled(SHAPE, KEPT[2**-10])
    assert 1 < operations(works) < 1.01
    # 180 rows of 8 KiB a token, and dH or dW.
    assert moved(works, "dH") == 8192 * (180 * 8192 + 2 * 4096)
    assert moved(works, "dW") == 8192 * 180 * 8192 + 2 * 131_072 * 4096
    assert moved(sampled(SHAPE, KEPT[2**-10], hits=1.0), "dH") == 2 * 8192 * 4096
    cheaper = [roofline.seconds(sampled(SHAPE, KEPT[eps]), H100) for eps in sorted(KEPT)]
    assert cheaper == sorted(cheaper, reverse=True)


@pytest.mark.parametrize("gpu", GPUS.values(), ids=list(GPUS))
def test_times_in_g_are_above_their_operations(gpu):
    for mode, least in (("forward", 1), ("frozen", 2), ("both", 3)):
        for works in (exact(SHAPE, mode), roofline.eager(SHAPE, mode)):
            assert least < roofline.times_g(works, SHAPE, gpu) < 1.6 * least
