"""The cpu backend on every instruction set that runs here, against the float64 specification.

And its sample beside that of the torch backend in the same type.
"""

import pytest
import torch

from bft_kernels import linear_nll, ops
from bft_kernels.results import Saved
from tests.support.problems import DTYPES, TRANSFORMS, assert_close, call_of, draw_problem
from tests.support.samples import specified_sample, undecided

_cpu = pytest.importorskip("bft_kernels._cpu", reason="bft_kernels._cpu is not built")


@pytest.fixture(autouse=True, params=_cpu.instruction_sets())
def instruction_set(request):
    before = _cpu.instruction_set()
    _cpu.use_instruction_set(request.param)
    yield request.param
    _cpu.use_instruction_set(before)


def entries(p, seed, eps, budget, *, backend="cpu", **changes):
    how = {"gradient": "sampled", "eps": eps, "backend": backend, "max_buffer_bytes": budget}
    return ops.linear_nll(call_of(p, seed, return_stats=True, **how, **changes))


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_kept_set_is_the_specifications(dtype, transform, seed):
    how = dict(TRANSFORMS[transform])
    p = draw_problem(60, 24, 3000, ignored=0.0, dtype=dtype, scale=3.0, bias=how.pop("bias", False))
    eps = 2**-9
    expected = specified_sample(p, seed, eps, **how)
    clear = ~undecided(p, seed, eps, **how)
    assert int(expected.kept.sum()) > 3000
    on_cpu = [("cpu", *how) for how in ((2**26, 1), (2**26, 3), (40_000, 2), (600, 1))]
    for backend, budget, threads in (*on_cpu, ("torch", 20_000, 1), ("torch", 10**6, 1)):
        torch.set_num_threads(threads)
        result = entries(p, seed, eps, budget, backend=backend, **how)
        row = torch.repeat_interleave(torch.arange(60), result.csr_offsets.diff())
        assert bool((result.csr_columns.diff()[row.diff() == 0] > 0).all())
        kept = torch.zeros_like(clear)
        kept[row, result.csr_columns.long()] = True
        assert not bool(((kept != expected.kept) & clear).any())
        want = expected.dy[row, result.csr_columns.long()]
        both = want != 0
        assert_close(result.csr_values[both], want[both], 1e-4)
        assert_close(result.variance, expected.variance, 1e-4)


def test_gradients_are_the_same_for_any_threads_and_slices(seed, monkeypatch):
    p = draw_problem(90, 33, 2000, bias=True, dtype=torch.float32, scale=2.0)
    saved = entries(p, seed, 2**-8, 2**24)
    how = {"gradient": "sampled", "eps": 2**-8, "backend": "cpu", "max_buffer_bytes": 2**24}
    grad, call = torch.randn(90), call_of(p, seed, **how)
    results = []
    for threads, slice_ in ((1, 33), (2, 33), (3, 8), (5, 7)):
        torch.set_num_threads(threads)
        planned = "bft_kernels.backends.cpu.backward.plan_cpu_slice"
        monkeypatch.setattr(planned, lambda *_, columns=slice_: columns)
        rest = Saved(*(getattr(saved, name) for name in Saved._fields))
        results.append(ops.linear_nll_backward(call, grad, rest))
    for other in results[1:]:
        for part, first in zip(other[:3], results[0][:3], strict=True):
            assert torch.equal(part, first)


