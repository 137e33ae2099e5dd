"""The specification itself, against torch's own losses and against formulas written out here."""

import math

import pytest
import torch

from bft_kernels import reference
from bft_kernels.backends.torch.sampling import row_keys, scaled_uniforms
from tests.support.draws import draw_bits, inclusion, uniform
from tests.support.problems import assert_close, draw_problem

# (seed, row, column, the hash's 32 bits, u). Made once from the definition in Python integers;
# they must never change, or a checkpointed run does not continue as it would have.
GOLDEN = [
    (0, 0, 0, 0xC49540DB, "0x1.892a800000000p-1"),
    (0, 0, 1, 0x0473F553, "0x1.1cfd600000000p-6"),
    (0, 1, 0, 0x7A05FDD5, "0x1.e817f60000000p-2"),
    (1, 0, 0, 0xFA7469DE, "0x1.f4e8d40000000p-1"),
    (-1, 0, 0, 0x600EDDD1, "0x1.803b760000000p-2"),
    (12345, 678, 151935, 0xAFD33B5B, "0x1.5fa6780000000p-1"),
    (-(2**63), 2**32 + 5, 2**31 - 1, 0xD5CBCD07, "0x1.ab979c0000000p-1"),
    (2**63 - 1, 2**40, 262143, 0xE64BBD5C, "0x1.cc977c0000000p-1"),
    (20240607, 3, 49151, 0xD36F0B72, "0x1.a6de180000000p-1"),
    (-1, 2**32, 49151, 0xF6A4BD19, "0x1.ed497c0000000p-1"),
]


def backend_uniforms(seed, rows, columns):
    keys = row_keys(torch.tensor(seed), torch.tensor(rows, dtype=torch.int64))
    return scaled_uniforms(*keys, columns.to(torch.int32), 1.0)


@pytest.mark.parametrize(("seed_", "row", "column", "bits", "u"), GOLDEN)
def test_golden_draws(seed_, row, column, bits, u):
    expected = float.fromhex(u)
    columns = torch.tensor([column])
    assert int(draw_bits(seed_, [row], [column])[0, 0]) == bits
    assert float(reference.uniforms(seed_, [row], columns)) == expected
    assert float(backend_uniforms(seed_, [row], columns)) == expected


def test_columns_beyond_31_bits():
    """C++ and CUDA take them; the specification and PyTorch's backend do not."""
    assert int(draw_bits(-5, [2**40], [2**32 - 21])[0, 0]) == 0xF516C149
    assert int(draw_bits(2**63 - 1, [2**40], [2**32 - 1])[0, 0]) == 0xEF00D60C


def test_backend_draws_bit_for_bit():
    wide = torch.randint(-(2**63), 2**63 - 1, (6,)).tolist()
    for seed_ in [0, 1, -1, 2**63 - 1, -(2**63), 2**32, *wide]:
        far = torch.randint(2**32, 2**62, (4,)).tolist()
        rows = [0, 1, 2047, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, *far]
        ends = torch.tensor([2**31 - 1, 2**31 - 2, 2**16])
        columns = torch.cat([ends, torch.randint(2**31 - 1, (500,)), torch.arange(500)])
        expected = reference.uniforms(seed_, rows, columns)
        assert expected.dtype == torch.float32
        assert torch.equal(backend_uniforms(seed_, rows, columns), expected)
        drawn = uniform(draw_bits(seed_, rows, columns.numpy()))
        assert torch.equal(torch.from_numpy(drawn), expected)
        # One factor for eps is exact for a power of two.
        keys = row_keys(torch.tensor(seed_), torch.tensor(rows))
        scaled = scaled_uniforms(*keys, columns.to(torch.int32), 2**-12)
        assert torch.equal(scaled, expected * 2**-12)


def test_no_rows_have_no_draws():
    assert reference.uniforms(3, [], torch.arange(5)).shape == (0, 5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"softcap": 2.5},
        {"temperature": 0.3},
        {"label_smoothing": 0.1},
        {"z_loss": 1e-2},
        {"softcap": 5.0, "temperature": 1.7, "label_smoothing": 0.3, "z_loss": 0.1},
    ],
    ids=str,
)
def test_losses_equal_torch(options):
    p = draw_problem(23, 7, 41, bias=True)
    y = torch.nn.functional.linear(p.hidden, p.weight, p.bias)
    if cap := options.get("softcap"):
        y = cap * torch.tanh(y / cap)
    z = y / options.get("temperature", 1.0)
    expected = torch.nn.functional.cross_entropy(
        z, p.target, reduction="none", label_smoothing=options.get("label_smoothing", 0.0)
    )
    squared = options.get("z_loss", 0.0) * z.logsumexp(1) ** 2
    expected = expected + torch.where(p.target != -100, squared, 0)
    got = reference.linear_nll(*p.args, bias=p.bias, **options)
    assert_close(got, expected, 1e-13)


