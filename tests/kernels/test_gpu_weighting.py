"""The weights of GPU kernels, and Triton's weighted loss.

Triton in its interpreter and CUDA in the emulation where there is no GPU.
"""

import importlib
import math
from dataclasses import dataclass
from fractions import Fraction
from types import ModuleType

import pytest
import torch

from bft_kernels import balanced_linear_cross_entropy, ops, reference, weighting
from bft_kernels.backends.cuda import native
from bft_kernels.dispatch import offered
from bft_kernels.problem import traits_of
from bft_kernels.results import BalancedLoss
from bft_kernels.settings import SCHEMES, Settings, options_of
from tests.support.problems import assert_close, draw_problem
from tests.support.samples import sampled_options
from tests.support.soak import soaked

DEVICE = "cuda" if torch.cuda.is_available() else "cpu:7"
needs_emulation = pytest.mark.skipif(torch.cuda.is_available(), reason="asks the emulation")
every_scheme = pytest.mark.parametrize("scheme", SCHEMES)


@dataclass
class Kernels:
    """A backend's functions, on tensors of the CPU."""

    module: ModuleType
    tile: int

    def run(self, loss, labelled, bounds, settings, items=None):
        inputs = (None if x is None else x.to(DEVICE) for x in (loss, labelled, bounds, items))
        return BalancedLoss(*(x.cpu() for x in self.module.balanced_loss(*inputs, settings)))

    def joint(self, loss, labelled, bounds, settings):
        inputs = (x.to(DEVICE) for x in (loss, labelled, bounds))
        return self.module.weigh(*inputs, settings).weight.cpu()


def how_of(scheme, window=256, **how):
    """The settings of a weighting."""
    return Settings(scheme=scheme, window=window, **how)


@pytest.fixture(params=["triton", "cuda"])
def kernels(request, on_device):
    if request.param == "triton":
        pytest.importorskip("triton", reason="triton is not installed")
    else:
        request.getfixturevalue("cuda_backend")
    module = importlib.import_module(f"bft_kernels.backends.{request.param}.weighting")
    tile = module.TILE if request.param == "triton" else native.kernels().WEIGHT_TILE
    return Kernels(module, tile)


# Lengths of documents in tiles and tokens, and the part of their positions that carries labels.
LAYOUTS = {
    "nothing": (lambda tile: (), 1.0),
    "an empty document": (lambda tile: (0,), 1.0),
    "one token": (lambda tile: (1,), 1.0),
    "no label": (lambda tile: (5, 0, 3), 0.0),
    "short": (lambda tile: (0, 3, 0, 0, 17, 1, 2, 0), 0.6),
    "a tile to the last token": (lambda tile: (tile, 2 * tile - 1, 1), 1.0),
    "longer than tiles": (lambda tile: (3, 4 * tile + 5, 7, 0), 0.7),
    "mostly prompt": (lambda tile: (90, 2, 40), 0.1),
}


def draw(lengths, part):
    """Losses, labels and boundaries; certain tokens next to hopeless ones."""
    count = sum(lengths)
    labelled = torch.rand(count) < part
    loss = torch.rand(count) * torch.randint(0, 60, (count,))
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    return torch.where(labelled, loss, 0), labelled, bounds


def plain(loss, labelled, bounds, settings, items=None):
    """PyTorch's."""
    return weighting.balanced_loss(loss, labelled, bounds, items, settings)


def equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@every_scheme
def test_equals_the_specification(kernels, scheme, layout):
    lengths, part = LAYOUTS[layout]
    loss, labelled, bounds = draw(lengths(kernels.tile), part)
    window = int(torch.tensor([1, 2, 5, 16, 10**12])[torch.randint(5, ())])
    normalize = "sequence" if torch.rand(()) < 0.5 else "token"
    items = torch.tensor(7) if torch.rand(()) < 0.5 else None
    settings = how_of(scheme, window, gamma=1.7, normalize=normalize)
    got = kernels.run(loss, labelled, bounds, settings, items)
    expected = plain(loss.double(), labelled, bounds, settings, items)
    assert all(value.dtype == torch.float32 for value in got)
    assert_close(got._asdict(), expected._asdict(), 1e-6)
    before = torch.nn.functional.pad(labelled.cumsum(0), (1, 0))
    coefficient = reference.token_coefficients(
        torch.exp(-loss.double()[labelled]),
        before[bounds],
        scheme=scheme,
        window=window,
        gamma=1.7,
        normalize=normalize,
        num_items=None if items is None else 7,
    )
    assert_close(got.coefficient[labelled], coefficient, 1e-6)
    assert_close(got.loss, (coefficient * loss.double()[labelled]).sum(), 1e-6)
    token = expected.token_weight
    owner = weighting.labelled_layout(labelled, bounds).sequence
    product = token * expected.sequence_weight[owner] if len(owner) else token
    assert_close(kernels.joint(loss, labelled, bounds, settings), product, 1e-6)


@pytest.mark.parametrize("kernels", ["cuda"], indirect=True)
def test_a_document_of_more_tiles_than_a_warp_has_lanes(kernels):
    tile = kernels.tile
    loss, labelled, bounds = draw((9, 40 * tile + 5, 3), 0.8)
    inputs = loss, labelled, bounds, how_of("bft", 3)
    assert_close(kernels.run(*inputs)._asdict(), plain(*inputs)._asdict(), 1e-6)
    for hopeless in (11, 20 * tile, 40 * tile):
        own = torch.ones(loss.numel())
        own[hopeless] = 30.0
        got = kernels.run(own, own > 0, bounds, how_of("bft", 1))
        assert got.sequence_confidence.argmin() == 1
        assert float(got.sequence_confidence[1]) == pytest.approx(math.exp(-30.0), rel=1e-6)


