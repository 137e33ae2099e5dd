"""The Triton backend's own paths, in the interpreter where there is no GPU."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bft_kernels import balanced_linear_cross_entropy, linear_cross_entropy, linear_nll
from bft_kernels.config import CoreConfig
from bft_kernels.dispatch import BACKENDS, why_not
from bft_kernels.plan import takes_chunks

pytest.importorskip("triton", reason="triton is not installed")

from bft_kernels.backends.gpu.lists import capacity_for
from bft_kernels.backends.gpu.rows import DeviceRows
from bft_kernels.backends.torch import linear_nll as torch_linear_nll
from bft_kernels.backends.triton import configs, core, gather
from bft_kernels.backends.triton.floor import find_floors
from bft_kernels.backends.triton.inputs import Inputs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
CONFIG = CoreConfig(
    ignore_index=-100,
    softcap=None,
    temperature=1.0,
    label_smoothing=0.0,
    z_loss=0.0,
    eps=2**-5,
    residual="entries",
    statistics=False,
    variance=False,
    hidden_variance=False,
    operand="float32",
    backend="triton",
    max_buffer_bytes=2**20,
    check_values=False,
    check_finite=False,
)
SAMPLED: dict[str, Any] = {"gradient": "sampled", "eps": 2**-5, "seed": 7}


@pytest.fixture(params=["tiles", "chunks"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Of the forward."""
    module = "bft_kernels.backends.triton.core"
    monkeypatch.setattr(f"{module}.takes_chunks", lambda *_: request.param == "chunks")
    return str(request.param)


def gradients(p: Any, backend: str, **how: Any) -> dict[str, Tensor]:
    copy = p.copy(device=DEVICE if backend == "triton" else "cpu")
    upstream = torch.linspace(0.5, 2, p.target.numel(), device=copy.target.device)
    bias = copy.bias
    (linear_nll(*copy.args, bias=bias, backend=backend, **how) * upstream).sum().backward()
    return {name: grad.cpu() for name, grad in copy.grads().items() if grad is not None}


@pytest.mark.parametrize("room", [0, 40, 300])
@pytest.mark.parametrize("frozen", [(), ("weight", "bias"), ("hidden",)])
def test_entries_without_room_are_computed_again(engine, room, frozen, problem, close, monkeypatch):
    p = problem(21, 12, 180, bias=True, dtype=torch.float32, scale=2.0, frozen=frozen)
    expected = gradients(p, "torch", **SAMPLED)
    monkeypatch.setattr("bft_kernels.backends.triton.core.capacity_for", lambda *_: room)
    close(gradients(p, "triton", **SAMPLED), expected, 1e-5)


