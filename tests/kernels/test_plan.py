"""Block sizes: they fit the budget, and stay of a useful shape when it is small."""

from itertools import accumulate, combinations, pairwise

import pytest

pytest.importorskip("hypothesis", reason="hypothesis is not installed")

from hypothesis import example, given
from hypothesis import strategies as st

from bft_kernels.backends.common.chunked import plan_rows
from bft_kernels.backends.cpu.plan import (
    CPU_PASS_ROWS,
    CPU_REACH,
    CPU_SLICE,
    CPU_TEAM_ROWS,
    PIECE_STEP,
    CpuWeightedPlan,
    cpu_part,
    cpu_team,
    plan_cpu_blocks,
    plan_cpu_pieces,
    plan_cpu_slice,
    plan_cpu_weighted,
)
from bft_kernels.backends.torch.backward import plan_columns
from bft_kernels.backends.torch.rows import Tiles

sizes = st.integers(1, 20_000)
budgets = st.integers(1, 2**28)
threads = st.sampled_from([1, 2, 3, 16])


@given(sizes, sizes, sizes, budgets, st.booleans(), st.integers(1, 5), st.booleans())
def test_row_blocks(rows, vocabulary, width, budget, widen, scratch, on_cpu):
    tiles = Tiles.of(rows, vocabulary, 4, scratch, on_cpu=on_cpu)
    for reserve in (tiles.reserve, lambda _: 0):
        plan = plan_rows(rows, vocabulary, width, 4, budget, widen=widen, reserve=reserve)
        assert 1 <= plan.chunk_rows <= rows
        assert 1 <= plan.weight_rows <= vocabulary
        taken = plan.chunk_rows * vocabulary * 4 + plan.reserved
        assert plan.chunk_rows == 1 or taken <= budget
        if plan.reserved:
            assert 1 <= tiles.rows(plan) <= plan.chunk_rows


@given(sizes, sizes, sizes, budgets, st.booleans(), st.integers(0, 2))
def test_column_blocks(rows, vocabulary, width, budget, copies, scratch):
    plan = plan_columns(rows, vocabulary, width, 4, budget, copies=copies, scratch=scratch)
    assert 1 <= plan.rows <= rows
    assert 1 <= plan.columns <= vocabulary
    taken = (1 + scratch) * plan.rows * plan.columns + 2 * width * plan.columns
    taken += width * plan.rows * copies
    assert plan.columns == 1 or plan.rows == 1 or taken * 4 <= budget


@pytest.mark.parametrize(
    ("width", "budget"), [(2048, 2**23), (4096, 2**24), (16384, 2**26), (4096, 2**20)]
)
def test_wide_rows_still_get_blocks_of_many_rows(width, budget):
    plan = plan_columns(4096, 100_000, width, 4, budget, copies=False, scratch=0)
    assert plan.rows >= min(plan.columns, 32), plan


@given(sizes, sizes, sizes, budgets, st.booleans(), st.booleans(), st.booleans(), threads)
def test_cpu_blocks(rows, vocabulary, width, budget, widens, copies, narrow, threads):
    how = {"widens": widens, "copies": copies, "products": 3, "narrow_gradient": narrow}
    plan = plan_cpu_blocks(rows, vocabulary, width, budget, threads=threads, **how)
    assert plan.team in (1, threads)
    assert 1 <= plan.rows <= rows
    assert 1 <= plan.columns <= vocabulary
    assert copies or not plan.whole
    live = CPU_REACH if plan.team > 1 else 1
    copied = int(width * ((live + 0.5) * widens + (live + 1) * narrow))
    taken = plan.team * plan.rows * plan.columns + copied * plan.columns
    if copies:
        taken += rows * width if plan.whole else 2 * width * plan.rows * plan.team
    assert plan.columns == 1 or plan.rows == 1 or taken * 4 <= budget


