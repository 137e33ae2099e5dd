"""The CUDA backend's own paths, its device code run by the emulation."""

import functools
import math

import pytest
import torch

from bft_kernels import linear_cross_entropy, linear_nll, reference
from bft_kernels.backends import cuda
from bft_kernels.backends.common import logit_rows, lse_bound, on_device
from bft_kernels.backends.common.logit_rows import LogitRows
from bft_kernels.backends.common.rows import KnownRows, row_results
from bft_kernels.backends.cuda import forward, kernels, native
from bft_kernels.dispatch import engine as engine_of
from bft_kernels.dispatch import why_not
from bft_kernels.results import Gradients, Saved
from tests.support.problems import (
    DTYPES,
    Problem,
    assert_close,
    call_of,
    draw_problem,
    error_of,
    weighted_gradients,
)
from tests.support.samples import sampled_options, specified_sample

SAMPLED = {"gradient": "sampled", "eps": 2**-5, "seed": 7}


def test_says_why_it_does_not_run(monkeypatch):
    p = draw_problem(4, 3, 5, dtype=torch.float32)
    if not torch.cuda.is_available():
        reasons = why_not("cuda", p.hidden, p.weight)
        assert "there is no CUDA device (torch.cuda.is_available() is False)" in reasons
        assert "hidden is on cpu, it takes CUDA tensors" in reasons
        with pytest.raises(RuntimeError, match=r"backend: got 'cuda'.*there is no CUDA device"):
            linear_nll(*p.args, backend="cuda")
    monkeypatch.setattr(cuda, "find_spec", lambda name: None)
    assert "bft_kernels._cuda is not built" in why_not("cuda", p.hidden, p.weight)[0]


@pytest.fixture(params=["tiles", "chunks"])
def engine(request, monkeypatch):
    """Of the forward."""
    monkeypatch.setattr(on_device, "takes_chunks", lambda *_: request.param == "chunks")
    return request.param


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("gradient", ["exact", "sampled"])
@pytest.mark.parametrize(
    ("stored", "operand", "size"),
    [
        ((0, 0), torch.bfloat16, 1.0),
        ((0, 1), torch.bfloat16, 1.0),
        ((1, 0), torch.bfloat16, 1.0),
        ((0, 0), torch.float16, 2.0**-20),  # of which a dy that is not scaled loses most digits
    ],
    ids=["wide", "weight", "hidden", "float16"],
)
def test_operands_stored_in_another_type(
    emulated_device, stored, operand, size, gradient, monkeypatch
):
    """Under autocast gradients are of the type that is stored, and rounded to it once."""
    # Rows without room are computed again, by way of a dy that is rounded.
    monkeypatch.setattr(logit_rows, "capacity_for", lambda rows, vocabulary, eps: rows * vocabulary)
    types = torch.float32, operand
    p = draw_problem(21, 12, 180, dtype=operand, scale=2.0)
    how = sampled_options(p) if gradient == "sampled" else {}
    found = []
    for backend, autocast in (("cuda", True), ("torch", False)):
        hidden, weight = (
            x.detach().to(types[kind] if autocast else torch.float32).requires_grad_()
            for x, kind in zip((p.hidden, p.weight), stored, strict=True)
        )
        with torch.autocast("cpu", operand, enabled=autocast):
            nll = linear_nll(hidden, weight, p.target, backend=backend, **how)
        (nll * torch.linspace(0.5, 2, 21) * size).sum().backward()
        found.append((hidden.grad / size, weight.grad / size))
    for got, want, kind in zip(*found, stored, strict=True):
        assert got.dtype == types[kind]
        # An exact dy is rounded before its products.
        assert_close(got, want, 1e-5 if how and kind == 0 else 2**-6)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_gradients_in_float32_are_rounded_nowhere_else(emulated_device, dtype):
    p = draw_problem(20, 24, 150, dtype=dtype, scale=2.0, frozen=("hidden", "weight"))
    call = call_of(p)
    inputs, out = kernels.make_inputs(call), engine_of("cuda").linear_nll(call)
    known = KnownRows(out.lse, out.lse_low, out.nll, torch.randn(20))
    narrow, wide = (
        Gradients(torch.zeros(20, 24, dtype=kind), torch.empty(150, 24, dtype=kind), None)
        for kind in (dtype, torch.float32)
    )
    for into in (narrow, wide):
        kernels.recompute(inputs, known, None, into, adds=False)
    for one, other in zip(narrow[:2], wide[:2], strict=True):
        assert torch.equal(one, other.to(dtype))
        assert not torch.equal(other, other.to(dtype).float())


# Rows of teams of each size and of each number of pieces a thread, ragged and not; columns that
# most of many rows keep.
WIDTHS = [1, 8, 67, 512, 520, 1020, 2040, 4096, 4104, 8200, 16381, 16384]
LISTED = [(2, width, 40) for width in WIDTHS] + [(300, 16, 9), (300, 600, 9)]