@pytest.mark.parametrize("scheme", ["bft", "bft-v1"])
def test_windows_keep_small_sums_next_to_large_ones(kernels, scheme):
    count, window = 1024 + 7, 255
    passage = torch.randint(0, 80, (count // 100 + 1,)).repeat_interleave(100)[:count]
    loss = torch.where(passage > 40, passage + torch.rand(count), 0.0)
    every = torch.ones(count, dtype=torch.bool)
    got = kernels.run(loss, every, torch.tensor([0, count]), how_of(scheme, window))
    scale = 2**200
    total = [0]
    for value in torch.exp(-loss.double()).tolist():
        total.append(total[-1] + int(Fraction(value) * scale))
    exact = []
    for t in range(count):
        a, b = max(0, t - window // 2), min(count, t + window - window // 2)
        if scheme == "bft-v1":
            a = min(t, count - window)
            b = a + window
        exact.append((total[b] - total[a]) / (scale * (b - a)))
    exact = torch.tensor(exact, dtype=torch.float64)
    assert float((got.window_confidence.double() / exact - 1).abs().max()) <= 5e-7
    assert abs(float(got.sequence_confidence) / float(exact.min()) - 1) <= 5e-7


@every_scheme
def test_losses_at_the_ends_of_the_range(kernels, scheme):
    loss, labelled, bounds = draw((40, 2 * kernels.tile, 30, 20, 1), 0.8)
    behind = 40 + 2 * kernels.tile
    labelled[[5, 50, behind - 4, behind + 21]] = True
    loss[:40] = torch.where(labelled[:40], 1000.0, 0.0)
    loss[50], loss[70:80], loss[behind - 4] = math.inf, 0.0, 88.0
    loss[-31] = math.nan  # in the last but two document
    labelled[-31] = True
    inputs = loss, labelled, bounds, how_of(scheme, 8)
    got, expected = kernels.run(*inputs), plain(*inputs)
    for name, value in zip(got._fields, got, strict=True):
        want = getattr(expected, name)
        if value.shape == labelled.shape:
            assert bool((value[~labelled] == 0).all()), name
            value, want = value[labelled], want[labelled]
        torch.testing.assert_close(value, want, rtol=2e-6, atol=1e-44, equal_nan=True, msg=name)
    if scheme.startswith("bft"):
        spoiled = got.sequence_weight.isnan().tolist()
        assert spoiled == [False, False, True, False, False]


def test_a_confidence_that_underflows_is_not_zero_to_its_logarithm(kernels):
    loss = torch.full((257,), 0.1)
    loss[100] = 110.0
    every = torch.ones(257, dtype=torch.bool)
    got = kernels.run(loss, every, torch.tensor([0, 257]), how_of("bft-v1-code"))
    lowest = math.exp(-(110.0 + 255 * 0.1) / 256)
    assert float(got.sequence_weight) == pytest.approx(1 - lowest, rel=1e-6)


@every_scheme
def test_documents_do_not_see_each_other(kernels, scheme):
    lengths = (0, 5, 3 * kernels.tile, 0, kernels.tile + 1, 1, 40)
    loss, labelled, bounds = draw(lengths, 0.8)
    settings = how_of(scheme, 12, normalize="token")
    packed = kernels.run(loss, labelled, bounds.int(), settings)
    parts = [
        kernels.run(a, b, torch.tensor([0, a.numel()]), settings)
        for a, b in zip(loss.split(lengths), labelled.split(lengths), strict=True)
    ]
    # Not to rounding: exactly, since a window is summed in the same order wherever it is.
    for name in packed._fields[2:]:
        alone = torch.cat([getattr(part, name) for part in parts])
        assert torch.equal(getattr(packed, name), alone), name
    assert equal(packed, kernels.run(loss, labelled, bounds, settings)), "another run"


@every_scheme
def test_padding_changes_nothing(kernels, scheme):
    loss, labelled, bounds = draw((7, 0, kernels.tile + 9), 0.7)
    count = loss.numel()
    settings = how_of(scheme, 6)
    expected = kernels.run(loss, labelled, bounds, settings)
    filled = torch.cat([bounds, bounds.new_full((count - 3,), count)])
    # Positions behind the last boundary belong to no document.
    more = torch.full((kernels.tile + 3,), 5.0)
    behind = torch.cat([loss, more]), torch.cat([labelled, more > 0]), bounds
    for inputs in ((loss, labelled, filled), behind):
        got = kernels.run(*inputs, settings)
        for name, value in zip(got._fields, got, strict=True):
            want = getattr(expected, name)
            assert torch.equal(value[: want.numel()] if value.dim() else value, want), name
            assert value.dim() == 0 or bool((value[want.numel() :] == 0).all()), name


@pytest.mark.parametrize("scheme", ["sft", "bft"])
def test_a_step_of_no_items(kernels, scheme):
    """0 in a step without labels; with labels, which nobody looked for, no finite loss."""
    loss, labelled, bounds = draw((7, 0, kernels.tile + 9), 0.7)
    for normalize in ("sequence", "token"):
        how = (bounds, how_of(scheme, 6, normalize=normalize), torch.tensor(0))
        assert not any(x.any() for x in kernels.run(torch.zeros_like(loss), labelled & False, *how))
        assert not kernels.run(loss, labelled, *how).loss.isfinite()


@pytest.mark.parametrize("layout", LAYOUTS)
@every_scheme
def test_nothing_is_written_outside_a_buffer_or_left_unwritten(kernels, scheme, layout, guarded):
    lengths, part = LAYOUTS[layout]
    got = kernels.run(*draw(lengths(kernels.tile), part), how_of(scheme, 4))
    assert not any(bool(value.isnan().any()) for value in got)


# Of 70 positions.
@pytest.mark.parametrize(
    "bounds", [[0, 50, 20, 70], [-9, 10**12, 70], [5, 5, -(2**40)], [5, 5, 70]], ids=str
)
@every_scheme
def test_boundaries_that_nobody_checked_stay_inside(kernels, scheme, bounds, guarded):
    loss, labelled, _ = draw((70,), 0.8)
    for normalize in ("sequence", "token"):
        settings = how_of(scheme, 4, normalize=normalize)
        got = kernels.run(loss, labelled, torch.tensor(bounds), settings)
        assert not any(bool(value.isnan().any()) for value in got)


def test_an_infinite_loss_of_weight_zero_adds_nothing(kernels):
    loss = torch.tensor([1.0, math.inf, 2.0])
    got = kernels.run(loss, loss > 0, torch.tensor([0, 3]), how_of("dft"))
    assert got.coefficient[1] == 0
    assert bool(got.loss.isfinite())


@needs_emulation
@pytest.mark.parametrize("offset", [0, 3, 16])
def test_labels_may_start_anywhere_and_other_losses_are_not_seen(emulated_device, offset):
    from bft_kernels.backends.cuda.weighting import balanced_loss

    loss, labelled, bounds = draw((100, 768, 20), 0.6)
    how = bounds, None, how_of("bft", 8)
    part = torch.cat([torch.ones(offset, dtype=torch.bool), labelled])[offset:]
    assert part.data_ptr() % 16 == offset % 16
    got = balanced_loss(torch.where(labelled, loss, math.nan), part, *how)
    assert equal(got, balanced_loss(loss, labelled, *how))


@needs_emulation
@every_scheme
def test_the_order_of_threads_changes_nothing(emulated_device, scheme):
    from bft_kernels.backends.cuda.weighting import balanced_loss

    loss, labelled, bounds = draw((7, 0, 512, 90), 0.7)
    runs = []
    for how in ({}, {"seed": 1}, {"seed": 2, "strict": True}):
        emulated_device.how = how
        inputs = loss, labelled, bounds, None, how_of(scheme, 9)
        runs.append(balanced_loss(*inputs))
    assert equal(runs[0], runs[1])
    assert equal(runs[0], runs[2])


# --- Triton's weighted loss ----------------------------------------------------------------------


@pytest.fixture
def triton(on_device):
    pytest.importorskip("triton", reason="triton is not installed")


def boundaries(kind, rows):
    ends = [0, rows // 5, rows // 5, rows - 7, rows]
    if kind == "padded":
        ends += [rows] * (rows - 4)
    return None if kind == "rows" else torch.tensor(ends)


@pytest.mark.parametrize(
    ("items", "how", "kind"),
    soaked(
        [None, 3.0],
        ["exact", "frozen", "sampled"],
        ["rows", "boundaries", "padded", "on the device"],
        plain=lambda items, how, kind: (
            how != "sampled" or (items, kind) in ((None, "rows"), (3.0, "on the device"))
        ),
    ),
)
def test_the_loss_and_its_gradients(triton, how, kind, items, poison):
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


def test_the_loss_of_one_graph(triton, fresh_compiler):
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
def test_opcheck(triton, rows, fresh_compiler):
    loss, labelled, bounds = draw((rows, 0), 0.7)
    inputs = (loss.requires_grad_(), labelled, bounds)
    settings = options_of["balanced"](how_of("bft", 4, normalize="token", backend="triton"))
    torch.library.opcheck(ops.balanced_loss_op, (*(x.to(DEVICE) for x in inputs), None, *settings))


def test_runs_where_the_backend_runs(triton):
    from bft_kernels.backends.triton.weighting import balanced_loss

    wide = torch.zeros(3, dtype=torch.float64, device=DEVICE)
    narrow = wide.float()

    def chosen(name, loss):
        return offered("balanced_loss", name, traits_of(loss))

    assert chosen("triton", narrow) is balanced_loss
    assert (chosen("auto", narrow) is balanced_loss) == (DEVICE == "cuda")
    for name, loss in (("auto", wide), ("triton", wide), ("torch", narrow), ("cpu", narrow)):
        assert chosen(name, loss) is not balanced_loss