@given(sizes, sizes, sizes, budgets, st.booleans(), st.booleans(), st.booleans(), threads)
@example(256, 3, 87, 5208, True, False, True, 2)  # rows wait in dW beside the threads' blocks
def test_cpu_weighted(rows, vocabulary, width, budget, widens, copies, trains, threads):
    how = {"widens": widens, "copies": copies, "trains_weight": trains, "threads": threads}
    plan = plan_cpu_weighted(rows, vocabulary, width, budget, **how)
    assert 1 <= plan.rows <= rows
    columns = plan.columns * plan.group
    assert 1 <= plan.columns <= columns <= vocabulary
    assert 0 <= plan.in_gradient <= (min(rows, width) if trains else 0)
    assert 0 <= plan.in_buffer <= rows
    block_rows = max(plan.rows, plan.in_gradient)
    if plan.team > 1:
        block_rows = plan.team * plan.rows
        block_rows += plan.in_gradient if plan.in_gradient > plan.rows else 0
    taken = block_rows * columns + plan.in_buffer * vocabulary
    assert copies or not plan.whole
    taken += copies * width * (rows if plan.whole else plan.in_gradient + plan.in_buffer)
    live = CPU_REACH if plan.team > 1 else 1
    taken += columns * int((live + 0.5) * width * widens)
    assert columns == 1 or plan.rows == 1 or taken * 4 <= budget
    for piece in (1, rows // 7 + 1, rows):
        wide = plan.columns_of(piece)
        assert wide % plan.columns == 0
        assert wide == plan.columns or wide * piece <= plan.team * plan.columns * plan.rows
        assert wide == plan.columns or not widens


@given(sizes, sizes, st.sampled_from([2, 4]), st.integers(2**14, 2**24))
def test_cpu_slice(rows, width, element_bytes, cache):
    columns = plan_cpu_slice(rows, width, element_bytes, cache)
    assert 1 <= columns <= width
    if columns < width:
        assert columns % CPU_SLICE == 0
        assert rows * columns * element_bytes <= cache < 2 * rows * width * element_bytes


def shape_of(rows, **how):
    """Of cpu blocks: threads, rows and columns."""
    how = {"widens": False, "copies": False, **how}
    plan = plan_cpu_blocks(rows, 10**5, 576, 2**26, **how)
    return plan.team, plan.rows, plan.columns


def test_a_block_of_few_rows_has_many_columns():
    how = {"block_bytes": 2**22}
    assert shape_of(2048, **how) == shape_of(5000, **how) == (1, 2048, 512)
    assert shape_of(512, **how) == (1, 512, 2048)
    assert shape_of(3, **how) == (1, 3, 4096)
    assert shape_of(512, widens=True, **how)[2] == 512, "a widened block should stay in cache"
    assert shape_of(0, **how)[1] == 1


@given(st.integers(1, 20_000), st.integers(1, 4096), threads)
def test_every_thread_of_a_team_has_a_part_of_rows_enough(rows, room, threads):
    team = cpu_team(rows, threads)
    assert team in (1, threads)
    part = cpu_part(rows, room, team)
    assert 1 <= part <= min(rows, room)
    if team > 1 and room >= CPU_TEAM_ROWS:
        assert part >= CPU_TEAM_ROWS // 2
        assert -(-rows // part) >= team
    else:
        assert team > 1 or part == min(rows, room)


def test_two_threads_have_parts_to_choose_from():
    assert shape_of(2048, threads=2) == (2, 512, 512)
    assert shape_of(1024, threads=2) == (2, 256, 512)
    assert shape_of(256, threads=2) == (2, 128, 1024)
    assert shape_of(255, threads=2) == (1, 255, 2048)
    assert shape_of(2048, threads=1)[:2] == (1, 1024)


def cost_of(bounds, cuts, plan):
    """Rows computed again, and what the passes of further pieces are worth in rows."""
    room = plan.in_gradient + plan.in_buffer
    cost = 0
    for number, (first, stop) in enumerate(pairwise(cuts)):
        cost += max(0, bounds[stop] - bounds[first] - room) + CPU_PASS_ROWS * (number > 0)
        room = plan.in_buffer
    return cost


@given(
    st.lists(st.integers(1, 700), min_size=1, max_size=9), st.integers(0, 600), st.integers(0, 600)
)
def test_no_other_pieces_are_cheaper(lengths, in_gradient, in_buffer):
    plan = CpuWeightedPlan(1, 1, 1, in_gradient, in_buffer, whole=False, copies=False)
    lengths = [length + PIECE_STEP for length in lengths]
    bounds = [0, *accumulate(lengths)]
    cuts = plan_cpu_pieces(bounds, plan)
    assert cuts[0] == 0
    assert cuts[-1] == len(lengths)
    assert cuts == sorted(set(cuts))
    inner = range(1, len(lengths))
    least = min(
        cost_of(bounds, [0, *chosen, len(lengths)], plan)
        for number in range(len(lengths))
        for chosen in combinations(inner, number)
    )
    assert cost_of(bounds, cuts, plan) == least


def test_pieces_are_worth_their_passes_or_not_made():
    plan = CpuWeightedPlan(1, 1, 1, in_gradient=500, in_buffer=300, whole=False, copies=False)
    assert plan_cpu_pieces([0, 800, 900], plan) == [0, 2], "100 rows again, or a pass"
    assert plan_cpu_pieces([0, 800, 1100], plan) == [0, 1, 2]
    assert plan_cpu_pieces([0, 100, 2100], plan) == [0, 2], "a long document: the room in dW"
    assert plan_cpu_pieces([0, 800, 960, 1120], plan) == [0, 1, 3], "20 rows again, or a pass"
    assert plan_cpu_pieces([0], plan) == []
    assert plan_cpu_pieces([*range(16_385)], plan)[-1] == 16_384


def test_tiles_of_a_gpu_are_few():
    """A launch costs microseconds: tiles of two rows made 4,096 of them, 35 launches each."""
    tiles = Tiles.of(8192, 131_072, 4, 2, on_cpu=False)
    sizes = 8192, 131_072, 4096, 4, 528 * 2**20
    plan = plan_rows(*sizes, widen=False, reserve=tiles.reserve)
    assert -(-plan.chunk_rows // tiles.rows(plan)) * -(-8192 // plan.chunk_rows) <= 32
    assert (plan.chunk_rows + 2 * tiles.rows(plan)) * 131_072 * 4 <= 528 * 2**20