def test_columns_without_a_logit_may_come_first(engine, problem):
    """A bias of -inf takes a tile out that others of its split follow, far below 0."""
    p = problem(3, 1, 2560, bias=True, dtype=torch.float32)
    hidden, weight = torch.ones(3, 1, device=DEVICE), p.weight.detach().to(DEVICE) - 200
    bias = torch.zeros(2560, device=DEVICE)
    bias[:64] = -math.inf
    target = torch.tensor([64, 700, 2559], device=DEVICE)
    nll = linear_nll(hidden, weight, target, bias=bias, backend="triton")
    expected = linear_nll(hidden, weight, target, bias=bias, backend="torch")
    torch.testing.assert_close(nll, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("columns", [0, 1, 60])
def test_popular_columns_take_a_dense_product(engine, columns, problem, close, monkeypatch):
    p = problem(21, 12, 600, bias=True, dtype=torch.bfloat16, scale=3.0)
    monkeypatch.setattr(gather, "DENSE_COLUMNS", columns)
    got, expected = gradients(p, "triton", **SAMPLED), gradients(p, "torch", **SAMPLED)
    close(got, expected, 2**-6)


@pytest.mark.parametrize("budget", [32_768, 49_152, None])
def test_sums_of_a_block_do_not_reach_the_next(budget, problem, close):
    """Whole row blocks without a label, and a last block of the vocabulary that is narrower."""
    p = problem(64, 12, 300, bias=True, dtype=torch.float32, ignored=0.0)
    p.target[20:] = -100
    how = {"max_buffer_bytes": budget}
    close(gradients(p, "triton", **how), gradients(p, "torch", **how), 1e-5)


def test_lists_have_room_for_what_text_keeps():
    for eps, kept in ((2**-8, 72), (2**-10, 193), (2**-12, 481)):
        assert 2 * kept < capacity_for(10, 100_000, eps) / 10 < 4 * kept
    assert capacity_for(10, 50, 2**-12) == 10 * 50
    assert capacity_for(0, 50, 2**-12) == 0


@pytest.mark.parametrize("budget", [1, 5000, None])
def test_entries_are_sorted_as_the_budget_allows(engine, budget, problem, close):
    shape = (6, 12, 40) if budget == 1 else (41, 12, 100)  # one entry at a time, or some
    p = problem(*shape, bias=True, dtype=torch.float32, scale=2.0)
    how = {"max_buffer_bytes": budget, **SAMPLED}
    close(gradients(p, "triton", **how), gradients(p, "torch", **how), 1e-5)


@pytest.mark.parametrize("options", [{}, {"bias": True}], ids=["plain", "bias"])
@pytest.mark.parametrize("scale", [0.1, 3.0, 1000.0])
def test_floors_are_below_lse_and_near_it(options, scale, problem):
    p = problem(150, 12, 100, dtype=torch.float32, scale=scale, ignored=0.2, **options)
    p = p.copy(device=DEVICE)
    operands = [p.hidden.detach(), p.weight.detach(), None if p.bias is None else p.bias.detach()]
    inputs = Inputs.of(operands[0], operands[1], p.target, operands[2], CONFIG)
    logits = torch.nn.functional.linear(*operands)
    lse = logits.logsumexp(1)
    labelled = p.target != -100
    floors = find_floors(inputs)[labelled]
    assert (floors <= lse[labelled]).all()
    named = p.target[labelled].unique()
    close_to = logits[labelled][:, named].logsumexp(1)
    assert (floors >= close_to - 1e-3 - 1e-4 * close_to.abs()).all()
    assert named.numel() < 100 < labelled.sum()  # some columns are not named, and some repeatedly


@pytest.mark.parametrize("how", [{}, SAMPLED], ids=["exact", "sampled"])
def test_two_runs_give_the_same_bits(engine, how, problem):
    p = problem(19, 12, 80, bias=True, dtype=torch.float32)
    first, second = gradients(p, "triton", **how), gradients(p, "triton", **how)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("budget", [1, 3000, None])
def test_chunks_list_what_is_kept_with_its_value(budget, problem, engine):
    p = problem(28, 12, 150, bias=True, dtype=torch.float32, scale=2.0, ignored=0.4)
    p = p.copy(device=DEVICE)
    config = replace(CONFIG, max_buffer_bytes=budget or 2**20, variance=True, hidden_variance=True)
    seed = torch.tensor(7, device=DEVICE)
    args = [x.detach() for x in p.args]
    out = core.linear_nll(*args, p.bias.detach(), seed, config)
    found = int(out.entry_offsets[-1])
    expected = torch_linear_nll(*args, p.bias.detach(), seed, config)
    if engine == "chunks":
        assert torch.equal(out.entry_columns[:found], expected.entry_columns)
        torch.testing.assert_close(out.entry_values[:found], expected.entry_values)
    else:
        assert out.entry_values.numel() == 0
        assert found >= expected.entry_columns.numel()
    torch.testing.assert_close(out.variance, expected.variance, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(out.hidden_variance, expected.hidden_variance, rtol=1e-4, atol=1e-7)


def test_chunks_are_taken_where_they_fit():
    assert takes_chunks(8192, 131_072, 2**29)
    assert not takes_chunks(8192, 131_072, 2**27)
    assert takes_chunks(64, 131_072, 2**27)


def test_rows_are_listed_on_the_device():
    rows = DeviceRows.of(torch.tensor([-100, 3, -100, 1, 2]), -100)
    assert rows.order[: int(rows.count)].tolist() == [1, 3, 4]
    assert rows.spread(torch.tensor([5.0, 6.0, 7.0, math.nan, 9.0])).tolist() == [0, 5, 0, 6, 7]


@pytest.mark.parametrize("shape", [(1, 1, 1), (17, 5, 67), (0, 3, 9), (33, 20, 129)], ids=str)
@pytest.mark.parametrize("how", [{}, SAMPLED], ids=["exact", "sampled"])
def test_nothing_is_written_outside_a_buffer(engine, how, shape, problem, guarded):
    gradients(problem(*shape, bias=True, dtype=torch.float32), "triton", **how)


def test_nothing_is_written_outside_a_chunk(problem, guarded):
    p = problem(24, 12, 150, dtype=torch.bfloat16).copy(device=DEVICE)
    bounds = torch.tensor([0, 9, 24])
    loss = balanced_linear_cross_entropy(
        *p.args, cu_seqlens=bounds, backend="triton", max_buffer_bytes=8000
    )
    loss.backward()


@pytest.mark.parametrize("how", [{}, SAMPLED], ids=["exact", "sampled"])
@pytest.mark.parametrize("wide", ["hidden", "weight"])
def test_offsets_beyond_31_bits(engine, wide, how, problem, close, tmp_path):
    """Rows far apart in a file of holes: three of them lie beyond 2^31 elements."""
    p = problem(5, 3, 5, dtype=torch.bfloat16, ignored=0.0)
    expected = gradients(p, "torch", **how)
    stride = 2**30
    memory = torch.from_file(str(tmp_path / "holes"), True, 4 * stride + 8, dtype=torch.bfloat16)
    rows = memory.as_strided((5, 3), (stride, 1))
    rows.copy_(getattr(p, wide).detach())
    inputs = {"hidden": p.hidden.detach().clone(), "weight": p.weight.detach().clone()}
    inputs[wide] = rows
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    upstream = torch.linspace(0.5, 2, 5)
    nll = linear_nll(*leaves.values(), p.target, backend="triton", **how)
    grads = torch.autograd.grad((nll * upstream).sum(), list(leaves.values()))
    # dy is rounded to bfloat16 before its two products.
    close(dict(zip(leaves, grads, strict=True)), expected, 2**-5)


@pytest.mark.parametrize("budget", [1, 5000, 10**6])
def test_smoothing_and_ties_in_chunks(budget, problem, close):
    p = problem(13, 6, 300, dtype=torch.float32, scale=2.0)
    how = {"label_smoothing": 0.3, "z_loss": 0.02, "return_stats": True, "reduction": "none"}
    loss, stats = linear_cross_entropy(
        *p.copy(device=DEVICE, frozen=("weight",)).args,
        backend="triton",
        max_buffer_bytes=budget,
        **how,
    )
    want, expected = linear_cross_entropy(*p.copy(torch.float64).args, backend="torch", **how)
    close(loss.cpu(), want, 1e-5)
    for field in ("lse", "entropy", "correct"):
        close(getattr(stats, field).cpu(), getattr(expected, field), 1e-5, field)


@pytest.mark.parametrize("how", [{}, SAMPLED, {"frozen": True}], ids=["exact", "sampled", "unit"])
def test_a_target_that_nobody_checked_gives_nan_in_its_row(engine, how, problem):
    how = dict(how)
    frozen = ("weight",) if how.pop("frozen", False) else ()
    p = problem(9, 6, 40, ignored=0.0, dtype=torch.float32, frozen=frozen)
    p.target[2], p.target[5], p.target[7] = 40, -7, 10**6
    p = p.copy(device=DEVICE)
    nll = linear_nll(*p.args, backend="triton", check=False, **how)
    nll.sum().backward()
    bad = torch.zeros(9, dtype=torch.bool)
    bad[[2, 5, 7]] = True
    assert torch.equal(nll.isnan().cpu(), bad)


def test_says_why_it_does_not_run(problem):
    p = problem(4, 3, 5)
    assert "hidden is float64, it computes in float32" in why_not("triton", p.hidden, p.weight)
    meta = torch.empty(4, 3, device="meta")
    assert "hidden is on meta, it takes CUDA tensors" in why_not("triton", meta, meta)[0]


def test_is_never_chosen_unasked_on_a_cpu():
    triton = next(backend for backend in BACKENDS if backend.name == "triton")
    assert triton.unasked_on == ("cuda",)


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


CALLS: dict[str, Any] = {
    "nll": lambda args, cu: linear_nll(*args).sum(),
    "mean": lambda args, cu: linear_cross_entropy(*args),
    "sampled": lambda args, cu: linear_cross_entropy(*args, **SAMPLED),
    "balanced": lambda args, cu: balanced_linear_cross_entropy(*args, window=4, cu_seqlens=cu),
    "balanced, boundaries on the CPU": lambda args, cu: balanced_linear_cross_entropy(
        *args, window=4, cu_seqlens=torch.tensor([0, 40, 130])
    ),
    "balanced, sampled": lambda args, cu: balanced_linear_cross_entropy(
        *args, window=4, cu_seqlens=cu, return_stats=True, **SAMPLED
    )[0],
}


@needs_gpu
@pytest.mark.parametrize("frozen", [(), ("weight",)], ids=["trained head", "frozen head"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_nothing_waits_for_the_device(name, dtype, frozen, problem):
    p = problem(130, 64, 1000, dtype=dtype, frozen=frozen).copy(device="cuda")
    boundaries = torch.tensor([0, 40, 130], device="cuda")
    for mode in ("default", "error"):  # kernels are compiled in the first turn
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode(mode)
        try:
            CALLS[name](p.args, boundaries).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@needs_gpu
@pytest.mark.parametrize("name", [name for name in CALLS if "CPU" not in name])
def test_is_captured_in_a_graph(name, problem, close):
    p = problem(130, 64, 1000, dtype=torch.bfloat16).copy(device="cuda")
    boundaries = torch.tensor([0, 40, 130], device="cuda")
    loss = CALLS[name](p.args, boundaries)
    loss.backward()
    expected = {key: value.clone() for key, value in p.grads().items()}
    p.hidden.grad = p.weight.grad = None
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        CALLS[name](p.args, boundaries).backward()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    p.hidden.grad = p.weight.grad = None
    with torch.cuda.graph(graph):
        captured = CALLS[name](p.args, boundaries)
        captured.backward()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, loss)
    close(p.grads(), expected, 0)
