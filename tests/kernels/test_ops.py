"""The custom ops: schemas, fakes and autograd registrations; torch.compile; autocast."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from bft_kernels import (
    BalancedLinearCrossEntropyLoss,
    LinearCrossEntropyLoss,
    balanced_linear_cross_entropy,
    linear_cross_entropy,
    linear_nll,
    ops,
)
from bft_kernels.results import Saved, Wanted
from bft_kernels.settings import Settings, options_of
from tests.support.losses import assert_same_loss
from tests.support.problems import OLD_COMPILER, call_of, draw_problem, op_arguments
from tests.support.runs import run_python

OPTIONS = {"eps": 0.05, "max_buffer_bytes": 4096, "return_stats": True}
TRAINED = (True, True, True)
CASES = {  # options, gradients
    "none": ({"return_stats": False}, (False, False, False)),
    "recompute": ({}, TRAINED),
    "transformed": (
        {"softcap": 4.0, "temperature": 0.8, "z_loss": 0.1, "label_smoothing": 0.1},
        TRAINED,
    ),
    "statistics": ({"differentiable": ("lse", "entropy")}, TRAINED),
    "top k": ({"top_k": 3}, TRAINED),
    "unit": ({}, (True, False, False)),
    "entries": ({"gradient": "sampled", "hidden_variance": True}, TRAINED),
}


def drawn_call(name, rows, bias, dtype=torch.float64):
    options, (hidden, weight, offset) = CASES[name]
    p = draw_problem(rows, 5, 11, bias=bias, dtype=dtype)
    wanted = {"hidden": hidden, "weight": weight, "bias": offset and bias}
    p = p.copy(frozen=tuple(leaf for leaf, want in wanted.items() if not want))
    seed = 3 if name == "entries" else None
    return call_of(p, seed, tuple(wanted.values()), **(OPTIONS | options))


@pytest.mark.parametrize(
    ("bias", "dtype"), [(False, torch.float64), (True, torch.float64), (True, torch.bfloat16)]
)
@pytest.mark.parametrize("rows", [0, 13])
@pytest.mark.parametrize("name", CASES)
def test_opcheck_linear_nll(name, rows, bias, dtype):
    call = drawn_call(name, rows, bias, dtype)
    op = ops.linear_nll_top_k_op if call.settings.top_k else ops.linear_nll_op
    torch.library.opcheck(op, op_arguments(call))


@pytest.mark.parametrize("name", ["recompute", "transformed", "entries"])
def test_opcheck_backward(name):
    call = drawn_call(name, 13, True)
    call = replace(call, **{k: getattr(call, k).detach() for k in ("hidden", "weight", "bias")})
    out = ops.linear_nll(call)
    saved = Saved(*(getattr(out, field) for field in Saved._fields))
    grad = torch.randn_like(out.loss)
    for wanted in (Wanted(*TRAINED), Wanted(True, False, False), Wanted(False, True, False)):
        arguments = (grad, *saved, *op_arguments(replace(call, wanted=wanted)))
        torch.library.opcheck(ops.linear_nll_backward_op, arguments)


@pytest.mark.parametrize("rows", [0, 13])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_opcheck_spread_loss(rows, dtype):
    call = drawn_call("transformed", rows, True, dtype)
    w, lse = torch.rand(2, max(rows, 11), dtype=call.acc_dtype).unbind()
    w, lse = w[:11], lse[:rows].requires_grad_()
    torch.library.opcheck(ops.spread_loss_op, (w, lse, *op_arguments(call)))
    frozen = replace(call, wanted=Wanted(True, False, False))
    for each in (call, frozen):
        tensors = [x.detach() if torch.is_tensor(x) else x for x in op_arguments(each)]
        torch.library.opcheck(ops.spread_loss_backward_op, (lse.detach(), w, *tensors))


@pytest.mark.parametrize("scheme", ["sft", "bft"])
@pytest.mark.parametrize("rows", [0, 13])
def test_opcheck_weighted_loss(rows, scheme):
    p = draw_problem(rows, 5, 11, bias=True)
    scale = torch.rand(rows, dtype=torch.float64)
    documents = torch.tensor([0, rows // 3, rows // 3, rows])
    call = call_of(p, scheme=scheme, window=4, **OPTIONS)
    torch.library.opcheck(
        ops.weighted_loss_op, (scale, documents, None, *op_arguments(call, "weighted"))
    )


@pytest.mark.parametrize("scheme", ["sft", "bft", "bft-v1-code"])
@pytest.mark.parametrize("rows", [0, 13])
def test_opcheck_balanced_loss(rows, scheme):
    loss = torch.rand(rows, dtype=torch.float64, requires_grad=True)
    labelled, documents = torch.rand(rows) < 0.7, torch.tensor([0, rows // 3, rows // 3, rows])
    for items in (None, torch.tensor(3)):
        taken = options_of["balanced"](Settings(scheme=scheme, window=4))
        torch.library.opcheck(ops.balanced_loss_op, (loss, labelled, documents, items, *taken))


SAMPLED = {"gradient": "sampled", "eps": 0.05, "seed": 7}


def per_token(hidden, weight, target, **how):
    nll, stats = linear_nll(hidden, weight, target, return_stats=True, **how)
    statistic = stats.entropy if stats.variance is None else stats.variance
    return (nll.sin() * stats.confidence).sum() + statistic.sum()


def with_statistics(hidden, weight, target):
    how = {"differentiable": ("lse", "entropy"), "softcap": 9.0, "top_k": 2}
    nll, stats = linear_nll(hidden, weight, target, **how)
    top = stats.top_log_probs.sum() + stats.top_ids.sum()
    return (nll + stats.lse.square() - 0.1 * stats.entropy).sum() + top


def sampled_lse(hidden, weight, target):
    _, stats = linear_nll(hidden, weight, target, differentiable=("lse",), softcap=9.0, **SAMPLED)
    return stats.lse.square().sum()


def class_weighted(hidden, weight, target, softcap=None):
    w = torch.linspace(0.5, 2, weight.shape[0], dtype=weight.dtype)
    how = {"label_smoothing": 0.1, "z_loss": 0.01, "return_z_loss": True, "out_dtype": weight.dtype}
    how |= {"class_weight": w, "softcap": softcap}
    return linear_cross_entropy(hidden, weight, target, **how)[0]


def balanced(hidden, weight, target):
    loss, stats = balanced_linear_cross_entropy(hidden, weight, target, window=4, return_stats=True)
    return loss + stats.sequence_weight.sum()


def balanced_callable(hidden, weight, target):
    def scheme(confidence, cu_seqlens):
        return confidence.sqrt(), cu_seqlens.diff().to(confidence.dtype)

    return balanced_linear_cross_entropy(hidden, weight, target, scheme=scheme)


COMPILED = {
    "mean": partial(linear_cross_entropy, label_smoothing=0.1, z_loss=0.01),
    "mean, class weights": class_weighted,
    "mean, class weights, softcap": partial(class_weighted, softcap=9.0),
    "per token": partial(per_token, softcap=9.0),
    "per token, with statistics": with_statistics,
    "lse, sampled": sampled_lse,
    "per token, sampled": partial(per_token, **SAMPLED),
    "balanced": balanced,
    "balanced, sampled": partial(balanced_linear_cross_entropy, window=4, **SAMPLED),
    "balanced, callable": balanced_callable,
}


@pytest.mark.parametrize(
    "compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_equals_eager(name, compiler, fresh_compiler):
    """One graph, the same numbers, also when the number of tokens changes."""
    if OLD_COMPILER and name == "balanced, callable":
        pytest.skip("torch 2.8's compiler fails")
    function = COMPILED[name]
    compiled = torch.compile(function, fullgraph=True, backend=compiler)
    for rows in (12, 20, 16):
        p = draw_problem(rows, 5, 31)
        shape = (2, rows // 2)
        arguments = p.hidden.view(*shape, 5), p.weight, p.target.view(shape)
        assert_same_loss(p, compiled(*arguments), function(*arguments))


@pytest.mark.parametrize("gradient", ["exact", "sampled"])
def test_autocast_rounds_as_eager_does(gradient):
    """Operands are rounded to bfloat16, sums are not; gradients have their parameter's type."""
    p = draw_problem(40, 64, 200, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        nll = linear_nll(*p.args, gradient=gradient, eps=2**-20, seed=1)
    rounded = p.hidden.bfloat16().float() @ p.weight.bfloat16().float().T
    expected = torch.nn.functional.cross_entropy(
        rounded, p.target, reduction="none", ignore_index=-100
    )
    assert nll.dtype == torch.float32
    torch.testing.assert_close(nll, expected, rtol=1e-5, atol=1e-5)
    exact = p.gradients(expected.sum())
    for name, got in p.gradients(nll.sum()).items():
        assert got.dtype == torch.float32
        # eager rounds dz to bfloat16 on the way back through autocast's casts; ours does not
        assert (got - exact[name]).norm() <= 0.01 * exact[name].norm()


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    ("bounds", "message"),
    [([0, 5, 3, 8], "falls from 5 to 3"), ([2, 8], "starts at 2"), ([0, 3], "ends at 3")],
)
def test_compiled_code_refuses_wrong_boundaries(bounds, message, frozen, fresh_compiler):
    def loss(hidden, weight, target, cu_seqlens):
        return balanced_linear_cross_entropy(hidden, weight, target, cu_seqlens=cu_seqlens)

    p = draw_problem(8, 4, 9, ignored=0.0, frozen=("weight",) if frozen else ())
    compiled = torch.compile(loss, fullgraph=True)
    good = torch.tensor([0, 5, 8] if len(bounds) == 3 else [0, *bounds[2:], 8])
    compiled(*p.args, good)
    with pytest.raises(Exception, match=message):
        compiled(*p.args, torch.tensor(bounds))


