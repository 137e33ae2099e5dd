"""Narrow types and extreme logits.

Inputs are rounded to a type, the truth is computed from the rounded inputs in float64, and the
error may be a small multiple of the one that ``linear`` and ``cross_entropy`` make in that type.
"""

import math

import pytest
import torch
from torch.nn import functional

from bft_kernels import reference
from bft_kernels.backends.common import chunked, gemm, logit_rows
from tests.support.losses import balanced, cross_entropy, nll, specified_nll
from tests.support.problems import Problem, draw_problem, error_of

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
    return functional.cross_entropy(plain_logits(p), p.target, reduction="none")


def plain_logits(p):
    return functional.linear(p.hidden, p.weight, p.bias)


PATHS = {
    "recomputed": lambda p, weight: (weight * nll(p)).sum(),
    "recomputed in blocks": lambda p, weight: (weight * nll(p, max_buffer_bytes=100_000)).sum(),
    "made in the forward": lambda p, weight: cross_entropy(
        p, token_weight=weight, reduction="sum", max_buffer_bytes=300_000
    ),
}


def check_gradients(p, weight):
    """Of every path: their error is a small multiple of torch's usual one."""
    exact, usual = (q.gradients((weight * plain_nll(q)).sum()) for q in (p.copy(torch.float64), p))
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
    truth = p.copy(torch.float64)
    value, stats = nll(p, return_stats=True)
    assert value.dtype == torch.float32
    usual = error_of(plain_nll(p), plain_nll(truth))
    assert error_of(value, plain_nll(truth)) <= FACTOR[dtype] * usual
    logits, own = (plain_logits(q)[p.labelled] for q in (truth, p))
    usual = error_of(own.logsumexp(1), logits.logsumexp(1))
    assert error_of(stats.lse[p.labelled], logits.logsumexp(1)) <= FACTOR[dtype] * usual
    entropy = [torch.distributions.Categorical(logits=x).entropy() for x in (own.float(), logits)]
    # Rounding of a sum over V, which is all that is left where float32 happens to cancel.
    rounding = 8 * torch.finfo(torch.float32).eps
    allowed = FACTOR[dtype] * error_of(*entropy) + rounding
    assert error_of(stats.entropy[p.labelled], entropy[1]) <= allowed
    check_gradients(p, torch.rand(160))


@pytest.mark.parametrize("offset", [30.0, 1000.0])
def test_a_large_common_offset_costs_nothing(offset):
    # Rows of `weight` with a large mean, as embeddings have: where the recomputed probabilities of
    # a row share an error, that mean collects it in dH.
    p = draw_problem(100, 96, 1000, bias=True, dtype=torch.float32, scale=3.0, ignored=0)
    p.weight.data += 3 * torch.randn(96) / math.sqrt(96)
    p.bias.data += offset
    check_gradients(p, torch.rand(100))


@pytest.mark.parametrize(
    "types",
    [
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32, torch.float16),
    ],
)
def test_mixed_types(types):
    # bf16 activations with a float32 head and the other way round.
    p = draw_problem(80, 32, 300, bias=True)
    hidden, weight, bias = (leaf.to(t) for leaf, t in zip(p.leaves.values(), types, strict=True))
    p = Problem(hidden, weight, p.target, bias)
    wide = p.copy(torch.float64)
    loss, truth = nll(p), specified_nll(wide)
    assert loss.dtype == torch.float32
    assert error_of(loss, truth) < 1e-6
    exact = wide.gradients(truth.sum())
    for name, got in p.gradients(loss.sum()).items():
        assert got.dtype == p.leaves[name].dtype
        # One rounding to the leaf's own type.
        assert error_of(got, exact[name]) < max(2e-6, torch.finfo(got.dtype).eps)


