"""The Triton backend's own paths, in the interpreter where there is no GPU."""

import math

import pytest
import torch

from bft_kernels.backends.common import on_device
from bft_kernels.backends.common.chunked import takes_chunks
from tests.support.problems import assert_close, draw_problem, weighted_gradients
from tests.support.samples import sampled_options
from tests.support.soak import soaked

pytest.importorskip("triton", reason="triton is not installed")

from bft_kernels.backends.triton import configs, spmm
from bft_kernels.backends.triton.scale import scale_

pytestmark = pytest.mark.usefixtures("on_device")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu:7"


@pytest.mark.parametrize(
    ("engine", "columns"),
    soaked(
        ["tiles", "chunks"],
        [0, 1, 60],
        plain=lambda engine, columns: (engine == "chunks") == (columns > 1),
    ),
)
def test_popular_columns_take_a_dense_product(engine, columns, monkeypatch):
    monkeypatch.setattr(on_device, "takes_chunks", lambda *_: engine == "chunks")
    monkeypatch.setattr(spmm, "DENSE_COLUMNS", columns)
    p = draw_problem(21, 12, 600, bias=True, dtype=torch.bfloat16, scale=3.0)
    how = sampled_options(p)
    got = weighted_gradients(p, device=DEVICE, backend="triton", **how)
    assert_close(got, weighted_gradients(p, backend="torch", **how), 2**-6)


def test_chunks_are_taken_where_they_fit():
    assert takes_chunks(8192, 131_072, 2**29)
    assert not takes_chunks(8192, 131_072, 2**27)
    assert takes_chunks(64, 131_072, 2**27)


def test_every_tile_has_whole_words():
    tiles = [tile for kind in configs.SHIPPED.values() for tile in (kind.logits, kind.capped)]
    tiles += [configs.UNALIGNED, configs.WIDE_UNALIGNED, configs.INTERPRETED]
    assert all(tile.block_v % 64 == 0 for tile in tiles)


@pytest.mark.parametrize(
    ("arch", "entry"),
    [(75, 80), (80, 80), (86, 86), (89, 86), (90, 90), (103, 100), (121, 120), ("gfx942", "amd")],
)
def test_tiles_go_by_the_device_and_by_what_is_stored(monkeypatch, arch, entry):
    backend = "cuda" if isinstance(arch, int) else "hip"
    monkeypatch.setattr(configs, "target", lambda: (backend, arch))
    half, full = torch.bfloat16, torch.float32
    for operand, stored, kind in [
        (half, (half, half), configs.NARROW),
        (half, (half, full), configs.MIXED),
        (half, (full, half), configs.MIXED),
        (full, (half, full), configs.WIDE),
    ]:
        assert configs._shipped(operand, *stored) is configs.SHIPPED[entry, kind]


@pytest.mark.parametrize(("backend", "limited"), [("cuda", True), ("hip", False)])
def test_registers_are_limited_on_nvidia_only(monkeypatch, backend, limited):
    monkeypatch.setattr(configs, "target", lambda: (backend, 90))
    assert ("maxnreg" in configs.WIDE_UNALIGNED.constants()) is limited


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [0, 1, 127, 1000])
def test_a_gradient_is_scaled_in_place_and_rounded_once(count, dtype):
    x = torch.randn(count).to(dtype)
    for factor in (1.0, 0.3, -2.5e-4):
        got = x.clone().to(DEVICE)
        scale_(got, torch.tensor(factor, device=DEVICE))
        exact = x.float() * torch.tensor(factor)
        # The interpreter cuts bfloat16 off where a GPU rounds it.
        unit = torch.finfo(dtype).eps if configs.interpreted() else torch.finfo(dtype).eps / 2
        assert bool(((got.cpu().float() - exact).abs() <= unit * exact.abs()).all())


def test_a_factor_of_one_moves_nothing():
    x = torch.tensor([math.nan, math.inf, -0.0], device=DEVICE)
    before = x.view(torch.int32).clone()
    scale_(x, torch.ones((), device=DEVICE))
    assert torch.equal(x.view(torch.int32), before)
