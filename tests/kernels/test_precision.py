"""Narrow types and extreme logits.

Inputs are rounded to a type, the truth is computed from the rounded inputs in float64, and the
error may be a small multiple of the one that ``linear`` and ``cross_entropy`` make in that type.
"""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy, linear

from bft_kernels import balanced_linear_cross_entropy, linear_cross_entropy, linear_nll, reference
from bft_kernels.backends.common import chunked, gemm, logit_rows
from bft_kernels.backends.torch import backward
from tests.support.problems import draw_problem, error_of

try:
    from bft_kernels.backends.triton import spmm
except ImportError:
    spmm = None  # type: ignore[assignment]

# Float32 does the same arithmetic as torch, in another order: half as much again is chance. Narrow
# types round their logits in torch and do not here, so here they must be better.
FACTOR = {torch.float32: 1.5, torch.bfloat16: 1.05, torch.float16: 1.05}
# Logits recomputed in blocks of another shape than the forward's round differently, so that a row's
# probabilities do not sum to exactly 1. That shows in dH, and only in float32.
RECOMPUTED_FACTOR = 10.0


def plain_nll(p):
    return cross_entropy(linear(p.hidden, p.weight, p.bias), p.target, reduction="none")


PATHS = {
    "recomputed": lambda p, weight: (weight * linear_nll(*p.args, bias=p.bias)).sum(),
    "recomputed in blocks": lambda p, weight: (
        weight * linear_nll(*p.args, bias=p.bias, max_buffer_bytes=100_000)
    ).sum(),
    "made in the forward": lambda p, weight: linear_cross_entropy(
        *p.args, bias=p.bias, token_weight=weight, reduction="sum", max_buffer_bytes=300_000
    ),
}


def check_gradients(p, weight, exact, usual):
    """Of every path: their error is a small multiple of torch's usual one."""
    for path, run in PATHS.items():
        for name, got in p.gradients(run(p, weight)).items():
            assert got.dtype == p.hidden.dtype
            recomputed = path == "recomputed in blocks" and got.dtype == torch.float32
            factor = RECOMPUTED_FACTOR if recomputed else FACTOR[got.dtype]
            allowed = factor * error_of(usual[name], exact[name])
            assert error_of(got, exact[name]) <= allowed, (path, name)


