"""Derivatives beyond backward(): each is right, or refused; none is silently 0."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from bft_kernels import (
    balanced_linear_cross_entropy,
    linear_cross_entropy,
    linear_nll,
    token_weights,
)
from bft_kernels.settings import SCHEMES
from tests.support.problems import assert_close, draw_problem

SAMPLED = {"gradient": "sampled", "eps": 2**-5, "seed": 7}
LOSSES = {
    "nll": lambda *args, **how: linear_nll(*args, **how).sum(),
    "none": lambda *args, **how: linear_cross_entropy(*args, reduction="none", **how).sum(),
    "mean": linear_cross_entropy,
    "balanced": lambda *args, **how: balanced_linear_cross_entropy(*args, window=4, **how),
    "callable": lambda *args, **how: balanced_linear_cross_entropy(
        *args, scheme=lambda c, cu: (c, torch.ones_like(cu[1:])), **how
    ),
}
# Of a function of one tensor, which is called on a batch of it by some.
TRANSFORMS = {
    "grad": lambda f, x: grad(f)(x),
    "vjp": lambda f, x: vjp(f, x)[1](x.new_ones(())),
    "jvp": lambda f, x: jvp(f, (x,), (x,)),
    "jacrev": lambda f, x: jacrev(f)(x),
    "jacfwd": lambda f, x: jacfwd(f)(x),
    "hessian": lambda f, x: hessian(f)(x),
    "vmap": lambda f, x: vmap(f)(torch.stack([x, 2 * x])),
    "vmap of grad": lambda f, x: vmap(grad(f))(torch.stack([x, 2 * x])),
    "grad of vmap": lambda f, x: grad(lambda x: vmap(f)(torch.stack([x, x])).sum())(x),
    "jvp of grad": lambda f, x: jvp(grad(f), (x,), (x,)),
}


@pytest.fixture(params=["cpu", "torch"])
def backend(request):
    return request.param


@pytest.fixture(params=[{}, SAMPLED], ids=["exact", "sampled"])
def how(request, backend):
    return {"backend": backend, **request.param}


@pytest.fixture(params=[(), ("weight", "bias")], ids=["trained", "frozen"])
def p(request):
    return draw_problem(9, 5, 31, bias=True, dtype=torch.float32, frozen=request.param)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", LOSSES)
def test_transforms_are_refused(name, transform, how, p):
    def loss(hidden):
        return LOSSES[name](hidden, p.weight, p.target, bias=p.bias, **how)

    with pytest.raises(RuntimeError, match=r"^torch\.func: got a call inside a transform"):
        TRANSFORMS[transform](loss, p.hidden.detach())


def test_a_transform_of_another_argument_is_refused(p):
    # Neither hidden nor weight is a tensor of the transform.
    def loss(target):
        return linear_cross_entropy(p.hidden, p.weight, target)

    with pytest.raises(RuntimeError, match=r"^torch\.func: "):
        vmap(loss)(torch.stack([p.target, p.target]))


@pytest.mark.parametrize("argument", ["hidden", "weight", "bias"])
@pytest.mark.parametrize("name", LOSSES)
def test_forward_mode_is_refused(name, argument, how, p):
    inputs = {"hidden": p.hidden, "weight": p.weight, "bias": p.bias}
    with forward_ad.dual_level():
        # Without one, a dual level changes nothing.
        plain = LOSSES[name](*p.args, bias=p.bias, **how)
        inputs[argument] = forward_ad.make_dual(inputs[argument], torch.ones_like(inputs[argument]))
        with pytest.raises(RuntimeError, match=rf"^{argument}: got a tensor with a tangent"):
            LOSSES[name](inputs["hidden"], inputs["weight"], p.target, bias=inputs["bias"], **how)
    assert torch.equal(plain, LOSSES[name](*p.args, bias=p.bias, **how))


def test_a_token_weight_with_a_tangent_is_refused(p):
    with forward_ad.dual_level():
        weight = forward_ad.make_dual(torch.ones(9), torch.ones(9))
        with pytest.raises(RuntimeError, match=r"^token_weight: got a tensor with a tangent"):
            linear_cross_entropy(*p.args, token_weight=weight)


@pytest.mark.parametrize("scheme", [*SCHEMES, lambda c, cu: (c, 1 - cu[1:] * c.sum())])
def test_weights_are_constants_to_forward_mode_too(scheme):
    confidence = torch.rand(6)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(confidence, torch.ones(6))
        weights = token_weights(dual, torch.tensor([0, 2, 6]), scheme=scheme, window=2)
        assert all(forward_ad.unpack_dual(x).tangent is None for x in weights)


def test_a_jacobian_by_forward_mode_is_refused(how, p):
    def loss(hidden):
        return linear_cross_entropy(hidden, p.weight, p.target, **how)

    with pytest.raises(RuntimeError, match=r"^hidden: got a tensor with a tangent"):
        torch.autograd.functional.jacobian(
            loss, p.hidden.detach(), vectorize=True, strategy="forward-mode"
        )


def dual(function, x):
    with forward_ad.dual_level():
        return function(forward_ad.make_dual(x, x))


@pytest.mark.parametrize("mode", ["vmap", "jvp", "dual"])
def test_compiled_code_refuses_them_too(mode, p, fresh_compiler):
    def loss(hidden):
        return linear_cross_entropy(hidden, p.weight.detach(), p.target)

    def transformed(x):
        return TRANSFORMS[mode](loss, x)

    x = p.hidden.detach()
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), loss(x))
    if mode == "dual":
        with pytest.raises(Exception, match="or compiled code at a dual level"):
            dual(compiled, x)
    else:
        with pytest.raises(Exception, match=r"torch\.func: got a call inside a transform"):
            torch.compile(transformed, fullgraph=True, backend="eager")(x)
    assert torch.equal(compiled(x), loss(x))


@pytest.mark.parametrize("name", LOSSES)
def test_a_batch_of_upstream_gradients_is_supported(name, how, p):
    loss = LOSSES[name](*p.args, bias=p.bias, **how)
    leaves = list(p.leaves.values())
    one = torch.autograd.grad(loss, leaves, retain_graph=True)
    factors = torch.tensor([1.0, -2.0, 0.5])
    many = torch.autograd.grad(loss, leaves, factors, is_grads_batched=True)
    for got, want in zip(many, one, strict=True):
        assert_close(got, factors.view(-1, *[1] * want.dim()) * want, 1e-5)


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph")
@pytest.mark.parametrize("name", LOSSES)
def test_second_derivatives_are_refused(name, how, p):
    def loss(hidden):
        return LOSSES[name](hidden, p.weight, p.target, bias=p.bias, **how)

    x = p.hidden.detach()
    for second in (torch.autograd.functional.hvp, torch.autograd.functional.jvp):
        with pytest.raises(RuntimeError, match="create_graph: got True"):
            second(loss, x, x)
    with pytest.raises(RuntimeError, match="create_graph: got True"):
        torch.autograd.functional.hessian(loss, x)
    with pytest.raises(RuntimeError, match=r"create_graph: got True, expected False.*second"):
        loss(p.hidden).backward(create_graph=True)
