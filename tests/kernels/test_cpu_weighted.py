"""The cpu backend's exact weighted loss: where its logits wait must not show in its results."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from bft_kernels import empty_cache, linear_cross_entropy, workspace
from tests.support.losses import balanced, cross_entropy
from tests.support.problems import Problem, draw_problem, error_of

pytest.importorskip("bft_kernels._cpu", reason="bft_kernels._cpu is not built")

from bft_kernels.backends.cpu import team, weighted
from bft_kernels.backends.cpu.plan import CPU_PASS_ROWS, PIECE_STEP

MIB = 2**20
ROWS, VOCABULARY = 1000, 20_011


@pytest.fixture
def taken(monkeypatch):
    """Of each piece: rows, rows that wait, and of these the rows that wait in dW."""
    found = []
    real = weighted._Engine._wait

    def wait(engine, first, stop):
        waiting = real(engine, first, stop)
        found.append((stop - first, waiting.rows, waiting.in_gradient))
        return waiting

    monkeypatch.setattr(weighted._Engine, "_wait", wait)
    return found


def boundaries(*, longest):
    """Documents of 1 to ``longest`` tokens, and an empty one."""
    cuts = torch.randint(1, longest + 1, (ROWS,)).cumsum(0)
    cuts = cuts[cuts < ROWS]
    return torch.cat([torch.tensor([0, 0]), cuts, torch.tensor([ROWS])])


def gradients(loss, p):
    loss.backward()
    return {"loss": loss.detach(), **p.grads()}


def first_rows(p, rows=ROWS, budget=24 * MIB):
    """Loss and gradients of the first rows of a problem."""
    own = Problem(p.hidden[:rows], p.weight, p.target[:rows])
    return gradients(balanced(own, window=4, backend="cpu", max_buffer_bytes=budget), own)


def check(p, budget, **how):
    """No less accurate than torch's own products and softmax in float32."""
    loss_of = balanced if "cu_seqlens" in how else cross_entropy

    def run(copy, **more):
        return gradients(loss_of(copy, **how, **more), copy)

    truth = run(p.copy(torch.float64), backend="torch")
    plain = run(p.copy(torch.float32), backend="torch")
    got = run(p.copy(), backend="cpu", max_buffer_bytes=budget)
    for name, expected in truth.items():
        dtype = torch.float32 if name == "loss" else p.hidden.dtype
        allowed = 3 * error_of(plain[name], expected) + 4 * torch.finfo(dtype).eps
        assert error_of(got[name], expected) <= allowed, name


@pytest.mark.parametrize("ignored", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_several_pieces(dtype, ignored, taken):
    p = draw_problem(ROWS, 8, VOCABULARY, ignored=ignored, dtype=dtype, scale=2.0)
    check(p, 24 * MIB, cu_seqlens=boundaries(longest=100), window=4)
    first, *later = taken
    assert later  # one or two: it depends on where documents end
    assert first[2] == 8
    assert all(in_gradient == 0 for _, _, in_gradient in later)
    assert all(rows - waiting < CPU_PASS_ROWS for rows, waiting, _ in taken)


@pytest.mark.parametrize(
    ("shape", "cuts", "budget", "ignored"),
    [
        # A long document is one piece, some of which waits in the buffer as well.
        *(((ROWS, 8, VOCABULARY), [0, ROWS], 24 * MIB, ignored) for ignored in (0.0, 0.3)),
        # The gradient has room whatever the budget.
        *(((200, 32, 601), [0, 90, 200], budget, 0.0) for budget in (1, 10_000, 300_000)),
    ],
)
def test_one_piece_is_partly_computed_again(shape, cuts, budget, ignored, taken):
    p = draw_problem(*shape, ignored=ignored, dtype=torch.float32, scale=2.0)
    check(p, budget, cu_seqlens=torch.tensor(cuts), window=4)
    [(rows, waiting, in_gradient)] = taken
    assert in_gradient == shape[1] <= waiting < rows
    assert waiting > in_gradient or budget < 24 * MIB


def test_a_long_document_among_short_ones(taken):
    p = draw_problem(ROWS, 8, VOCABULARY, ignored=0.0, dtype=torch.float32, scale=2.0)
    bounds = torch.tensor([0, 60, 150, 250, 600, 700, 800, 900, ROWS])
    check(p, 24 * MIB, cu_seqlens=bounds, window=4)
    assert any(waiting < rows for rows, waiting, _ in taken)


@pytest.mark.parametrize(
    ("width", "in_gradient", "members"), [(160, 160, 2), (180, 168, 2), (240, 240, 1)]
)
def test_the_rows_in_the_gradient_are_no_more_than_a_thread_s_part(
    width, in_gradient, members, taken, all_threads, monkeypatch
):
    """A few too many are computed again; where they are many, all threads share their blocks."""
    torch.set_num_threads(2)
    sizes = []
    run = team.run

    def seen(blocks, compute, threads):
        sizes.append(threads)
        run(blocks, compute, threads)

    monkeypatch.setattr(team, "run", seen)
    p = draw_problem(300, width, 3001, ignored=0.0, dtype=torch.float32, scale=2.0)
    check(p, 4 * MIB, cu_seqlens=torch.tensor([0, 300]), window=4)
    assert [piece[2] for piece in taken] == [in_gradient]
    assert sizes == [2, members]


def test_all_logits_wait_in_the_gradient(taken):
    p = draw_problem(90, 96, 3001, ignored=0.0, dtype=torch.float32, scale=2.0)
    check(p, MIB, reduction="mean")
    assert taken == [(90, 90, 90)]


def test_pieces_of_a_mean_are_cut_anywhere(taken):
    p = draw_problem(ROWS, 8, VOCABULARY, ignored=0.0, dtype=torch.float32, scale=2.0)
    check(p, 24 * MIB, reduction="mean", label_smoothing=0.1, z_loss=0.01)
    assert len(taken) > 1
    assert all(rows - waiting < PIECE_STEP for rows, waiting, _ in taken)


def test_the_same_result_with_any_number_of_threads(all_threads):
    p = draw_problem(ROWS, 8, VOCABULARY, dtype=torch.float32, scale=2.0)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(first_rows(p))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-5, atol=1e-7)


def test_logits_that_waited_in_an_earlier_call_do_not_matter(taken):
    """The buffer is kept: poisoned, made under inference mode, of another size, and freed."""
    p = draw_problem(ROWS, 8, VOCABULARY, dtype=torch.float32, scale=2.0)

    empty_cache()
    with torch.inference_mode():
        linear_cross_entropy(*(tensor.detach() for tensor in p.args), max_buffer_bytes=24 * MIB)
    first = first_rows(p)
    (kept,) = workspace._kept
    assert 0 < kept.nbytes <= 24 * MIB
    kept.fill_(torch.nan)
    again = first_rows(p)
    assert workspace._kept[0] is kept
    first_rows(p, rows=ROWS // 8, budget=4 * MIB)
    assert workspace._kept[0] is kept
    first_rows(p, budget=48 * MIB)
    assert workspace._kept[0].nbytes > kept.nbytes
    empty_cache()
    for other in (again, first_rows(p)):
        torch.testing.assert_close(other, first, rtol=0, atol=0)


def test_calls_side_by_side_have_a_buffer_each():
    p = draw_problem(ROWS, 8, VOCABULARY, dtype=torch.float32, scale=2.0)

    expected = first_rows(p)
    with ThreadPoolExecutor(3) as pool:
        for got in pool.map(first_rows, [p] * 6):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)
    assert len(workspace._kept) == 1