@pytest.mark.parametrize("frozen", [(), ("weight", "bias")], ids=["trained head", "frozen head"])
@pytest.mark.parametrize("scale", [0.3, 3.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_errors_are_torchs_own(dtype, scale, frozen):
    p = draw_problem(160, 96, 1000, bias=True, dtype=dtype, scale=scale, ignored=0.1, frozen=frozen)
    weight = torch.rand(160)
    truth = p.copy(torch.float64)
    nll = plain_nll(truth)
    exact = truth.gradients((weight * nll).sum())
    plain = plain_nll(p)
    usual = p.gradients((weight * plain).sum())
    value, stats = linear_nll(*p.args, bias=p.bias, return_stats=True)
    assert value.dtype == torch.float32
    assert error_of(value, nll) <= FACTOR[dtype] * error_of(plain, nll)
    labelled = p.target != -100
    logits = linear(truth.hidden, truth.weight, truth.bias)[labelled]
    own = linear(p.hidden, p.weight, p.bias)[labelled]
    assert error_of(stats.lse[labelled], logits.logsumexp(1)) <= FACTOR[dtype] * error_of(
        own.logsumexp(1), logits.logsumexp(1)
    )
    entropy = [torch.distributions.Categorical(logits=x).entropy() for x in (own.float(), logits)]
    # Rounding of a sum over V, which is all that is left where float32 happens to cancel.
    unit = torch.finfo(torch.float32).eps
    assert (
        error_of(stats.entropy[labelled], entropy[1])
        <= FACTOR[dtype] * error_of(*entropy) + 8 * unit
    )
    check_gradients(p, weight, exact, usual)


@pytest.mark.parametrize("offset", [30.0, 1000.0])
def test_a_large_common_offset_costs_nothing(offset):
    # Rows of `weight` with a large mean, as embeddings have: where the recomputed probabilities of
    # a row share an error, that mean collects it in dH.
    p = draw_problem(100, 96, 1000, bias=True, dtype=torch.float32, scale=3.0, ignored=0)
    with torch.no_grad():
        p.weight += 3 * torch.randn(96) / math.sqrt(96)
        p.bias += offset
    weight = torch.rand(100)
    truth = p.copy(torch.float64)
    exact = truth.gradients((weight * plain_nll(truth)).sum())
    usual = p.gradients((weight * plain_nll(p)).sum())
    check_gradients(p, weight, exact, usual)


def test_mixed_types():
    # bf16 activations with a float32 head and the other way round.
    p = draw_problem(80, 32, 300, bias=True)
    for types in (
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32, torch.float16),
    ):
        q = p.copy()
        leaves = [
            x.detach().to(t).requires_grad_()
            for x, t in zip((q.hidden, q.weight, q.bias), types, strict=True)
        ]
        wide = [x.detach().double().requires_grad_() for x in leaves]
        nll = linear_nll(leaves[0], leaves[1], q.target, bias=leaves[2])
        truth = reference.linear_nll(wide[0], wide[1], q.target, bias=wide[2])
        assert nll.dtype == torch.float32
        assert error_of(nll, truth) < 1e-6
        got = torch.autograd.grad(nll.sum(), leaves)
        for g, x, e in zip(got, leaves, torch.autograd.grad(truth.sum(), wide), strict=True):
            assert g.dtype == x.dtype
            # One rounding to the leaf's own type.
            assert error_of(g, e) < max(2e-6, torch.finfo(x.dtype).eps)


@pytest.fixture(params=["wide", "narrow"])
def products(request, monkeypatch):
    """``narrow``: half-precision operands enter products as they are, as they do on a GPU."""
    if request.param == "narrow":

        def wide_product(a, b, accumulator, out=None):
            assert a.dtype == b.dtype
            return torch.mm(a.to(accumulator), b.to(accumulator), out=out)

        for module in (gemm, chunked, logit_rows):
            monkeypatch.setattr(module, "gemm_dtype", lambda operand, *_: operand)
        for module in (gemm, backward, *([spmm] if spmm else [])):
            monkeypatch.setattr(module, "multiply", wide_product)
        monkeypatch.setattr(gemm, "_ADDS_WIDE", False)
        monkeypatch.setattr(gemm, "_PRODUCT_ELEMENTS", 100)
    return str(request.param)


BACKENDS = ["torch", "cuda", *(["triton"] if spmm else [])]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("frozen", [False, True], ids=["trained head", "frozen head"])
@pytest.mark.parametrize("how", [{}, {"z_loss": 0.1, "temperature": 0.05}], ids=["plain", "steep"])
def test_float16_gradients_survive_until_the_loss_scale_arrives(
    backend, frozen, how, products, request
):
    if backend == "cuda":
        request.getfixturevalue("emulated_device")
    # 1/N of a probability is below float16's range; a scaler multiplies the loss by 2^16 and more.
    # The divisor, that of many micro-batches, does the same to fewer tokens.
    rows, vocabulary, divisor = 96, 60, 2**22
    hidden = (torch.randn(rows, 16) / 4).half()
    weight = (torch.randn(vocabulary, 16) / 4).half()
    target = torch.randint(vocabulary, (rows,))
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)
    bias = torch.zeros(vocabulary, requires_grad=not frozen)
    wide = [x.detach().double().requires_grad_() for x in (h, w, bias)]
    truth = reference.linear_nll(*wide[:2], target, bias=wide[2], **how).sum() * 2**16 / divisor
    exact = torch.autograd.grad(truth, wide)
    call = {"bias": bias, "backend": backend, "max_buffer_bytes": 20_000}
    share = torch.full((rows,), 1 / divisor)
    losses = [
        linear_cross_entropy(h, w, target, token_weight=share, reduction="sum", **call, **how),
        linear_cross_entropy(h, w, target, reduction="none", **call, **how).sum() / divisor,
    ]
    if not how:
        sft = {"scheme": "sft", "normalize": "token", "num_items": divisor}
        cu_seqlens = torch.tensor([0, rows // 3, rows])
        losses.append(
            balanced_linear_cross_entropy(h, w, target, cu_seqlens=cu_seqlens, **sft, **call)
        )
    leaves = [x for x in (h, w, bias) if x.requires_grad]
    for loss in losses:
        got = torch.autograd.grad(loss * 2**16, leaves)
        for mine, expected in zip(got, exact, strict=False):
            assert error_of(mine, expected) < (2e-3 if products == "narrow" else 1e-3)


def test_a_scale_is_a_power_of_two():
    for upstream in (1e-25, 3e-7, 0.999, 1.0, 5e5):
        scale = gemm.scale_for(torch.tensor([upstream, -upstream / 2]), torch.ones(2), 1.0, 0.0)
        assert math.frexp(float(scale))[0] == 0.5
        assert 128 <= scale * upstream < 256
    for upstream in (torch.zeros(3), torch.tensor([math.inf]), torch.empty(0)):
        assert gemm.scale_for(upstream, upstream, 1.0, 0.1) == 1


# --- extreme logits ------------------------------------------------------------------------------

BIG = 3e38
EXTREMES = {
    "ties": [0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
    "some ties": [5.0, 5.0, -3.0, 5.0, 5.0, 0.0],
    "certain": [1e4, 0.0, -1e4, 3.0, 2.0, 1.0],
    "nearly certain": [20.0, 0.0, 1.0, -1.0, 2.0, 3.0],
    "1e4": [1e4, 9999.0, -1e4, 0.0, 9998.5, 1.0],
    "offset of 1e8": [1e8, 1e8 + 8, 1e8 - 8, 1e8, 1e8 - 64, 1e8 + 8],
    "offset of -1e8": [-1e8, -1e8 + 8, -1e8 - 8, -1e8, -1e8 - 64, -1e8 + 8],
    "ties at 1e30": [1e30, 1e30, 0.0, -1e30, 1e30, 1.0],
    "ties at 3e38": [BIG, BIG, -BIG, 0.0, BIG, 1.0],
    "all 3e38": [BIG] * 6,
    "all -3e38": [-BIG] * 6,
    "denormal": [1e-40, -1e-40, 0.0, 1e-45, 0.0, 0.0],
}

BLOCKS = [1, None]


@pytest.mark.parametrize("budget", BLOCKS)
@pytest.mark.parametrize("name", EXTREMES)
def test_extreme_logits(name, budget):
    # The unit matrix for a head: hidden states are logits and their gradient is that of the logits.
    logits = torch.tensor([EXTREMES[name]] * 6)
    target, upstream = torch.arange(6), torch.rand(6)
    head, exact = (
        torch.eye(6),
        reference.token_stats(logits.double(), torch.eye(6).double(), target),
    )
    p = logits.double().softmax(1)
    expected = (p - torch.eye(6)) * upstream[:, None]
    for frozen in (False, True):
        hidden, weight = logits.clone().requires_grad_(), head.clone().requires_grad_(not frozen)
        nll, stats = linear_nll(hidden, weight, target, return_stats=True, max_buffer_bytes=budget)
        narrow = exact["nll"].float()  # infinite where float32 ends
        assert torch.allclose(nll, narrow, rtol=2e-6, atol=2**-23), nll
        assert torch.allclose(stats.lse, exact["lse"].float(), rtol=1e-6)
        assert torch.allclose(stats.confidence, exact["confidence"].float(), rtol=2e-6, atol=2**-23)
        assert torch.allclose(stats.entropy, exact["entropy"].float(), rtol=2e-6, atol=1e-6)
        assert torch.equal(stats.correct, exact["correct"])
        finite = narrow < BIG / 10  # their sum is finite, too
        weighted = linear_cross_entropy(
            hidden,
            weight,
            target,
            token_weight=torch.where(finite, upstream, 0),
            reduction="sum",
            max_buffer_bytes=budget,
        )
        assert bool(torch.isfinite(weighted))
        sampled = linear_nll(
            hidden, weight, target, gradient="sampled", eps=1e-20, max_buffer_bytes=budget
        )
        # eps of 1e-20 keeps everything that could show.
        runs = {
            "nll": (nll * upstream).sum(),
            "weighted": weighted,
            "sampled": (sampled * upstream).sum(),
        }
        for path, loss in runs.items():
            (grad,) = torch.autograd.grad(loss, hidden)
            rows = finite if path == "weighted" else slice(None)
            difference = (grad.double() - expected)[rows].abs()
            assert difference.max() < 1e-6, f"{path}: {difference}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_extreme_logits_of_narrow_types(dtype):
    top = torch.finfo(dtype).max
    logits = torch.tensor([[top, top, -top, 0.0], [top, 0.0, 1.0, -top]], dtype=dtype)
    target, head = torch.tensor([0, 1]), torch.eye(4, dtype=dtype)
    hidden = logits.requires_grad_()
    nll = linear_nll(hidden, head, target)
    exact = cross_entropy(logits.detach().double(), target, reduction="none").float()
    assert torch.allclose(nll, exact, rtol=1e-6)
    nll.sum().backward()
    expected = logits.detach().double().softmax(1) - torch.eye(4)[:2]
    assert torch.allclose(hidden.grad.double(), expected)


def test_confidence_never_exceeds_one():
    # Tokens of probability 1 - 1e-9 and above, where rounding decides.
    p = draw_problem(3000, 8, 50, dtype=torch.float32, ignored=0, scale=40.0)
    with torch.no_grad():
        target = (p.hidden @ p.weight.T).argmax(1)
    nll, stats = linear_nll(p.hidden, p.weight, target, return_stats=True)
    assert float(nll.detach().min()) >= 0
    assert float(stats.confidence.max()) <= 1
    assert (stats.confidence == 1).sum() > 100
    assert float(stats.entropy.min()) >= 0


def test_gradients_of_confident_tokens():
    margins = torch.linspace(1, 60, 40)
    logits = torch.stack([margins, torch.zeros(40)], dim=1)
    target = torch.zeros(40, dtype=torch.int64)
    for frozen in (False, True):
        hidden, head = logits.clone().requires_grad_(), torch.eye(2).requires_grad_(not frozen)
        for loss in (
            linear_nll(hidden, head, target).sum(),
            linear_cross_entropy(hidden, head, target, reduction="sum"),
            linear_nll(hidden, head, target, gradient="sampled", eps=1e-30).sum(),
        ):
            (grad,) = torch.autograd.grad(loss, hidden)
            expected = -1 / (1 + margins.double().exp())
            # The sum of exponentials is 1 and a little: half a unit of 1 is what may be lost of it.
            allowed = 2**-24 + 2e-6 * expected.abs()
            assert bool(((grad[:, 0].double() - expected).abs() <= allowed).all())
