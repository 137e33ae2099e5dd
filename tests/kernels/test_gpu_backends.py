"""What backends with GPU kernels of their own must do beside `test_fused.py`.

`triton` in its interpreter and `cuda` in the emulation where there is no GPU.
"""

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from bft_kernels import (
    balanced_linear_cross_entropy,
    linear_cross_entropy,
    linear_nll,
    reference,
)
from bft_kernels.backends.common import logit_rows, on_device
from bft_kernels.backends.common.csr import capacity_for
from bft_kernels.backends.common.rows import DeviceRows
from bft_kernels.backends.torch.engine import linear_nll as torch_linear_nll
from bft_kernels.dispatch import _candidates
from tests.support.losses import nll as nll_of
from tests.support.problems import DTYPES, assert_close, call_of, draw_problem, weighted_gradients
from tests.support.samples import clear_seed, sampled_options
from tests.support.soak import soaked

HAS_GPU = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
SAMPLED = {"gradient": "sampled", "eps": 2**-5, "seed": 7}


@dataclass(frozen=True)
class Engine:
    """A backend, and which of its forwards."""

    backend: str
    device: str
    in_chunks: bool
    rows: int  # in two blocks of its forward
    gradients: Callable[..., dict[str, Tensor]]  # of a problem

    @property
    def how(self):
        return {"backend": self.backend}

    def module(self, name):
        return importlib.import_module(f"bft_kernels.backends.{self.backend}.{name}")


ENGINES = ["triton-tiles", "triton-chunks", "cuda-tiles", "cuda-chunks"]


@pytest.fixture(params=ENGINES)
def engine(request, monkeypatch):
    """Both of each backend."""
    backend, _, forward = request.param.partition("-")
    device = "cuda" if HAS_GPU else "cpu:7"
    request.getfixturevalue("on_device")
    monkeypatch.setattr(on_device, "takes_chunks", lambda *_: forward == "chunks")
    if backend == "triton":
        pytest.importorskip("triton", reason="triton is not installed")
    else:
        request.getfixturevalue("cuda_backend")

    def gradients(p, **how):
        return weighted_gradients(p, backend=backend, device=device, **how)

    rows = 19 if backend == "triton" or forward == "chunks" else 150
    return Engine(backend, device, forward == "chunks", rows, gradients)


def spared(*axes, plain):
    """All of ``cuda``; of ``triton``, whose interpreter is slow, some, and the rest in the soak."""
    return soaked(ENGINES, *axes, plain=lambda name, *case: "cuda" in name or plain(*case))


@pytest.fixture
def expected():
    """The gradients that the ``torch`` backend gives."""
    return lambda p, **how: weighted_gradients(p, backend="torch", **how)


@pytest.mark.parametrize(
    ("engine", "room", "frozen"),
    spared(
        [0, 40, 300],
        [(), ("weight", "bias"), ("hidden",), ("hidden", "weight")],
        plain=lambda room, frozen: "weight" not in frozen or "bias" in frozen,
    ),
    indirect=["engine"],
)
def test_entries_without_room_are_computed_again(engine, room, frozen, expected, monkeypatch):
    p = draw_problem(21, 12, 180, bias=True, dtype=torch.float32, scale=2.0, frozen=frozen)
    monkeypatch.setattr(logit_rows, "capacity_for", lambda *_: room)
    how = sampled_options(p)
    assert_close(engine.gradients(p, **how), expected(p, **how), 1e-5)