@pytest.fixture(params=["wide", "narrow"])
def products(request, monkeypatch):
    """``narrow``: half-precision operands enter products as they are, as they do on a GPU."""
    if request.param == "narrow":

        def wide_product(a, b, accumulator, out=None):
            assert a.dtype == b.dtype
            return torch.mm(a.to(accumulator), b.to(accumulator), out=out)

        for module in (gemm, chunked, logit_rows):
            monkeypatch.setattr(module, "gemm_dtype", lambda operand, *_: operand)
        for module in (gemm, *([spmm] if spmm else [])):
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
    rows, divisor = 96, 2**22
    p = draw_problem(rows, 16, 60, ignored=0, bias=True, scale=0.25, dtype=torch.float16)
    p = p.copy(bias=torch.zeros(60), frozen=("weight", "bias") if frozen else ())
    wide = p.copy(torch.float64)
    exact = wide.gradients(specified_nll(wide, **how).sum() * 2**16 / divisor)
    call = {"backend": backend, "max_buffer_bytes": 20_000}
    share = torch.full((rows,), 1 / divisor)
    losses = [
        cross_entropy(p, token_weight=share, reduction="sum", **call, **how),
        cross_entropy(p, reduction="none", **call, **how).sum() / divisor,
    ]
    if not how:
        sft = {"scheme": "sft", "normalize": "token", "num_items": divisor}
        losses.append(balanced(p, cu_seqlens=torch.tensor([0, rows // 3, rows]), **sft, **call))
    for loss in losses:
        for name, got in p.gradients(loss * 2**16).items():
            assert error_of(got, exact[name]) < (2e-3 if products == "narrow" else 1e-3)


def test_a_scale_is_a_power_of_two():
    for upstream in (1e-25, 3e-7, 0.999, 1.0, 5e5):
        scale = gemm.scale_for(torch.tensor([upstream, -upstream / 2]), torch.ones(2), 1.0, 0.0)
        assert math.frexp(float(scale))[0] == 0.5
        assert 128 <= scale * upstream < 256
    for upstream in (torch.zeros(3), torch.tensor([math.inf]), torch.empty(0)):
        assert gemm.scale_for(upstream, upstream, 1.0, 0.1) == 1


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


@pytest.mark.parametrize("budget", [1, None])
@pytest.mark.parametrize("name", EXTREMES)
def test_extreme_logits(name, budget):
    # The unit matrix for a head: hidden states are logits and their gradient is that of the logits.
    logits, target, upstream = torch.tensor([EXTREMES[name]] * 6), torch.arange(6), torch.rand(6)
    exact = reference.token_stats(logits.double(), torch.eye(6).double(), target)
    narrow = exact["nll"].float()  # infinite where float32 ends
    finite = narrow < BIG / 10  # their sum is finite, too
    expected = (logits.double().softmax(1) - torch.eye(6)) * upstream[:, None]
    how = {"max_buffer_bytes": budget}
    for frozen in ((), ("weight",)):
        p = Problem(logits, torch.eye(6), target, frozen=frozen)
        loss, stats = nll(p, return_stats=True, **how)
        assert torch.allclose(loss, narrow, rtol=2e-6, atol=2**-23), loss
        assert torch.allclose(stats.lse, exact["lse"].float(), rtol=1e-6)
        assert torch.allclose(stats.confidence, exact["confidence"].float(), rtol=2e-6, atol=2**-23)
        assert torch.allclose(stats.entropy, exact["entropy"].float(), rtol=2e-6, atol=1e-6)
        assert torch.equal(stats.correct, exact["correct"])
        share = torch.where(finite, upstream, 0)
        weighted = cross_entropy(p, token_weight=share, reduction="sum", **how)
        assert bool(torch.isfinite(weighted))
        # eps of 1e-20 keeps everything that could show.
        sampled = nll(p, gradient="sampled", eps=1e-20, **how)
        runs = {
            "nll": ((loss * upstream).sum(), slice(None)),
            "weighted": (weighted, finite),
            "sampled": ((sampled * upstream).sum(), slice(None)),
        }
        for path, (value, rows) in runs.items():
            difference = (p.gradients(value)["hidden"].double() - expected)[rows].abs()
            assert difference.max() < 1e-6, f"{path}: {difference}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_extreme_logits_of_narrow_types(dtype):
    top = torch.finfo(dtype).max
    logits = torch.tensor([[top, top, -top, 0.0], [top, 0.0, 1.0, -top]], dtype=dtype)
    p = Problem(logits, torch.eye(4, dtype=dtype), torch.tensor([0, 1]))
    exact = functional.cross_entropy(logits.double(), p.target, reduction="none").float()
    assert torch.allclose(nll(p), exact, rtol=1e-6)
    expected = logits.double().softmax(1) - torch.eye(4)[:2]
    assert torch.allclose(p.gradients(nll(p).sum())["hidden"].double(), expected)


def test_confidence_never_exceeds_one():
    # Tokens of probability 1 - 1e-9 and above, where rounding decides.
    p = draw_problem(3000, 8, 50, dtype=torch.float32, ignored=0, scale=40.0)
    p.target = plain_logits(p).argmax(1)
    loss, stats = nll(p, return_stats=True)
    assert float(loss.detach().min()) >= 0
    assert float(stats.confidence.max()) <= 1
    assert (stats.confidence == 1).sum() > 100
    assert float(stats.entropy.min()) >= 0


def test_gradients_of_confident_tokens():
    margins = torch.linspace(1, 60, 40)
    logits = torch.stack([margins, torch.zeros(40)], dim=1)
    expected = -1 / (1 + margins.double().exp())
    # The sum of exponentials is 1 and a little: half a unit of 1 is what may be lost of it.
    allowed = 2**-24 + 2e-6 * expected.abs()
    for frozen in ((), ("weight",)):
        p = Problem(logits, torch.eye(2), torch.zeros(40, dtype=torch.int64), frozen=frozen)
        for loss in (
            nll(p).sum(),
            cross_entropy(p, reduction="sum"),
            nll(p, gradient="sampled", eps=1e-30).sum(),
        ):
            got = p.gradients(loss)["hidden"][:, 0].double()
            assert bool(((got - expected).abs() <= allowed).all())
