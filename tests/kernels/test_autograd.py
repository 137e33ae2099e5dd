"""How gradients reach their tensors: accumulation in place, hooks, kept graphs, sharing."""

import gc

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bft_kernels import linear_nll, ops
from tests.support.allocations import measure_allocations
from tests.support.losses import balanced, cross_entropy, nll
from tests.support.problems import assert_close, draw_problem

LOSSES = {
    "nll": lambda p: (nll(p) ** 2).sum(),
    "sampled": lambda p: (nll(p, gradient="sampled", eps=2**-5, seed=7) ** 2).sum(),
    "entropy": lambda p: (nll(p, differentiable=("entropy",))[1].entropy ** 2).sum(),
    "lse, sampled": lambda p: nll(
        p, differentiable=("lse",), gradient="sampled", eps=2**-5, seed=7
    )[1].lse.sum(),
    "mean": cross_entropy,
    "balanced": lambda p: balanced(p, window=4),
}


@pytest.fixture(params=list(LOSSES))
def loss_of(request):
    return LOSSES[request.param]


@pytest.fixture
def p():
    return draw_problem(40, 8, 60, bias=True)


def fresh_gradients(p, loss_of):
    own = p.copy()
    loss_of(own).backward()
    return own.grads()


@pytest.fixture
def expected(p, loss_of):
    return fresh_gradients(p, loss_of)