def gathered(table, out):
    """``out = table``, by way of the kernel that adds up weighted rows."""
    count = table.shape[0]
    offsets, columns = torch.arange(count + 1), torch.arange(count, dtype=torch.int32)
    ones = torch.ones(count)

    def matrix(x):
        return x.data_ptr(), str(x.dtype).removeprefix("torch."), *x.shape, x.stride(0)

    _cpu.spmm_hidden(
        rows=count,
        offsets=offsets.data_ptr(),
        columns=columns.data_ptr(),
        values=ones.data_ptr(),
        upstream=ones.data_ptr(),
        weight=matrix(table),
        grad_hidden=matrix(out),
        threads=1,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_half_is_widened_exactly(dtype):
    table = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(256, 256)
    out = torch.full((256, 256), 7.0)
    gathered(table, out)
    expected = table.float()
    finite = expected.isfinite()
    assert torch.equal(out[finite], expected[finite])
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.isinf(), expected.isinf())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_floats_are_rounded_as_torch_rounds(dtype):
    bits = torch.randint(-(2**31), 2**31, (300, 333)).to(torch.int32)
    table = bits.view(torch.float32)
    # Ties, the ends of the range and subnormal halves.
    exact = torch.arange(0, 2**15, dtype=torch.int16).view(dtype)[:333].float()
    table[0], table[1] = exact, exact * (1 + 2**-9)
    table[2, :6] = torch.tensor([65519.9, 65520.0, 65504.0, 2**-24, 2**-25, 2**-26])
    table[3] = torch.randn(333) * 1e-6
    table[4] = (exact + exact.roll(1)) / 2
    out = torch.full(table.shape, 7.0, dtype=dtype)
    gathered(table, out)
    expected = table.to(dtype)
    same = (out == expected) | (out.isnan() & expected.isnan())
    assert bool(same.all()), (table[~same][:4], out[~same][:4], expected[~same][:4])


def test_exponentials_are_within_two_units_in_the_last_place():
    x = -torch.linspace(0, 87, 4001)[None].contiguous()
    z = x.clone()
    one, zero = torch.ones(1), torch.zeros(1)
    target = torch.tensor([4000])
    _cpu.gradient_block(
        block=(z.data_ptr(), 4001, 0, 1, 0, 4001),
        vocabulary=4001,
        kept=x.data_ptr(),
        targets=target.data_ptr(),
        lse=zero.data_ptr(),
        lse_low=zero.data_ptr(),
        nll=zero.data_ptr(),
        upstream=one.data_ptr(),
        threads=1,
    )
    exact = x.double().exp()
    worst = ((z.double() - exact) / exact)[0, :4000].abs().max()
    assert float(worst) <= 2 * 2**-24 * 2


def test_softcap_is_accurate_near_zero_and_at_its_ends():
    y = torch.cat([torch.linspace(-50, 50, 2001), torch.logspace(-8, 0, 200)])
    hidden, weight = torch.ones(1, 1), y[:, None].contiguous()
    for v in (0, 1000, 1500, 2050, 2200):
        nll = linear_nll(hidden, weight, torch.tensor([v]), softcap=10.0, backend="cpu")
        z = 10 * (y.double() / 10).tanh()
        assert float(nll) == pytest.approx(float(z.logsumexp(0) - z[v]), rel=1e-6, abs=1e-6)


def test_an_unknown_instruction_set_is_refused():
    with pytest.raises(ValueError, match=r"name: got 'mmx', expected one of .*portable"):
        _cpu.use_instruction_set("mmx")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block": (64, 4, 0, 1, 0, 9)}, "columns: got 9, expected a number from 1 to 8"),
        ({"block": (64, 3, 0, 1, 0, 4)}, "stride: got 3, expected a number from 4"),
        ({"block": (0, 4, 0, 1, 0, 4)}, "logits: got address 0"),
        ({"targets": 3}, "targets: got address 3"),
        ({"threads": 0}, "threads: got 0, expected a number from 1"),
        ({"vocabulary": 0}, "vocabulary: got 0"),
    ],
)
def test_bindings_name_what_is_wrong(change, message):
    good = {"block": (64, 4, 0, 1, 0, 4), "vocabulary": 8, "kept": 64, "threads": 1}
    good |= dict.fromkeys(("targets", "lse", "lse_low", "nll", "upstream"), 64)
    with pytest.raises(ValueError, match=message):
        _cpu.gradient_block(**(good | change))
