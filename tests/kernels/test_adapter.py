"""A low-rank adapter of the head: the loss of ``[hidden | a]`` and ``[weight | b]``, not joined.

The leaves are the joined matrices. Ours get their parts, whose gradients autograd joins again.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch

from bft_kernels import (
    BalancedLinearCrossEntropyLoss,
    LinearCrossEntropyLoss,
    balanced_linear_cross_entropy,
    empty_cache,
    linear_cross_entropy,
    linear_nll,
    ops,
)
from bft_kernels.backends.common import on_device
from bft_kernels.problem import make_problem
from bft_kernels.results import Saved
from bft_kernels.settings import Settings
from tests.kernels.test_functional import OPTIONS, SHAPES, drawn
from tests.support.allocations import measure_allocations
from tests.support.losses import assert_same_loss, balanced, cross_entropy, nll, specified_nll
from tests.support.problems import assert_close, draw_problem, error_of

SAMPLED = {"gradient": "sampled", "eps": 2**-5}


def parts(p, rank):
    """Arguments of ours: the first columns of the joined matrices, and an adapter of the others."""
    hidden, weight = [x.tensor_split([x.shape[-1] - rank], dim=-1) for x in (p.hidden, p.weight)]
    adapter = hidden[1], weight[1]
    return (hidden[0], weight[0], p.target), {"bias": p.bias, "adapter": adapter}


def ours(function, p, rank, **how):
    args, named = parts(p, rank)
    return function(*args, **named, **how)


def wider(shape, rank):
    rows, width, *rest = shape
    return rows, width + rank, *rest


@pytest.mark.parametrize("budget", [1, 3000, None])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_values_statistics_and_gradients(options, budget, poison):
    for turn, shape in enumerate(SHAPES):
        rank = 1 + 2 * (turn % 2)
        p, how = drawn(wider(shape, rank), options)
        upstream = torch.randn(shape[0], dtype=torch.float64)
        loss, stats = ours(linear_nll, p, rank, return_stats=True, max_buffer_bytes=budget, **how)
        _, expected = nll(p, return_stats=True, **how)
        assert_close(loss, specified_nll(p, **how), 1e-12)
        assert_same_loss(p, (loss * upstream).sum(), (specified_nll(p, **how) * upstream).sum())
        assert_close(stats._asdict(), expected._asdict(), 1e-12)
        mean = ours(linear_cross_entropy, p, rank, max_buffer_bytes=budget, **how)
        assert_same_loss(p, mean, specified_nll(p, **how).sum() / p.labelled.sum().clamp_min(1))


# Each with the joined matrices on our own functions, which have tests of their own.
CALLS = {
    "smoothing, z-loss": (linear_cross_entropy, {"label_smoothing": 0.2, "z_loss": 0.1}),
    "class weights": (
        linear_cross_entropy,
        {"class_weight": torch.rand(70, dtype=torch.float64), "label_smoothing": 0.1},
    ),
    "class weights, capped": (
        linear_cross_entropy,
        {
            "class_weight": torch.rand(70, dtype=torch.float64),
            "label_smoothing": 0.1,
            "softcap": 4.0,
        },
    ),
    "token weights": (linear_cross_entropy, {"token_weight": torch.rand(3, 7), "num_items": 5}),
    "shift": (linear_cross_entropy, {"shift": True, "softcap": 3.0}),
    "bft": (balanced_linear_cross_entropy, {"window": 4}),
    "dft": (balanced_linear_cross_entropy, {"scheme": "dft", "normalize": "token"}),
    "a long document": (balanced_linear_cross_entropy, {"window": 2, "max_buffer_bytes": 2000}),
    "sampled": (linear_cross_entropy, {**SAMPLED, "softcap": 5.0, "seed": 3}),
    "sampled bft": (balanced_linear_cross_entropy, {**SAMPLED, "seed": 4}),
}


@pytest.mark.parametrize(
    "frozen", [(), ("weight",), ("hidden", "bias"), ("weight", "hidden"), ("weight", "bias")]
)
@pytest.mark.parametrize("call", CALLS)
def test_every_loss(call, frozen):
    function, how = CALLS[call]
    p = draw_problem(21, 9, 70, bias=True, frozen=frozen)
    p = replace(p, hidden=p.hidden.detach().view(3, 7, 9), target=p.target.view(3, 7))
    want = function(*p.args, bias=p.bias, **how)
    assert_same_loss(p, ours(function, p, 2, **how), want)


@pytest.mark.parametrize("call", CALLS)
def test_only_the_adapter_is_trained(call):
    """As in LoRA: the head is frozen, and so may be everything before it."""
    function, how = CALLS[call]
    p = draw_problem(21, 9, 70, bias=True)
    p = replace(p, hidden=p.hidden.detach().view(3, 7, 9), target=p.target.view(3, 7))
    want = p.gradients(function(*p.args, bias=p.bias, **how))
    for trained in ("ab", "a", "b"):
        (hidden, weight, target), named = parts(p, 2)
        adapter = {
            name: x.detach().requires_grad_(name in trained)
            for name, x in zip("ab", named.pop("adapter"), strict=True)
        }
        fixed = {"bias": named["bias"].detach(), "adapter": tuple(adapter.values())}
        function(hidden.detach(), weight.detach(), target, **fixed, **how).backward()
        expected = {"a": want["hidden"][..., 7:], "b": want["weight"][:, 7:]}
        for name, x in adapter.items():
            assert_close(x.grad, expected[name] if name in trained else None, 1e-11, name)


def test_statistics_with_gradients_and_top_k():
    p = draw_problem(21, 9, 70, bias=True)
    for how in ({"differentiable": ("lse", "entropy")}, {"differentiable": ("lse",), **SAMPLED}):
        how = how | {"top_k": 3, "softcap": 9.0, "seed": 3 if "eps" in how else None}

        def total(loss, stats, names=how["differentiable"]):
            return loss.sum() + sum(getattr(stats, name).square().sum() for name in names)

        loss, stats = ours(linear_nll, p, 3, **how)
        want, expected = nll(p, **how)
        assert_same_loss(p, total(loss, stats), total(want, expected))
        assert torch.equal(stats.top_ids, expected.top_ids)
        assert_close(stats.top_log_probs, expected.top_log_probs, 1e-12)


def test_the_certificate_of_hidden_is_that_of_weight():
    p = draw_problem(21, 9, 70)
    how = {**SAMPLED, "seed": 3, "hidden_variance": True, "return_stats": True}
    _, stats = ours(linear_nll, p, 2, **how)
    _, joined = nll(p, **how)
    _, alone = nll(p.copy(weight=torch.cat([p.weight[:, :7], 0 * p.weight[:, 7:]], 1)), **how)
    assert_close(stats.variance, joined.variance, 1e-12)
    assert bool((stats.hidden_variance <= joined.hidden_variance).all())
    assert not torch.allclose(stats.hidden_variance, joined.hidden_variance)
    assert not torch.allclose(stats.hidden_variance, alone.hidden_variance)  # other p


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("engine", ["torch", "cpu", "triton", "cuda"])
def test_every_backend(engine, dtype, request, monkeypatch):
    """Not less accurate than the joined matrices in the same backend, but for a quarter."""
    device = "cpu"
    if engine == "cuda":
        request.getfixturevalue("cuda_backend")
    if engine in ("cuda", "triton"):
        request.getfixturevalue("on_device")
        device = "cuda" if torch.cuda.is_available() else "cpu:7"
        monkeypatch.setattr(
            on_device, "takes_chunks", lambda *_: False
        )  # it takes them all the same
    p = draw_problem(19, 27, 150, bias=True, dtype=dtype)
    truth = p.copy(torch.float64)
    upstream = torch.linspace(0.5, 2, 19, dtype=torch.float64)
    losses = {
        "token": lambda nll: (nll * upstream.to(nll)).sum(),
        "mean": lambda nll: nll.sum() / p.labelled.sum(),
    }
    for name, reduce in losses.items():
        want = truth.gradients(reduce(specified_nll(truth)))
        found = []
        for rank in (0, 3):
            q = p.copy(device=device)
            args, named = parts(q, rank) if rank else (q.args, {"bias": q.bias})
            function = linear_nll if name == "token" else linear_cross_entropy
            loss = function(*args, **named, backend=engine)
            found.append(q.gradients(reduce(loss.cpu()) if name == "token" else loss))
        for leaf, expected in want.items():
            joined, own = [error_of(x[leaf].cpu(), expected) for x in found]
            assert own <= 1.25 * joined + torch.finfo(dtype).eps, (name, leaf, own, joined)


def test_an_adapter_of_another_type():
    """PEFT keeps adapters in float32 beside a bfloat16 model."""
    p = draw_problem(19, 27, 150, dtype=torch.bfloat16)
    (hidden, weight, target), named = parts(p, 3)
    a, b = [x.detach().float().requires_grad_() for x in named["adapter"]]
    linear_cross_entropy(hidden, weight, target, adapter=(a, b)).backward()
    want = p.gradients(cross_entropy(p))
    assert a.grad.dtype == b.grad.dtype == torch.float32
    for got, expected in ((a.grad, want["hidden"][:, 24:]), (b.grad, want["weight"][:, 24:])):
        assert error_of(got, expected.double()) < 0.01


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_a_wide_head_beside_narrow_hidden_states(backend):
    """Nothing is rounded to bfloat16 but what came so."""
    p = draw_problem(19, 27, 150, dtype=torch.float32)
    (hidden, weight, target), named = parts(p, 3)
    hidden = hidden.detach().bfloat16().requires_grad_()
    how = {"adapter": named["adapter"], "backend": backend}
    loss = linear_cross_entropy(hidden, weight, target, **how)
    joined = torch.cat([hidden.detach().double(), p.hidden.detach()[:, 24:].double()], 1)
    q = replace(p.copy(torch.float64), hidden=joined.requires_grad_())
    want = specified_nll(q).sum() / q.labelled.sum()
    assert_close(loss, want, 1e-6)
    expected = q.gradients(want)
    loss.backward()
    assert hidden.grad.dtype == torch.bfloat16
    assert error_of(hidden.grad, expected["hidden"][:, :24]) < 4e-3
    assert error_of(p.hidden.grad[:, 24:], expected["hidden"][:, 24:]) < 1e-5
    assert error_of(p.weight.grad, expected["weight"]) < 1e-5


def test_exported():
    class Loss(torch.nn.Module):
        def forward(self, hidden, weight, target, a, b):
            return linear_cross_entropy(hidden, weight, target, adapter=(a, b))

    p = draw_problem(19, 27, 150)
    args, named = parts(p, 3)
    args = tuple(x.detach() for x in (*args, *named["adapter"]))
    program = torch.export.export(Loss(), args)
    assert torch.equal(program.module()(*args), Loss()(*args))


def test_nothing_that_is_ignored_is_looked_at():
    p = draw_problem(19, 27, 150)
    with torch.no_grad():
        p.hidden[~p.labelled] = torch.nan
    gradients = p.gradients(ours(linear_cross_entropy, p, 3))
    assert torch.isfinite(gradients["weight"]).all()
    assert not gradients["hidden"][~p.labelled].any()


@pytest.mark.parametrize(
    "function",
    [linear_nll, linear_cross_entropy, partial(linear_nll, **SAMPLED)],
    ids=["token", "mean", "sampled"],
)
def test_no_tokens(function):
    p = draw_problem(0, 8, 11)
    gradients = p.gradients(ours(function, p, 3).sum())
    assert not gradients["weight"].any()
    assert gradients["hidden"].shape == (0, 8)


def test_autocast():
    p = draw_problem(19, 27, 150, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss, want = ours(linear_cross_entropy, p, 3), cross_entropy(p)
    assert loss.dtype == torch.float32
    assert_same_loss(p, loss, want, 1e-2)


def test_gradients_are_added_to_those_that_are_there():
    p = draw_problem(19, 27, 150)
    (hidden, weight, target), named = parts(p, 3)
    w, b = [x.detach().requires_grad_() for x in (weight, named["adapter"][1])]
    for gradient in ("exact", "sampled"):
        grads = []
        for _ in range(2):
            how = {"adapter": (named["adapter"][0], b), "gradient": gradient, "seed": 3}
            linear_nll(hidden, w, target, **how).sum().backward(retain_graph=True)
            grads.append((w.grad.clone(), b.grad.clone()))
        for one, two in zip(*grads, strict=True):
            assert_close(two, 2 * one, 1e-12)
        w.grad = b.grad = None


@pytest.mark.parametrize("module", [LinearCrossEntropyLoss(), BalancedLinearCrossEntropyLoss()])
def test_modules(module):
    p = draw_problem(19, 27, 150)
    assert_same_loss(p, ours(module, p, 3), module(*p.args))


@pytest.mark.parametrize("frozen", [(), ("weight",), ("hidden", "weight")])
@pytest.mark.parametrize("gradient", ["exact", "sampled"])
def test_opcheck(gradient, frozen):
    p = draw_problem(13, 8, 11, bias=True, frozen=frozen)
    args, named = parts(p, 3)
    settings = Settings(gradient=gradient, eps=0.05, max_buffer_bytes=4096, return_stats=True)
    call = make_problem(*args, named["bias"], 3, settings, adapter=named["adapter"])
    detached = {k: getattr(call, k).detach() for k in ("hidden", "weight", "bias", "adapter")}
    for k, x in detached.items():
        x.requires_grad_(k not in frozen)
    call = replace(call, **detached)
    arguments = *ops.tensors_of(call), *call.arguments("nll")
    torch.library.opcheck(ops.linear_nll_op, arguments)
    if gradient == "exact":
        scale, documents = torch.rand(13, dtype=torch.float64), torch.tensor([0, 5, 13])
        arguments = *ops.tensors_of(replace(call, seed=None)), *call.arguments("weighted")
        torch.library.opcheck(ops.weighted_loss_op, (scale, documents, None, *arguments))
    if call.saved != "unit":
        out = ops.linear_nll(call)
        saved = [getattr(out, name).detach() for name in Saved._fields]
        constant = replace(call, **{k: x.detach() for k, x in detached.items()})
        arguments = *ops.tensors_of(constant), *constant.arguments("nll")
        grad = torch.randn(13, dtype=torch.float64)
        torch.library.opcheck(ops.linear_nll_backward_op, (grad, *saved, *arguments))


def test_compiled():
    p = draw_problem(19, 27, 150)
    compiled = torch.compile(
        partial(ours, balanced_linear_cross_entropy, window=4), fullgraph=True, backend="aot_eager"
    )
    assert_same_loss(p, compiled(p, 3), balanced(p, window=4))


ROWS, WIDTH, VOCABULARY, RANK, BUDGET = 256, 96, 4000, 2, 2**18


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize(
    "function",
    [
        linear_nll,
        linear_cross_entropy,
        balanced_linear_cross_entropy,
        partial(linear_nll, **SAMPLED),
    ],
    ids=["recompute", "mean", "balanced", "sampled"],
)
def test_memory(function, backend):
    """No merged matrix, no gradient of a frozen one, no logits: what is made grows with r, N, E."""
    empty_cache()
    p = draw_problem(ROWS, WIDTH + RANK, VOCABULARY, dtype=torch.float32, scale=3.0)
    (hidden, weight, target), named = parts(p, RANK)
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().clone()
    a, b = [x.detach().requires_grad_() for x in named["adapter"]]

    def step():
        how = {"adapter": (a, b), "max_buffer_bytes": BUDGET, "backend": backend}
        function(hidden, weight, target, **how).sum().backward()

    peak = measure_allocations(step).peak
    low, rows = 4 * VOCABULARY * RANK, 4 * ROWS * (WIDTH + RANK)
    entries = 3 * 16 * ROWS * 2**5 if function.__class__ is partial else 0
    allowed = BUDGET + 6 * low + 6 * rows + 64 * ROWS + entries
    assert peak <= allowed < 4 * VOCABULARY * WIDTH, (peak, allowed)


WRONG = {
    "no pair": (lambda a, b: a, TypeError, "adapter: got Tensor, expected a pair"),
    "three": (lambda a, b: (a, b, b), TypeError, "adapter: got tuple, expected a pair"),
    "no tensor": (lambda a, b: (a, 3), TypeError, "adapter: b: "),
    "a's rows": (lambda a, b: (a[1:], b), ValueError, "adapter: a: "),
    "b's rows": (lambda a, b: (a, b[1:]), ValueError, "adapter: b: "),
    "ranks": (lambda a, b: (a[:, 1:], b), ValueError, "expected the same rank"),
    "no rank": (lambda a, b: (a[:, :0], b[:, :0]), ValueError, "at least 1"),
    "float64": (lambda a, b: (a.double(), b), TypeError, "adapter: a: got dtype torch.float64"),
    "integers": (lambda a, b: (a, b.long()), TypeError, "adapter: b: "),
    "device": (lambda a, b: (a.to("meta"), b), ValueError, "adapter: a: "),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_adapters_are_named(case):
    change, error, message = WRONG[case]
    p = draw_problem(7, 6, 11, dtype=torch.float32)
    (hidden, weight, target), named = parts(p, 2)
    with pytest.raises(error) as caught:
        linear_nll(hidden, weight, target, adapter=change(*named["adapter"]))
    assert message in str(caught.value)


def test_values_are_checked_where_that_is_asked_for():
    p = draw_problem(7, 6, 11, dtype=torch.float32)
    (hidden, weight, target), named = parts(p, 2)
    a, b = [x.detach().clone() for x in named["adapter"]]
    b[3, 1] = torch.nan
    with pytest.raises(ValueError, match="adapter: b"):
        linear_nll(hidden, weight, target, adapter=(a, b), check=True)