def test_statistics():
    p = draw_problem(31, 5, 19, ignored=0)
    stats = reference.token_stats(*p.args)
    distribution = torch.distributions.Categorical(logits=p.hidden @ p.weight.T)
    assert_close(stats["nll"], -distribution.log_prob(p.target))
    assert_close(stats["entropy"], distribution.entropy())
    assert_close(stats["confidence"], distribution.probs.gather(1, p.target[:, None])[:, 0])
    assert_close(stats["lse"], (p.hidden @ p.weight.T).logsumexp(1))
    assert torch.equal(stats["correct"], distribution.probs.argmax(1) == p.target)


def test_ties_go_to_the_lowest_index():
    hidden, weight = torch.ones(3, 1), torch.tensor([[1.0], [2.0], [2.0], [0.0]])
    stats = reference.token_stats(hidden, weight, torch.tensor([1, 2, 0]))
    assert stats["correct"].tolist() == [True, False, False]


def test_balanced_loss_in_plain_numbers():
    # Two documents whose confidences are given by construction: logits are log-probabilities.
    c = [0.9, 0.1, 0.5, 0.2]
    hidden = torch.tensor([[math.log(x), math.log(1 - x)] for x in c], dtype=torch.float64)
    weight, target = torch.eye(2, dtype=torch.float64), torch.zeros(4, dtype=torch.int64)
    cu = torch.tensor([0, 3, 3, 4])
    how = {"window": 2, "delta": 0.0}
    loss = reference.balanced_linear_cross_entropy(hidden, weight, target, cu, **how)
    # Window 2 is {t-1, t}, clipped at the start: means 0.9, 0.5, 0.3 and, alone, 0.2.
    first = (1 - 0.3) * (1 * -math.log(0.9) + 0.1 / 0.5 * -math.log(0.1) + 1 * -math.log(0.5)) / 3
    second = (1 - 0.2) * 1 * -math.log(0.2)
    assert math.isclose(float(loss), (first + second) / 2, rel_tol=1e-12)
    how["normalize"] = "token"
    by_token = reference.balanced_linear_cross_entropy(hidden, weight, target, cu, **how)
    assert math.isclose(float(by_token), (3 * first + second) / 4, rel_tol=1e-12)


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "temperature": 0.7}], ids=str)
def test_sampled_gradient_written_out(options, seed):
    p = draw_problem(6, 4, 50, ignored=0)
    rows, eps = [5, 2**33, 7, 0, 1, 2], 2**-5
    got = reference.sampled_gradient(*p.args, seed, eps=eps, rows=rows, **options)
    y = (p.hidden @ p.weight.T).detach().requires_grad_()
    cap, temperature = options.get("softcap"), options.get("temperature", 1.0)
    z = (y if cap is None else cap * torch.tanh(y / cap)) / temperature
    (slope,) = torch.autograd.grad(z.sum(), y, retain_graph=True)  # of each, by itself
    prob, target = z.softmax(1), torch.nn.functional.one_hot(p.target, 50).bool()
    u = reference.uniforms(seed, rows, torch.arange(50)).double()
    kept = torch.where(target, True, u * eps < prob)
    value = torch.where(target, prob - 1, torch.where(prob < eps, eps, prob))
    variance = torch.where(target | (prob > eps), 0, prob * (eps - prob)) * slope**2
    assert torch.equal(got.kept, kept)
    assert_close(got.dy, value * slope * kept, 1e-12)
    assert_close(got.variance, variance.sum(1), 1e-12)
    assert_close(got.hidden_variance, variance @ p.weight.square().sum(1), 1e-12)


@pytest.mark.parametrize("eps", [2**-12, 1e-3, 1.0])
def test_the_chance_to_be_kept_is_p_over_eps_to_24_bits(eps):
    # The grid of u is enumerated. A power of two scales it exactly; otherwise eps and the product
    # round once each.
    bound = 2**-24 if math.frexp(eps)[0] == 0.5 else 3 * 2**-24
    p = torch.rand(20_000, dtype=torch.float64) * eps
    p = torch.cat([p, eps * torch.tensor([0.5, 2**-24, 1.0001, 3.0], dtype=torch.float64)])
    chance = inclusion(p, eps)
    assert (chance - (p / eps).clamp(max=1)).abs().max() <= bound * 1.001
    assert bool((chance[p > eps] == 1).all())
