"""Inputs of the ops, and how results are compared."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bft_kernels import linear_nll
from bft_kernels.ops import tensors_of
from bft_kernels.problem import Problem as Call
from bft_kernels.results import Wanted
from bft_kernels.settings import Settings

# Older than the torch that all is tested with: its compiler can do less.
OLD_COMPILER = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TRANSFORMS = {
    "plain": {},
    "softcap": {"softcap": 5.0, "temperature": 1.3},
    "bias": {"bias": True, "temperature": 0.7},
}
FROZEN = [
    *((), ("weight",), ("hidden",), ("bias",)),
    *(("weight", "bias"), ("hidden", "bias"), ("hidden", "weight")),
]


def boundaries(lengths, dtype=torch.int64):
    """``cu_seqlens`` of documents of these lengths."""
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


@dataclass
class Problem:
    """Inputs of the core op. Tensors are leaves that require gradients unless frozen."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    target: Tensor  # [N]
    bias: Tensor | None = None  # [V]
    frozen: tuple[str, ...] = ()

    def __post_init__(self):
        for name in ("hidden", "weight", "bias"):
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, tensor.detach().requires_grad_(name not in self.frozen))

    @property
    def args(self):
        return self.hidden, self.weight, self.target

    @property
    def leaves(self):
        """The tensors that require a gradient."""
        found = {"hidden": self.hidden, "weight": self.weight, "bias": self.bias}
        return {k: v for k, v in found.items() if v is not None and v.requires_grad}

    def copy(self, dtype=None, *, device=None, **changes):
        """Leaves of its own with the same values, without gradients."""

        def clone(x):
            return None if x is None else x.detach().clone().to(device, dtype or x.dtype)

        own = {"hidden": clone(self.hidden), "weight": clone(self.weight), "bias": clone(self.bias)}
        own["target"] = self.target.to(device)
        return replace(self, **{**own, **changes})

    @property
    def labelled(self):
        return self.target != -100

    @property
    def positions(self):
        """Of the labelled rows."""
        return self.labelled.nonzero().squeeze(1)

    def of_labelled(self, dtype=torch.float64):
        """The labelled rows in a type, as constants."""
        wide = self.copy(dtype, frozen=("hidden", "weight", "bias"))
        return replace(wide, hidden=wide.hidden[self.labelled], target=wide.target[self.labelled])

    def grads(self):
        return {name: leaf.grad for name, leaf in self.leaves.items()}

    def gradients(self, loss, retain=False):
        """Of the leaves; zeros where the loss does not reach them, as in a batch without labels."""
        leaves = self.leaves
        if not loss.requires_grad:
            return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
        found = torch.autograd.grad(loss, list(leaves.values()), retain_graph=retain)
        return dict(zip(leaves, found, strict=True))


def cancellation(p, loss_of):
    """How far rounding grows in each gradient's sums: ``|terms| / |sum|``, in float64.

    The logits stand in for ``hidden`` and the unit matrix for ``weight``, which gives ``dz``.
    """
    wide = p.copy(torch.float64, frozen=("weight", "bias"))
    hidden, weight = wide.hidden.detach(), wide.weight
    unit = torch.eye(weight.shape[0], dtype=torch.float64)
    own = replace(wide, hidden=hidden @ weight.T, weight=unit)
    dz = own.gradients(loss_of(own))["hidden"]
    terms = {
        "hidden": (dz @ weight, dz.abs() @ weight.abs()),
        "weight": (dz.T @ hidden, dz.T.abs() @ hidden.abs()),
        "bias": (dz.sum(0), dz.abs().sum(0)),
    }
    return {k: float(size.norm() / total.norm()) for k, (total, size) in terms.items()}


def draw_problem(
    rows,
    width,
    vocabulary,
    *,
    ignored=0.3,
    bias=False,
    dtype=torch.float64,
    scale=1.0,
    frozen=(),
    ignore_index=-100,
):
    """Logits of standard deviation ``scale``; a token is ignored with probability ``ignored``."""
    hidden = torch.randn(rows, width, dtype=torch.float64) * scale
    weight = torch.randn(vocabulary, width, dtype=torch.float64) / math.sqrt(width)
    target = torch.randint(vocabulary, (rows,))
    target[torch.rand(rows) < ignored] = ignore_index
    offset = torch.randn(vocabulary, dtype=torch.float64) if bias else None
    offset = None if offset is None else offset.to(dtype)
    return Problem(hidden.to(dtype), weight.to(dtype), target, offset, frozen)


def weighted_gradients(p, *, device="cpu", **how):
    """Gradients of a problem's losses, each with a weight of its own."""
    copy = p.copy(device=device)
    upstream = torch.linspace(0.5, 2, p.target.numel(), device=device)
    (linear_nll(*copy.args, bias=copy.bias, **how) * upstream).sum().backward()
    return {name: grad.cpu() for name, grad in copy.grads().items() if grad is not None}


def error_of(got, expected):
    """``|got - expected| / |expected|`` in the Euclidean norm, in float64.

    The smallest subnormal of ``got``'s type is allowed in every element: below the normal numbers
    (6e-5 in float16) a type rounds to multiples of it, however small the value.
    """
    assert got.shape == expected.shape, f"shape {tuple(got.shape)}, not {tuple(expected.shape)}"
    kind = torch.finfo(got.dtype)
    floor = kind.smallest_normal * kind.eps * math.sqrt(got.numel())
    got, expected = got.detach().double(), expected.detach().double()
    beyond = ((got - expected).norm() - floor).clamp_min(0)
    return float(beyond / expected.norm().clamp_min(1e-300))


def assert_close(got, expected, tolerance=1e-11, what=""):
    """Asserts that ``got`` equals ``expected`` to ``tolerance`` of its largest entry (or of 1)."""
    if isinstance(expected, dict):
        assert got.keys() == expected.keys()
        for name in expected:
            assert_close(got[name], expected[name], tolerance, f"{what} {name}")
        return
    if expected is None or got is None:
        assert got is expected, f"{what}: got {got}, expected {expected}"
        return
    assert got.shape == expected.shape, f"{what}: {got.shape}, not {expected.shape}"
    if got.dtype == torch.bool:
        assert torch.equal(got, expected), what
        return
    got, expected = got.detach().double(), expected.detach().double()
    finite = torch.isfinite(expected)
    # Infinities must be the same ones, and a NaN is never right.
    assert torch.equal(got[~finite], expected[~finite]), what
    got, expected = got[finite], expected[finite]
    if expected.numel() == 0:
        return
    scale = float(expected.abs().max().clamp_min(1.0))
    worst = float((got - expected).abs().max())
    assert worst <= tolerance * scale, f"{what}: off by {worst:.3g} at a scale of {scale:.3g}"


def call_of(p, seed=None, wanted=(True, True, True), **options):
    """The problem as the ops and backends take it, with a ``seed`` of the sample."""
    seed = None if seed is None else torch.as_tensor(seed).to(p.hidden.device)
    return Call(*p.args, p.bias, seed, Settings(**options), p.hidden.dtype, Wanted(*wanted))


def op_arguments(call, op="nll"):
    """What ``ops.linear_nll_op`` takes, or the part of ``weighted_loss_op`` that is a problem."""
    return *tensors_of(call), *call.arguments(op)