@pytest.mark.parametrize("adds", [False, True], ids=["thinned", "values, wide, adds"])
@pytest.mark.parametrize("shape", LISTED, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_of_lists(emulated_device, dtype, shape, adds, poison):
    """Of the torch backend's lists, with values or without, in the operands' type or float32."""
    p = draw_problem(*shape, bias=True, dtype=dtype, scale=1.5, ignored=0.2)
    p.target[0] = 1
    how = sampled_options(p)
    seed, torch_engine = how.pop("seed"), engine_of("torch")
    frozen = ("hidden", "weight", "bias")
    truth = call_of(p.copy(torch.float64, frozen=frozen), seed, **how)
    out, grad = torch_engine.linear_nll(truth), torch.linspace(0.5, 2, shape[0])
    saved = Saved(*(getattr(out, name) for name in Saved._fields))
    want = torch_engine.linear_nll_backward(truth, grad.double(), saved)

    nothing = torch.empty(shape[0])  # values need no more
    lse, nll = (nothing, nothing) if adds else (out.lse.float(), out.nll.float())
    known = KnownRows(lse, nothing, nll, torch.where(p.labelled, grad, nothing))
    values = out.csr_values.float() if adds else torch.empty(0)
    kind = torch.float32 if adds else dtype
    into = Gradients(
        torch.empty(*p.hidden.shape, dtype=kind),
        torch.empty(*p.weight.shape, dtype=kind),
        torch.zeros(shape[2]),
    )
    if adds:
        into.weight.fill_(1)
    inputs = kernels.make_inputs(call_of(p, seed, **how))
    kernels.spmm(inputs, known, saved._replace(csr_values=values), into, adds=adds)
    allowed = torch.finfo(kind).eps + 1e-5
    assert bool(into.hidden[~p.labelled].isnan().all())
    assert error_of(into.hidden[p.labelled], want.hidden[p.labelled]) <= allowed
    assert error_of(into.weight, want.weight + float(adds)) <= allowed
    assert error_of(into.bias, want.bias) <= 1e-5


@pytest.mark.parametrize("vocabulary", [1, 31, 257, 2311])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_take_the_place_of_logits(emulated_device, dtype, vocabulary, seed):
    """In the type of a GPU's GEMMs. On a CPU those of the engine take float32."""
    emulated_device.how = {"strict": bool(seed % 2)}
    target = torch.randint(vocabulary, (4,))
    p = Problem(2 * torch.randn(4, vocabulary), torch.eye(vocabulary), target, frozen=("weight",))
    want = weighted_gradients(p.copy(torch.float64), backend="torch", softcap=5.0)["hidden"]
    call, logits = call_of(p, softcap=5.0), p.hidden.detach().clone()
    results, rows = row_results(call, 4), LogitRows(logits, p.target, None, call.settings)
    kernels.softmax_rows(rows, results)
    dy = logits.view(dtype)[:, :vocabulary]
    known = [results[name] for name in ("lse", "lse_low", "nll")]
    kernels.gradient_rows(rows, dy, *known, torch.linspace(0.5, 2, 4))
    assert error_of(dy, want) <= torch.finfo(dtype).eps / 2 + 5e-6


@pytest.mark.parametrize("transform", [{}, {"softcap": 5.0, "temperature": 1.3}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_bound_of_lse_keeps_candidates_few(emulated_device, engine, dtype, transform, seed):
    """Beside the kept: what the margins let through, and what 16 bits of a draw cannot tell."""
    rows, vocabulary, eps = 20, 600, 2**-6
    p = draw_problem(rows, 24, vocabulary, ignored=0.0, bias=bool(transform), dtype=dtype, scale=3)
    own, call = p.of_labelled(), call_of(p, seed, gradient="sampled", eps=eps, **transform)
    z = reference.logits(own.hidden, own.weight, own.bias, **transform)
    lse = z.logsumexp(1, keepdim=True)
    # A margin where a bound is made, one where it is used, and one for what float32 rounds off.
    margin = lse_bound.EXP_MARGIN + 3 * lse_bound.ROUNDING * (1 + lse.abs())
    draws = reference.uniforms(seed, range(rows), torch.arange(vocabulary))
    # A draw's bits below 2^-16 are cut off, and the threshold is rounded to a multiple of that.
    may_pass = (draws - 1.5 * 2**-16) * eps <= (z - lse + margin).exp()
    may_pass[range(rows), p.target] = True
    kept = specified_sample(p, seed, eps, **transform).kept
    results, bias = row_results(call, rows), None if p.bias is None else p.bias.float()
    mask = torch.empty(rows, -(-vocabulary // 32), dtype=torch.int32)
    for bounded in (False, True):
        if engine == "tiles":
            bounds = lse[:, 0].float() if bounded else torch.full((rows,), -math.inf)
            forward._forward(kernels.make_inputs(call), results, 0, rows, bounds, mask)
        else:
            logits = LogitRows((own.hidden @ own.weight.T).float(), p.target, bias, call.settings)
            popular = torch.arange(vocabulary) if bounded else None
            kernels.softmax_rows(logits, results, seed=call.seed, popular=popular, mask=mask)
        bits = ((mask[..., None] >> torch.arange(32)) & 1).flatten(1)[:, :vocabulary].bool()
        assert not bool((kept & ~bits).any())
    assert not bool((bits & ~may_pass).any())


def test_margins_are_those_of_the_other_backends(emulated):
    for name in ("ROUNDING", "EXP_MARGIN"):
        assert getattr(emulated, name) == torch.tensor(getattr(lse_bound, name)).item(), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parts_of_the_rows_change_no_row(emulated_device, dtype, monkeypatch):
    """Of the tiled passes: 16 rows at a time make the same statistics and certificate as all."""
    monkeypatch.setattr(on_device, "takes_chunks", lambda *_: False)
    p = draw_problem(40, 72, 300, dtype=dtype, bias=True)
    how = SAMPLED | {"bias": p.bias, "return_stats": True, "hidden_variance": True}
    whole = linear_cross_entropy(*p.args, backend="cuda", **how)
    certificate = emulated_device.module.certificate

    @functools.wraps(certificate)
    def in_parts(*, rows, **given):
        for first in range(0, rows, 16):
            certificate(rows=min(16, rows - first), **given | {"first_row": first})

    monkeypatch.setattr(emulated_device.module, "certificate", in_parts)
    monkeypatch.setattr(forward, "TILE", 16)
    parts = linear_cross_entropy(*p.args, backend="cuda", max_buffer_bytes=1, **how)
    assert emulated_device.launches.count("linear_nll_forward") == 1 + 3
    for one, other in zip((parts[0], *parts[1]), (whole[0], *whole[1]), strict=True):
        assert one is other is None or torch.equal(one, other)


@pytest.mark.parametrize("gradient", ["exact", "sampled"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_order_of_threads_changes_nothing(emulated_device, dtype, gradient, engine):
    vocabulary = 2311 if (engine, gradient) == ("chunks", "exact") else 300
    p = draw_problem(6, 264, vocabulary, dtype=dtype, bias=True)
    options = {"label_smoothing": 0.1, "return_stats": True}
    if gradient == "sampled":
        options = SAMPLED | {"return_stats": True, "hidden_variance": True}
    runs = []
    for emulated_device.how in ({}, {"seed": 5}, {"seed": 9, "strict": True}):
        copy = p.copy()
        loss, stats = linear_cross_entropy(*copy.args, bias=copy.bias, backend="cuda", **options)
        loss.backward()
        found = [loss, *stats, *copy.grads().values()]
        runs.append(torch.cat([x.detach().double().flatten() for x in found if x is not None]))
    assert bool(runs[0].isfinite().all())
    assert torch.equal(runs[1], runs[0])
    assert torch.equal(runs[2], runs[0])


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("frozen", [(), ("weight", "bias")], ids=["trained head", "frozen head"])
def test_a_frozen_head_has_no_work_for_dw(emulated_device, frozen):
    p = draw_problem(9, 6, 40, bias=True, dtype=torch.float32, frozen=frozen)
    linear_nll(*p.args, bias=p.bias, backend="cuda", **SAMPLED).sum().backward()
    assert ("sort_entries" in emulated_device.launches) == (not frozen)
    assert ("weight_gradient" in emulated_device.launches) == (not frozen)


@pytest.mark.usefixtures("engine")
def test_rows_too_wide_to_gather_are_computed_again(emulated_device, monkeypatch):
    p = draw_problem(21, 12, 180, dtype=torch.float32, scale=2.0)
    how, grads = sampled_options(p), []
    for widest in (native.kernels().SPMM_MAX_WIDTH, 11):
        monkeypatch.setattr(emulated_device.module, "SPMM_MAX_WIDTH", widest)
        emulated_device.launches.clear()
        copy = p.copy()
        linear_nll(*copy.args, backend="cuda", **how).sum().backward()
        assert ("spmm_hidden" in emulated_device.launches) == (widest > 11)
        grads.append(copy.grads())
    assert_close(grads[1], grads[0], 1e-5)


def test_an_address_keeps_no_tensor_alive(emulated_device):
    """Where an argument is made in the call itself, a launch would use memory of another."""
    gone = native.out(torch.zeros(4, dtype=torch.int64))
    with pytest.raises(AssertionError, match="starts_ptr: the tensor is gone before the launch"):
        native._cuda.column_starts(sorted_keys_ptr=0, E=0, V=3, starts_ptr=gone, stream=0)