@pytest.mark.parametrize("frozen", [(), ("weight",)], ids=len)
def test_compiled_code_checks_the_number_of_items(frozen, fresh_compiler):
    def loss(hidden, weight, target, items):
        return balanced_linear_cross_entropy(hidden, weight, target, num_items=items)

    p = draw_problem(8, 4, 9, ignored=0.0, frozen=frozen)
    nothing = torch.full_like(p.target, -100)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*p.args, torch.tensor(3)), loss(*p.args, torch.tensor(3)))
    assert compiled(p.hidden, p.weight, nothing, torch.tensor(0)).item() == 0
    with pytest.raises(Exception, match="num_items: got 0 with 8 labelled"):
        compiled(*p.args, torch.tensor(0))
    with pytest.raises(Exception, match=r"num_items: got -1\.0, .*at least 0"):
        compiled(*p.args, torch.tensor(-1))


@pytest.mark.parametrize("items", [torch.tensor(3), torch.tensor(2.5)], ids=str)
def test_opcheck_num_items(items):
    torch.library.opcheck(ops.num_items, (items, torch.tensor([True, False]), False))


@pytest.mark.parametrize("gradient", ["exact", "sampled"])
@pytest.mark.parametrize("kind", [LinearCrossEntropyLoss, BalancedLinearCrossEntropyLoss])
def test_a_loss_is_exported_saved_and_loaded(kind, gradient, tmp_path):
    p, path = draw_problem(13, 5, 11), tmp_path / "loss.pt2"
    loss, options = kind(gradient=gradient, eps=0.05), {"seed": torch.tensor(3)}
    torch.export.save(torch.export.export(loss, p.args, options), path)
    got, want = p.copy(), p.copy()
    value = torch.export.load(path).module()(*got.args, **options)
    expected = loss(*want.args, **options)
    assert torch.equal(value, expected)
    gradients = want.gradients(expected)
    for name, gradient in got.gradients(value).items():
        assert torch.equal(gradient, gradients[name])


def test_a_process_that_imports_the_package_loads_a_program(tmp_path):
    p = draw_problem(13, 5, 11)
    program = torch.export.export(LinearCrossEntropyLoss(), p.args)
    torch.export.save(program, tmp_path / "loss.pt2")
    code = f"import torch, bft_kernels; torch.export.load({str(tmp_path / 'loss.pt2')!r})"
    assert run_python("-c", code).returncode == 0


def test_submodules_are_attributes_of_the_package():
    code = "import bft_kernels, sys; assert 'torch' not in sys.modules\n"
    code += "bft_kernels.weighting.shift_labels, bft_kernels.reference, bft_kernels.info()\n"
    code += "assert not hasattr(bft_kernels, 'nothing')"
    assert run_python("-c", code).returncode == 0
