"""The Triton backend's weights, in the interpreter where there is no GPU."""

import pytest
import torch

from bft_kernels import balanced_linear_cross_entropy, ops
from bft_kernels.checks import SCHEMES
from bft_kernels.config import Weighting
from bft_kernels.dispatch import select_balanced_loss
from bft_kernels.results import BalancedLoss
from tests.support import balanced_weights
from tests.support.emulated_device import sampled_options
from tests.support.problems import assert_close, draw_problem

pytest.importorskip("triton", reason="triton is not installed")

from bft_kernels.backends.triton.weights import TILE, balanced_loss, joint_weights

pytestmark = pytest.mark.usefixtures("on_device")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu:7"

LAYOUTS = balanced_weights.layouts(TILE)


def run(loss, labelled, bounds, settings, normalize="sequence", items=None):
    inputs = (None if x is None else x.to(DEVICE) for x in (loss, labelled, bounds, items))
    return BalancedLoss(*(x.cpu() for x in balanced_loss(*inputs, normalize, settings)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_equals_the_specification(scheme, layout):
    def joint(*inputs):
        *tensors, settings = inputs
        return joint_weights(*(x.to(DEVICE) for x in tensors), settings).cpu()

    balanced_weights.check_specification(run, joint, LAYOUTS[layout], scheme, assert_close)


@pytest.mark.parametrize("scheme", ["bft", "bft-v1"])
def test_windows_keep_small_sums_next_to_large_ones(scheme):
    balanced_weights.check_small_sums(run, scheme, 20 * TILE + 7)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_losses_at_the_ends_of_the_range(scheme):
    balanced_weights.check_ends_of_the_range(run, scheme, TILE)


def test_a_confidence_that_underflows_is_not_zero_to_its_logarithm():
    balanced_weights.check_underflow(run)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_documents_do_not_see_each_other(scheme):
    balanced_weights.check_documents_are_alone(run, scheme, TILE)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_padding_changes_nothing(scheme):
    balanced_weights.check_padding(run, scheme, TILE)


@pytest.mark.parametrize("scheme", ["sft", "bft"])
def test_a_step_of_no_items(scheme):
    balanced_weights.check_no_items(run, scheme, TILE)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_nothing_is_written_outside_a_buffer_or_left_unwritten(scheme, layout, guarded):
    got = run(*balanced_weights.draw(*LAYOUTS[layout]), Weighting(scheme, 4))
    assert not any(bool(value.isnan().any()) for value in got)


@pytest.mark.parametrize("bounds", balanced_weights.BAD_BOUNDS, ids=str)
def test_boundaries_that_nobody_checked_stay_inside(bounds, guarded):
    loss, labelled, _ = balanced_weights.draw((70,), 0.8)
    for scheme in SCHEMES:
        run(loss, labelled, torch.tensor(bounds), Weighting(scheme, 4))


# --- the loss ------------------------------------------------------------------------------------


def boundaries(kind, rows):
    ends = [0, rows // 5, rows // 5, rows - 7, rows]
    if kind == "padded":
        ends += [rows] * (rows - 4)
    return None if kind == "rows" else torch.tensor(ends)


@pytest.mark.parametrize("kind", ["rows", "boundaries", "padded", "on the device"])
@pytest.mark.parametrize("how", ["exact", "frozen", "sampled"])
@pytest.mark.parametrize("items", [None, 3.0])
def test_the_loss_and_its_gradients(how, kind, items, poison):
    frozen = ("weight", "bias") if how == "frozen" else ()
    p = draw_problem(36, 12, 70, bias=True, dtype=torch.float32, frozen=frozen)
    p.target[8:20] = -100
    gradient = sampled_options(p) if how == "sampled" else {}
    scheme = SCHEMES[int(torch.randint(len(SCHEMES), ()))]
    results = []
    for backend in ("torch", "triton"):
        copy = p.copy(device=DEVICE) if backend == "triton" else p.copy()
        bounds = boundaries(kind, 36)
        if bounds is not None and kind == "on the device":
            bounds = bounds.to(copy.hidden.device)
        shape = (4, 9) if kind == "rows" else (36,)
        loss, stats = balanced_linear_cross_entropy(
            copy.hidden.view(*shape, 12),
            copy.weight,
            copy.target.view(shape),
            bias=copy.bias,
            scheme=scheme,
            window=5,
            cu_seqlens=bounds,
            num_items=items,
            normalize="token" if items is None else "sequence",
            backend=backend,
            max_buffer_bytes=6000,
            return_stats=True,
            **gradient,
        )
        loss.backward()
        fields = {k: v for k, v in stats._asdict().items() if v is not None}
        assert not any(value.requires_grad for value in fields.values())
        found = {"loss": loss, **fields, **copy.grads()}
        results.append({name: value.detach().cpu() for name, value in found.items()})
    assert_close(results[1], results[0], 1e-5)


def test_the_loss_of_one_graph(fresh_compiler):
    def loss_of(hidden, weight, target, bounds):
        return balanced_linear_cross_entropy(
            hidden, weight, target, cu_seqlens=bounds, window=4, backend="triton"
        )

    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (13, 18):
        p = draw_problem(rows, 5, 31, dtype=torch.float32, frozen=("weight",)).copy(device=DEVICE)
        bounds = torch.tensor([0, 4, rows], device=DEVICE)
        expected, got = loss_of(*p.args, bounds), compiled(*p.args, bounds)
        assert_close(got.cpu(), expected.cpu(), 1e-6)
        gradients = [torch.autograd.grad(loss, p.hidden)[0].cpu() for loss in (got, expected)]
        assert_close(*gradients, 1e-6)


@pytest.mark.parametrize("rows", [0, 13])
def test_opcheck(rows, fresh_compiler):
    loss, labelled, bounds = balanced_weights.draw((rows, 0), 0.7)
    inputs = (loss.requires_grad_(), labelled, bounds)
    settings = (None, "token", "bft", 4, 1.0, 1e-8, "triton")
    torch.library.opcheck(ops.balanced_loss, (*(x.to(DEVICE) for x in inputs), *settings))


def test_runs_where_the_backend_runs():
    wide = torch.zeros(3, dtype=torch.float64, device=DEVICE)
    narrow = wide.float()
    assert select_balanced_loss("triton", narrow) is balanced_loss
    assert (select_balanced_loss("auto", narrow) is balanced_loss) == (DEVICE == "cuda")
    for name, loss in (("auto", wide), ("triton", wide), ("torch", narrow), ("cpu", narrow)):
        assert select_balanced_loss(name, loss) is not balanced_loss