@pytest.mark.parametrize(
    ("engine", "dtype"), spared(DTYPES[1:], plain=lambda dtype: False), indirect=["engine"], ids=str
)
def test_capped_entries_of_narrow_operands_are_computed_again(engine, dtype, expected, monkeypatch):
    p, how = draw_problem(21, 12, 180, dtype=dtype, scale=2.0), {"softcap": 5.0, "temperature": 0.7}
    monkeypatch.setattr(logit_rows, "capacity_for", lambda *_: 0)
    seed = clear_seed(p, 7, 2**-5, **how)
    how |= {"gradient": "sampled", "eps": 2**-5, "seed": seed}
    want = expected(p.copy(torch.float32), **how)
    assert_close(engine.gradients(p, **how), want, 2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("budget", [3000, None])
def test_lists_have_what_is_kept(engine, budget, monkeypatch, poison):
    """In chunks just that, with its value; in tiles as much as the lse so far lets through."""
    p = draw_problem(28, 12, 150, bias=True, dtype=torch.float32, scale=2.0, ignored=0.4)
    how = sampled_options(p)
    p = p.copy(device=engine.device, frozen=("hidden", "weight", "bias"))
    call = call_of(p, how.pop("seed"), max_buffer_bytes=budget or 2**20, **how)
    out, expected = engine.module("engine").linear_nll(call), torch_linear_nll(call)
    found = int(out.csr_offsets[-1])
    assert bool((out.csr_offsets.diff() >= expected.csr_offsets.diff()).all())
    if engine.in_chunks:
        assert torch.equal(out.csr_columns[:found], expected.csr_columns)
        torch.testing.assert_close(out.csr_values[:found], expected.csr_values)
    if engine.backend == "triton" and budget:
        return
    # Just as much room, and too little for the last rows, of which nothing is listed.
    for room in (found, found - 1):
        monkeypatch.setattr(logit_rows, "capacity_for", lambda *_, room=room: room)
        some = engine.module("engine").linear_nll(call)
        end = int(out.csr_offsets[out.csr_offsets <= room].max())
        assert torch.equal(some.csr_offsets, out.csr_offsets)
        assert torch.equal(some.csr_columns[:end], out.csr_columns[:end])
        assert bool((some.csr_columns[end:] == 99).all())


def test_lists_have_room_for_what_text_keeps():
    for eps, kept in ((2**-8, 72), (2**-10, 193), (2**-12, 481)):
        assert 2 * kept < capacity_for(10, 100_000, eps) / 10 < 4 * kept
    assert capacity_for(10, 50, 2**-12) == 10 * 50
    assert capacity_for(0, 50, 2**-12) == 0


def test_columns_without_a_logit_may_come_first(engine):
    """A bias of -inf takes a tile out that others of its split follow, far below 0."""
    p = draw_problem(3, 1, 2560, bias=True, dtype=torch.float32)
    hidden = torch.ones(3, 1, device=engine.device)
    weight = p.weight.detach().to(engine.device) - 200
    bias = torch.zeros(2560, device=engine.device)
    bias[:128] = -math.inf
    target = torch.tensor([128, 700, 2559], device=engine.device)
    nll = linear_nll(hidden, weight, target, bias=bias, **engine.how)
    want = linear_nll(hidden, weight, target, bias=bias, backend="torch")
    torch.testing.assert_close(nll, want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("engine", "how"),
    spared([{}, SAMPLED], plain=lambda how: not how),
    indirect=["engine"],
    ids=str,
)
def test_logits_that_are_not_finite_or_large(engine, how):
    z = torch.randn(8, 300)
    z[1, 200] = math.nan
    z[2, 10] = math.inf
    z[3, :150] = -math.inf  # a whole tile, and what follows is far below 0
    z[3, 150:] -= 200.0
    z[4] = -math.inf
    z[5] *= 1e4
    z[6, 17] = -math.inf  # its target
    z[7, 11:13] = torch.tensor([3e4, -3e4])
    target = torch.tensor([299, 1, 2, 160, 3, 4, 17, 12], device=engine.device)
    options = {"return_stats": True, "reduction": "none", **engine.how, **how}
    # A row has a weight to itself: 0 * inf is NaN.
    for row, logits in enumerate(z):
        own = torch.ones(1, 1, device=engine.device), logits[:, None].to(engine.device)
        loss, stats = linear_cross_entropy(*own, target[row : row + 1], **options)
        log_p = logits.double().log_softmax(0)
        want = {
            "nll": -log_p[target[row].cpu()],
            "lse": logits.double().logsumexp(0),
            "entropy": torch.special.entr(log_p.exp()).sum(),
        }
        got = {"nll": loss, "lse": stats.lse, "entropy": stats.entropy}
        for name in ("nll", "lse") if row in (1, 2, 4, 6) else want:
            value = got[name][0].cpu().double()
            if bool(want[name].isfinite()):
                torch.testing.assert_close(value, want[name], rtol=2e-6, atol=1e-5)
            else:  # infinity makes NaN of a whole row
                assert not bool(value.isfinite()), (row, name)
        right = bool(logits.argmax() == target[row].cpu()) and bool(want["lse"].isfinite())
        assert bool(stats.correct[0]) == right, row


@pytest.mark.parametrize(
    ("engine", "frozen"),
    spared([(), ("weight", "bias")], plain=lambda frozen: False),
    indirect=["engine"],
    ids=str,
)
def test_a_sampled_lse_has_a_gradient(engine, frozen):
    p = draw_problem(21, 12, 180, bias=True, dtype=torch.float32, scale=2.0, frozen=frozen)
    how, found = sampled_options(p), []
    for own, backend in ((p.copy(device=engine.device), engine.backend), (p, "torch")):
        _, stats = nll_of(own, differentiable=("lse",), backend=backend, **how)
        found.append({k: g.cpu() for k, g in own.gradients(stats.lse.square().sum()).items()})
    assert_close(*found, 2e-5)


@pytest.mark.parametrize("frozen", [(), ("weight", "bias")], ids=["trained head", "frozen head"])
def test_statistics_have_gradients(engine, frozen):
    p = draw_problem(21, 12, 180, bias=True, dtype=torch.float32, scale=2.0, frozen=frozen)
    found = []
    for own, how in ((p.copy(device=engine.device), engine.how), (p, {"backend": "torch"})):
        names = ("lse", "entropy")
        nll, stats = linear_nll(*own.args, bias=own.bias, differentiable=names, **how)
        loss = nll.sum() + stats.lse.square().sum() - (stats.entropy * nll.detach()).sum()
        found.append({k: g.cpu() for k, g in own.gradients(loss).items()} | {"": loss.cpu()})
    assert_close(*found, 2e-5)


@pytest.mark.parametrize(
    ("engine", "how", "frozen"),
    spared([{}, SAMPLED], [(), ("weight", "bias")], plain=lambda how, frozen: not how),
    indirect=["engine"],
    ids=str,
)
def test_the_most_probable_tokens(engine, how, frozen):
    """From the engine's own pass, which is one in chunks; the backward does not notice."""
    p = draw_problem(21, 12, 180, bias=True, dtype=torch.float32, scale=2.0, frozen=frozen)
    how, own = {"softcap": 9.0, **engine.how, **how}, p.copy(device=engine.device)
    nll, stats = linear_nll(*own.args, bias=own.bias, top_k=5, **how)
    wide = p.of_labelled()
    log_p = reference.logits(wide.hidden, wide.weight, wide.bias, 9.0).log_softmax(1)
    found = stats.top_ids.cpu()[p.labelled], stats.top_log_probs.cpu()[p.labelled]
    assert_close(found[1], log_p.topk(5).values, 1e-5)
    assert_close(found[1], log_p.gather(1, found[0]), 1e-5)
    assert not bool(((stats.top_ids < 0) == (own.target != -100)[:, None]).any())
    same = p.copy(device=engine.device)
    want = same.gradients(linear_nll(*same.args, bias=same.bias, **how).sum())
    assert_close(own.gradients(nll.sum()), want, 1e-5)


def spread_out(x, pad):
    """The same values in rows with NaN before and behind them: aligned if ``pad`` is."""
    width = x.shape[1]
    wide = torch.nn.functional.pad(x.detach(), (pad, pad + -width % 8), value=math.nan)
    return wide[:, pad : pad + width]


@pytest.mark.parametrize(
    ("engine", "dtype", "gradient", "pad"),
    spared(
        DTYPES[:2],
        ["exact", "sampled"],
        [8, 3],
        plain=lambda *case: case == (torch.float32, "exact", 3),
    ),
    indirect=["engine"],
    ids=str,
)
def test_rows_may_be_strided(engine, dtype, gradient, pad):
    p = draw_problem(20, 43, 150, dtype=dtype, scale=2.0).copy(device=engine.device)
    apart = replace(p, hidden=spread_out(p.hidden, pad), weight=spread_out(p.weight, pad))
    how = {"return_stats": True, **engine.how}
    if gradient == "sampled":
        how |= {"hidden_variance": True, **sampled_options(p.copy(device="cpu"))}
    found = []
    for own in (p, apart):
        loss, stats = linear_nll(*own.args, **how)
        loss.sum().backward()
        made = {"loss": loss, **own.grads(), **stats._asdict()}
        found.append({name: x.cpu() for name, x in made.items() if x is not None})
    assert_close(found[1], found[0], 1e-5 if dtype == torch.float32 else 2**-7)


@pytest.mark.parametrize("how", [{}, SAMPLED], ids=["exact", "sampled"])
def test_rows_without_a_label_cost_nothing(engine, how, poison):
    p = draw_problem(9, 8, 40, bias=True, dtype=torch.float32, ignored=2.0)
    p = p.copy(device=engine.device)
    loss, stats = linear_nll(*p.args, bias=p.bias, return_stats=True, **engine.how, **how)
    loss.sum().backward()
    made = [loss, *stats, *p.grads().values()]
    assert not any(bool(x.any()) for x in made if x is not None)


@pytest.mark.parametrize("budget", [32_768, 49_152, None])
def test_sums_of_a_block_do_not_reach_the_next(engine, budget, expected):
    """Whole row blocks without a label, and a last block of the vocabulary that is narrower."""
    p = draw_problem(engine.rows + 45, 12, 300, bias=True, dtype=torch.float32, ignored=0.0)
    p.target[20:] = -100
    how = {"max_buffer_bytes": budget}
    assert_close(engine.gradients(p, **how), expected(p, **how), 1e-5)


@pytest.mark.parametrize(
    ("engine", "budget"),
    soaked(
        ENGINES, [1, 20_000, None], plain=lambda engine, budget: budget or engine == "cuda-tiles"
    ),
    indirect=["engine"],
)
def test_entries_are_sorted_as_the_budget_allows(engine, budget, expected):
    shape = (
        (6, 12, 40) if budget == 1 else (2 * engine.rows, 12, 100)
    )  # an entry at a time, or some
    p = draw_problem(*shape, bias=True, dtype=torch.float32, scale=2.0)
    how = {"max_buffer_bytes": budget, **sampled_options(p)}
    assert_close(engine.gradients(p, **how), expected(p, **how), 1e-5)


@pytest.mark.parametrize("options", [{}, {"bias": True}], ids=["plain", "bias"])
@pytest.mark.parametrize("scale", [0.1, 3.0, 1000.0])
def test_bounds_are_below_lse_and_near_it(engine, options, scale):
    p = draw_problem(150, 12, 100, dtype=torch.float32, scale=scale, ignored=0.2, **options)
    p = p.copy(device=engine.device, frozen=("hidden", "weight", "bias"))
    operands = [p.hidden.detach(), p.weight.detach(), None if p.bias is None else p.bias.detach()]
    call = call_of(p, max_buffer_bytes=2**20, **SAMPLED)
    inputs = engine.module("kernels").make_inputs(call)
    find_bounds = engine.module("forward").find_bounds
    logits = torch.nn.functional.linear(*operands)
    lse = logits.logsumexp(1)
    labelled = p.target != -100
    lse_bounds = find_bounds(inputs)[labelled]
    assert (lse_bounds <= lse[labelled]).all()
    named = p.target[labelled].unique()
    close_to = logits[labelled][:, named].logsumexp(1)
    assert (lse_bounds >= close_to - 1e-3 - 1e-4 * close_to.abs()).all()
    assert named.numel() < 100 < labelled.sum()  # some columns are not named, and some repeatedly


@pytest.mark.parametrize("how", [{}, SAMPLED], ids=["exact", "sampled"])
def test_two_runs_give_the_same_bits(engine, how):
    p = draw_problem(engine.rows, 12, 80, bias=True, dtype=torch.float32)
    first, second = engine.gradients(p, **how), engine.gradients(p, **how)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_rows_are_listed_on_the_device():
    rows = DeviceRows.of(torch.tensor([-100, 3, -100, 1, 2]), -100)
    assert rows.order[: int(rows.count)].tolist() == [1, 3, 4]
    assert rows.spread(torch.tensor([5.0, 6.0, 7.0, math.nan, 9.0])).tolist() == [0, 5, 0, 6, 7]


@pytest.mark.parametrize("shape", [(1, 1, 1), (17, 5, 67), (0, 3, 9), (33, 20, 129)], ids=str)
@pytest.mark.parametrize("how", [{}, SAMPLED], ids=["exact", "sampled"])
def test_nothing_is_written_outside_a_buffer(engine, how, shape, guarded):
    engine.gradients(draw_problem(*shape, bias=True, dtype=torch.float32), **how)


def test_an_infinite_upstream_gradient_stays_in_its_row(engine, guarded):
    p = draw_problem(9, 12, 60, ignored=0.0, dtype=torch.float32, scale=3.0)
    how, found = sampled_options(p), []
    for backend, device in ((engine.backend, engine.device), ("torch", "cpu")):
        own = p.copy(device=device)
        upstream = torch.linspace(0.5, 2, 9, device=device)
        upstream[-1] = math.inf  # behind whose list no row writes its own
        nll = linear_nll(*own.args, backend=backend, **how)
        nll.backward(upstream)
        found.append([grad.cpu() for grad in own.grads().values() if grad is not None])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("frozen", [(), ("weight",)], ids=["trained head", "frozen head"])
def test_a_weighted_loss_writes_nothing_outside_a_buffer(engine, frozen, guarded):
    p = draw_problem(24, 12, 150, dtype=torch.bfloat16, frozen=frozen).copy(device=engine.device)
    how = {"cu_seqlens": torch.tensor([0, 9, 24]), "max_buffer_bytes": 8000}
    balanced_linear_cross_entropy(*p.args, **how, **engine.how).backward()


def far_apart(count, file, device):
    """``[count]`` bfloat16 of any values: of a file's holes, or of a GPU that has the room."""
    if device != "cuda":
        return torch.from_file(str(file), True, count, dtype=torch.bfloat16, device=device)
    free, _ = torch.cuda.mem_get_info()
    if free < 2.5 * count:
        pytest.skip(f"needs {2.5 * count / 2**30:.0f} GiB of free memory on the GPU")
    return torch.empty(count, dtype=torch.bfloat16, device=device)


@pytest.mark.parametrize("gradient", ["exact", "sampled"])
@pytest.mark.parametrize("wide", ["hidden", "weight"])
def test_offsets_beyond_31_bits(engine, wide, gradient, expected, tmp_path):
    """Rows far apart in a file of holes: three of them lie beyond 2^31 elements."""
    p = draw_problem(5, 3, 5, dtype=torch.bfloat16, ignored=0.0)
    how = sampled_options(p) if gradient == "sampled" else {}
    want = expected(p, **how)
    stride = 2**30
    rows = far_apart(4 * stride + 8, tmp_path / "holes", engine.device)
    rows = rows.as_strided((5, 3), (stride, 1))
    rows.copy_(getattr(p, wide).detach())
    own = p.copy(device=engine.device)
    inputs = {"hidden": own.hidden.detach(), "weight": own.weight.detach()}
    inputs[wide] = rows
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    upstream = torch.linspace(0.5, 2, 5, device=engine.device)
    nll = linear_nll(*leaves.values(), own.target, **engine.how, **how)
    grads = torch.autograd.grad((nll * upstream).sum(), list(leaves.values()))
    # dy is rounded to bfloat16 before its two products.
    assert_close({name: x.cpu() for name, x in zip(leaves, grads, strict=True)}, want, 2**-5)


@pytest.mark.parametrize("budget", [1, 5000, 10**6])
def test_smoothing_and_ties_with_a_frozen_head(engine, budget):
    p = draw_problem(13, 6, 300, dtype=torch.float32, scale=2.0)
    how = {"label_smoothing": 0.3, "z_loss": 0.02, "return_stats": True, "reduction": "none"}
    copy = p.copy(device=engine.device, frozen=("weight",))
    loss, stats = linear_cross_entropy(*copy.args, max_buffer_bytes=budget, **engine.how, **how)
    wide = p.copy(torch.float64)
    want, truth = linear_cross_entropy(*wide.args, backend="torch", **how)
    assert_close(loss.cpu(), want, 1e-5)
    for field in ("lse", "entropy", "correct"):
        assert_close(getattr(stats, field).cpu(), getattr(truth, field), 1e-5, field)
    upstream = torch.linspace(0.5, 2, 13)
    (loss * upstream.to(engine.device)).sum().backward()
    (want * upstream).sum().backward()
    assert_close(copy.hidden.grad.cpu(), wide.hidden.grad, 1e-5)


@pytest.mark.parametrize("how", [{}, SAMPLED, {"frozen": True}], ids=["exact", "sampled", "unit"])
def test_a_target_that_nobody_checked_gives_nan_in_its_row(engine, how):
    how = dict(how)
    frozen = ("weight",) if how.pop("frozen", False) else ()
    p = draw_problem(9, 6, 40, ignored=0.0, dtype=torch.float32, frozen=frozen)
    inside = p.copy(device=engine.device)
    p.target[[2, 5, 7, 8]] = torch.tensor([40, -7, 10**6, 2**32 + 3])
    p = p.copy(device=engine.device)
    how |= {"check": False, "return_stats": True, **engine.how}
    if "gradient" in how:
        how["hidden_variance"] = True
    nll, stats = linear_nll(*p.args, **how)
    nll.sum().backward()
    _, known = linear_nll(*inside.args, **how)
    bad = torch.zeros(9, dtype=torch.bool)
    bad[[2, 5, 7, 8]] = True
    assert torch.equal(nll.isnan().cpu(), bad)
    assert torch.equal(stats.lse.cpu(), known.lse.cpu())
    assert not bool(stats.correct.cpu()[bad].any())
    if "gradient" in how:  # no column is left out of the certificate as the target
        z = p.hidden.detach().cpu().double() @ p.weight.detach().cpu().double().T
        probability = z.softmax(1)
        whole = (probability * (SAMPLED["eps"] - probability).clamp_min(0)).sum(1)
        want = torch.where(bad, whole, known.variance.cpu().double())
        torch.testing.assert_close(stats.variance.cpu().double(), want, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_is_never_chosen_unasked_on_a_cpu(name):
    assert name in _candidates("auto", "cuda")
    assert name not in _candidates("auto", "cpu")


CALLS = {
    "nll": lambda args, cu, **how: linear_nll(*args, **how).sum(),
    "mean": lambda args, cu, **how: linear_cross_entropy(*args, **how),
    "sampled": lambda args, cu, **how: linear_cross_entropy(*args, **SAMPLED, **how),
    "balanced": lambda args, cu, **how: balanced_linear_cross_entropy(
        *args, window=4, cu_seqlens=cu, **how
    ),
    "balanced, boundaries on the CPU": lambda args, cu, **how: balanced_linear_cross_entropy(
        *args, window=4, cu_seqlens=torch.tensor([0, 40, 130]), **how
    ),
    "balanced, sampled": lambda args, cu, **how: balanced_linear_cross_entropy(
        *args, window=4, cu_seqlens=cu, return_stats=True, **SAMPLED, **how
    )[0],
}


@needs_gpu
@pytest.mark.parametrize("frozen", [(), ("weight",)], ids=["trained head", "frozen head"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_nothing_waits_for_the_device(engine, name, dtype, frozen):
    p = draw_problem(130, 64, 1000, dtype=dtype, frozen=frozen).copy(device="cuda")
    boundaries = torch.tensor([0, 40, 130], device="cuda")
    for mode in ("default", "error"):  # kernels are compiled in the first turn
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode(mode)
        try:
            CALLS[name](p.args, boundaries, **engine.how).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