def test_backward_adds_to_existing_gradients_in_place(p, loss_of, expected):
    before = {name: torch.randn_like(leaf) for name, leaf in p.leaves.items()}
    for name, leaf in p.leaves.items():
        leaf.grad = before[name].clone()
    tensors = p.grads()
    places = {name: grad.data_ptr() for name, grad in tensors.items()}
    loss_of(p).backward()
    for name, grad in p.grads().items():
        assert grad is tensors[name], name
        assert grad.data_ptr() == places[name], name
        assert_close(grad, before[name] + expected[name], 1e-12, name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gradient", ["exact", "sampled"])
def test_micro_batches_sum_up(gradient, dtype):
    how = {"gradient": gradient, "seed": 1, "eps": 2**-8}
    p = draw_problem(40, 8, 60, dtype=dtype)
    parts = []
    for rows in torch.arange(40).split(10):
        h, t = p.hidden.detach()[rows], p.target[rows]
        own = p.weight.detach().clone().requires_grad_()
        linear_nll(h, own, t, **how).sum().backward()
        linear_nll(h, p.weight, t, **how).sum().backward()
        parts.append(own.grad.double())
    # Each addition rounds once to the gradient's type, and partial sums may exceed the last one.
    assert_close(p.weight.grad, torch.stack(parts).sum(0), 16 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("gradient", ["exact", "sampled"])
def test_accumulation_makes_no_second_gradient(gradient):
    # V * D is larger than everything else here: N * D, the blocks and the entries together.
    p = draw_problem(6, 64, 500, dtype=torch.float32)
    how = {"gradient": gradient, "seed": 1, "eps": 2**-4, "max_buffer_bytes": 40_000}
    counts = []
    for _ in range(2):
        sizes = measure_allocations(lambda: nll(p, **how).sum().backward()).sizes
        counts.append(sum(size >= p.weight.nbytes for size in sizes))
    assert counts == [1, 0]  # the gradient itself, once


def test_autograd_grad_leaves_existing_gradients_alone(p, loss_of, expected):
    for leaf in p.leaves.values():
        leaf.grad = torch.full_like(leaf, 3.0)
    for names in ("weight", "hidden", "bias", "hidden weight", "hidden weight bias"):
        wanted = names.split()
        got = torch.autograd.grad(loss_of(p), [p.leaves[name] for name in wanted])
        for name, grad in zip(wanted, got, strict=True):
            assert_close(grad, expected[name], 1e-12, name)
    for name, grad in p.grads().items():
        assert bool((grad == 3).all()), name


@pytest.mark.parametrize("inputs", [("hidden",), ("weight",), ("weight", "bias")], ids=str)
def test_backward_with_inputs_touches_only_those(inputs, p, loss_of, expected):
    for leaf in p.leaves.values():
        leaf.grad = torch.ones_like(leaf)
    loss_of(p).backward(inputs=[p.leaves[name] for name in inputs])
    for name, grad in p.grads().items():
        assert_close(grad, torch.ones_like(grad) + expected[name] * (name in inputs), 1e-12, name)


def step_inside_the_backward(p, see):
    """As an optimizer that drops the gradient."""

    def step(weight):
        see(weight.grad)
        weight.grad = None

    p.weight.register_post_accumulate_grad_hook(step)


def once_ready(p, see):
    """As data-parallel wrappers, which hook the node to know that a gradient is ready."""
    node = torch.autograd.graph.get_gradient_edge(p.weight).node
    node.register_hook(lambda *_: see(p.weight.grad))


HOOKS = {  # and whether they see what was there, too
    "tensor": (lambda p, see: p.weight.register_hook(see), False),
    "several tensors": (
        lambda p, see: torch.autograd.graph.register_multi_grad_hook(
            [p.hidden, p.weight], lambda grads: see(grads[1])
        ),
        False,
    ),
    "after accumulation": (step_inside_the_backward, True),
    "node": (once_ready, True),
}


@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_see_the_gradient_once(hook, p, loss_of, expected, monkeypatch):
    p.weight.grad = torch.ones_like(p.weight)
    backward, places = ops.linear_nll_backward, []  # what a gradient is added to, in place
    monkeypatch.setattr(
        ops, "linear_nll_backward", lambda *given: (places.extend(given[3:]), backward(*given))[1]
    )
    seen, loss = [], loss_of(p)
    register, accumulated = HOOKS[hook]
    register(p, lambda grad: seen.append(grad.clone()))
    loss.backward()
    assert len(seen) == 1
    assert hook == "node" or not places, "a hook on the tensor wants the gradient itself"
    assert_close(seen[0], accumulated + expected["weight"], 1e-12)
    if hook == "after accumulation":
        assert p.weight.grad is None
    else:
        assert_close(p.weight.grad, 1 + expected["weight"], 1e-12)


def test_hooks_may_replace_the_gradient(p, loss_of, expected):
    p.weight.grad = torch.ones_like(p.weight)
    p.weight.register_hook(lambda grad: 10 * grad)
    loss_of(p).backward()
    assert_close(p.weight.grad, 1 + 10 * expected["weight"], 1e-11)


def test_a_weight_that_is_no_leaf(p, loss_of, expected):
    # A scaled head: the gradient goes on to what it was made from.
    base = (p.weight.detach() / 2).requires_grad_()
    base.grad = torch.ones_like(base)
    q = p.copy()
    q.weight = base * 2
    loss_of(q).backward()
    assert_close(base.grad, 1 + 2 * expected["weight"], 1e-12)


@pytest.mark.parametrize("existing", [False, True])
def test_tied_weights(existing, p, loss_of):
    # Embedding and head are one parameter, and both uses add to its gradient.
    tokens = torch.randint(60, (40,))
    inner, head, tied = (p.weight.detach().clone().requires_grad_() for _ in range(3))
    tied.grad = torch.ones_like(tied) if existing else None
    for embedding, weight in ((inner, head), (tied, tied)):
        q = p.copy()
        q.weight, q.hidden = weight, torch.nn.functional.embedding(tokens, embedding).tanh()
        loss_of(q).backward()
    assert_close(tied.grad, existing + head.grad + inner.grad, 1e-11)


@pytest.mark.parametrize("existing", [False, True])
def test_two_losses_share_a_head(existing, p):
    losses = [LOSSES[name] for name in ("nll", "mean", "balanced")]
    expected = sum(fresh_gradients(p, loss)["weight"] for loss in losses)
    p.weight.grad = torch.zeros_like(p.weight) if existing else None
    sum(loss(p) for loss in losses).backward()
    assert_close(p.weight.grad, expected, 1e-11)


@pytest.mark.parametrize("existing", [False, True])
def test_a_kept_graph_gives_the_gradient_again(existing, p, loss_of, expected):
    for leaf in p.leaves.values():
        leaf.grad = torch.zeros_like(leaf) if existing else None
    loss = loss_of(p)
    loss.backward(retain_graph=True)
    (3 * loss).backward(retain_graph=True)
    loss.backward()
    for name, grad in p.grads().items():
        assert_close(grad, 5 * expected[name], 1e-11, name)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_retained_gradients_are_not_shared(p, loss_of):
    # What a kept graph handed out must not change when it is asked again.
    loss = loss_of(p)
    first = p.gradients(loss, True)
    copies = {name: grad.clone() for name, grad in first.items()}
    p.gradients(5 * loss, True)
    p.gradients(7 * loss)
    torch.testing.assert_close(first, copies, rtol=0, atol=0)


def test_scaled_upstream(p, loss_of, expected):
    for factor in (0.0, -2.5):
        got = p.gradients(factor * loss_of(p))
        assert_close(got, {name: factor * grad for name, grad in expected.items()}, 1e-12)


def saved_bytes(run):
    """Bytes of the tensors that autograd keeps, inputs left out."""
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = run()
    return kept, out


def test_no_grad_keeps_nothing(p, loss_of):
    with torch.no_grad():
        kept, loss = saved_bytes(lambda: loss_of(p))
    assert not kept
    assert loss.grad_fn is None


@pytest.mark.parametrize("frozen", [(), ("weight", "bias")], ids=["recompute", "unit"])
def test_little_is_kept(frozen):
    # 400 rows of 2000 logits in float64 would be 6.4 MB.
    p = draw_problem(400, 8, 2000, frozen=frozen)
    kept, _ = saved_bytes(lambda: linear_nll(*p.args))
    for x in (p.hidden, p.weight, p.target):
        kept.pop(x.untyped_storage().data_ptr(), None)
    rows = 400 * 8
    assert sum(kept.values()) <= (rows * 8 if frozen else rows * 3) + 100


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("loss_of", [nll, cross_entropy, balanced])
def test_a_frozen_head_does_no_work_on_it(loss_of, dtype, monkeypatch):
    depths = []  # how many terms the elements of a product have: tokens, if it is a gradient of W

    def watched(function, operand):
        def call(*args, **how):
            depths.append(args[operand].shape[1])
            return function(*args, **how)

        return call

    monkeypatch.setattr(torch, "mm", watched(torch.mm, 0))
    monkeypatch.setattr(torch, "addmm", watched(torch.addmm, 1))
    monkeypatch.setattr(Tensor, "addmm_", watched(Tensor.addmm_, 1))
    for frozen in ((), ("weight", "bias")):
        depths.clear()
        p = draw_problem(20, 8, 50, bias=True, dtype=dtype, ignored=0.0, frozen=frozen)
        loss_of(p).sum().backward()
        assert depths
        assert (20 in depths) == (not frozen), depths
    assert p.weight.grad is None


def test_nothing_is_left_behind(p):
    # No reference cycle holds the tensors of a finished step.
    gc.collect()
    gc.disable()
    try:
        before = sum(issubclass(type(x), Tensor) for x in gc.get_objects())
        for run in LOSSES.values():
            for _ in range(3):
                run(p.copy()).backward()
        after = sum(issubclass(type(x), Tensor) for x in gc.get_objects())
    finally:
        gc.enable()
    assert after <= before


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed(reentrant, existing, p, loss_of, expected):
    def body(hidden, weight, bias):
        q = p.copy()
        q.hidden, q.weight, q.bias = hidden, weight, bias
        return loss_of(q)

    if existing:
        p.weight.grad = torch.ones_like(p.weight)
    loss = checkpoint(body, p.hidden, p.weight, p.bias, use_reentrant=reentrant)
    loss.backward()
    if existing:
        expected["weight"] = expected["weight"] + 1
    assert_close(p.grads(), expected, 1e-12)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_with_a_seed_from_the_generator(reentrant, p):
    # The recomputation restores the generator, so that it draws the same sample.
    def body(hidden, weight):
        return linear_nll(hidden, weight, p.target, gradient="sampled", eps=2**-4).sum()

    torch.manual_seed(11)
    plain = torch.autograd.grad(body(p.hidden, p.weight), [p.hidden, p.weight])
    torch.manual_seed(11)
    checkpoint(body, p.hidden, p.weight, use_reentrant=reentrant).backward()
    assert torch.equal(p.hidden.grad, plain[0])
    assert torch.equal(p.weight.grad, plain[1])


def test_saved_tensors_may_be_packed(p, loss_of, expected):
    # Offloading gives the backward other tensors than the forward had.
    p.weight.grad = torch.ones_like(p.weight)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.numpy(force=True), torch.tensor):
        loss = loss_of(p)
    loss.backward()
    assert_close(p.weight.grad, 1 + expected["weight"], 1e-12)
    assert_close(p.hidden.grad, expected["hidden"], 1e-12)
