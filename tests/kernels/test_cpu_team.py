"""Threads of the cpu backend that take blocks by themselves: order, delays, failures, numbers."""

import random
import statistics
import subprocess
import sys
import threading
import time
from contextlib import ExitStack

import pytest
import torch

from bft_kernels import linear_cross_entropy
from tests.support.losses import balanced, cross_entropy, nll
from tests.support.problems import draw_problem, error_of

_cpu = pytest.importorskip("bft_kernels._cpu", reason="bft_kernels._cpu is not built")

from bft_kernels.backends.cpu.team import Blocks, run  # noqa: E402

WAIT = 20.0  # seconds, for what happens at once where it happens at all

LOSSES = {
    "sampled": lambda p, **how: cross_entropy(p, gradient="sampled", seed=5, **how),
    "unit": lambda p, **how: linear_cross_entropy(p.hidden, p.weight.detach(), p.target, **how),
    "recompute": lambda p, **how: nll(p, **how).sum(),
    "weighted": lambda p, **how: balanced(p, cu_seqlens=torch.tensor([0, 100, 260, 600]), **how),
}


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def finish(blocks, most=10**6):
    """What one thread takes, one after the other, until none is ready."""
    taken = []
    while len(taken) < most and (block := blocks.take()):
        taken.append(block)
        blocks.done(block[0])
    return taken


@pytest.mark.parametrize("in_turn", [False, True])
def test_one_thread_takes_all_parts_of_a_step_before_the_next(in_turn):
    blocks = Blocks(3, 4, 2, in_turn=in_turn)
    assert finish(blocks) == [(part, step) for step in range(4) for part in range(3)]
    assert finish(Blocks(0, 4, 2)) == finish(Blocks(3, 0, 2)) == []


def test_whoever_is_put_aside_holds_up_one_part():
    blocks = Blocks(4, 5, reach=2)
    assert blocks.take() == (0, 0)
    ahead = finish(blocks, most=6)
    assert ahead == [(part, step) for step in range(2) for part in (1, 2, 3)]
    blocks.done(0)  # and now the other one goes on
    assert finish(blocks)[:2] == [(0, 1), (0, 2)]


@pytest.mark.parametrize("in_turn", [False, True])
def test_no_part_is_too_far_ahead_or_out_of_turn(in_turn):
    draw, lock = random.Random(3), threading.Lock()
    at, wrong = [0, 0, 0], []

    def compute(worker, part, step):
        with lock:
            far = at[part] != step or step >= min(at) + 2
            if far or (in_turn and part > 0 and at[part - 1] <= step):
                wrong.append((part, step, list(at)))
        time.sleep(draw.random() * 1e-3)
        with lock:
            at[part] += 1

    run(Blocks(3, 40, reach=2, in_turn=in_turn), compute, 2)
    assert at == [40] * 3
    assert not wrong


def test_what_a_thread_raises_is_raised_and_ends_the_others():
    computed = []

    def compute(worker, part, step):
        computed.append((part, step))
        if step == 3:
            raise OverflowError(f"part {part}")

    for threads in (1, 2):
        computed.clear()
        with pytest.raises(OverflowError, match="part"):
            run(Blocks(4, 50, reach=2), compute, threads)
        assert max(step for _, step in computed) <= 4


def test_a_team_is_threads_of_their_own():
    both = threading.Barrier(2, timeout=WAIT)
    workers = {}

    def body(worker):
        both.wait()
        assert not torch.is_inference_mode_enabled()
        workers[worker] = threading.get_ident()

    _cpu.run_team(body, 2)
    assert sorted(workers) == [0, 1]
    assert len(set(workers.values())) == 2


def test_a_worker_that_a_sweep_does_not_have_is_refused():
    targets = torch.zeros(4, dtype=torch.int64)
    z = torch.zeros(4, 8)
    softmax = _cpu.OnlineSoftmax(rows=4, vocabulary=8, targets=targets.data_ptr(), workers=2)
    block = (z.data_ptr(), 8, 0, 4, 0, 8)
    with pytest.raises(ValueError, match="worker: got 2, expected a number from 0 to 1"):
        softmax.add(block, threads=1, worker=2)
    with pytest.raises(ValueError, match="threads: got 2, expected a number from 1 to 1"):
        softmax.add(block, threads=2, worker=1)
    with pytest.raises(ValueError, match="workers: got 0"):
        _cpu.OnlineSoftmax(rows=4, vocabulary=8, targets=targets.data_ptr(), workers=0)


@pytest.mark.parametrize("name", LOSSES)
def test_a_thread_that_is_put_aside_does_not_hold_up_the_other(name, monkeypatch):
    p = draw_problem(600, 32, 5000, dtype=torch.float32, ignored=0.0)
    product, lock, others = torch.mm, threading.Lock(), threading.Event()
    aside = []
    count = 0

    def mm(*args, **how):
        nonlocal count
        here = threading.get_ident()
        with lock:
            first = not aside
            if first:
                aside.append(here)
            count += here != aside[0]
            if count == 6:  # three other parts, two blocks each
                others.set()
        if first:
            assert others.wait(WAIT), f"the other thread made {count} products meanwhile"
        return product(*args, **how)

    monkeypatch.setattr(torch, "mm", mm)
    LOSSES[name](p, backend="cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_the_same_numbers_whoever_is_put_aside(name, dtype, seed, monkeypatch):
    p = draw_problem(600, 32, 5000, dtype=dtype, bias=True)
    draw, product = random.Random(seed), torch.mm

    def mm(*args, **how):
        time.sleep(draw.choice([0, 0, 2e-3]))
        return product(*args, **how)

    monkeypatch.setattr(torch, "mm", mm)
    results = []
    for threads in (1, 2, 2, 2):
        torch.set_num_threads(threads)
        copy = p.copy()
        loss = LOSSES[name](copy, backend="cpu", max_buffer_bytes=2**22)
        loss.backward()
        results.append([loss.detach(), *(g for g in copy.grads().values() if g is not None)])
    alone, *teams = results
    for team in teams:
        for got, first, expected in zip(team, teams[0], alone, strict=True):
            assert torch.equal(got, first)
            assert error_of(got, expected) < (1e-2 if dtype == torch.bfloat16 else 1e-3)


@pytest.mark.slow
def test_busy_neighbours_slow_us_down_as_much_as_eager():
    torch.set_num_threads(max(2, torch.get_num_threads()))
    p = draw_problem(2048, 576, 16_384, dtype=torch.float32, ignored=0.0, scale=6.0)

    def eager():
        return torch.nn.functional.cross_entropy(p.hidden @ p.weight.T, p.target)

    losses = {
        "eager": eager,
        "sampled": lambda: LOSSES["sampled"](p, backend="cpu"),
        "exact": lambda: cross_entropy(p, backend="cpu"),
    }

    def seconds(neighbours):
        taken = {name: [] for name in losses}
        with ExitStack() as stack:
            for _ in range(neighbours):
                busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
                stack.callback(busy.wait)
                stack.callback(busy.kill)
            for turn in range(6):
                for name, loss in losses.items():
                    p.hidden.grad = p.weight.grad = None
                    start = time.perf_counter()
                    loss().backward()
                    if turn > 0:
                        taken[name].append(time.perf_counter() - start)
        return {name: statistics.median(times) for name, times in taken.items()}

    quiet = seconds(0)
    for neighbours in (1, 2):
        busy = seconds(neighbours)
        slower = {name: busy[name] / quiet[name] for name in losses}
        print(neighbours, slower)
        assert max(slower["sampled"], slower["exact"]) < 1.3 * slower["eager"], slower
