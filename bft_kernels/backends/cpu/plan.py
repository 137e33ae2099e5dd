"""The ``cpu`` backend's block sizes. They follow from the byte budget and the caches."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

# This many columns of the vocabulary are best for the vendor's GEMM, as measured at widths from 576
# to 4096; see docs/dev/cpu.md.
CPU_BLOCK_COLUMNS = 512


def cpu_block_bytes(threads: int) -> int:
    """The bytes of the caches that a block of logits may take.

    The product writes the block and the softmax reads it, and each row belongs to the same thread
    in both. So it may take the second-level caches of all threads together.
    """
    return max(2, threads) * cpu_cache_bytes()


def cpu_cache_bytes() -> int:
    """The size of one core's second-level cache, if the system tells it, or 1 MiB."""
    try:
        one = os.sysconf("SC_LEVEL2_CACHE_SIZE")
    except (AttributeError, ValueError, OSError):  # not on this system
        one = 0
    return one if one > 0 else 2**20


# Threads that take blocks by themselves need this many rows in each. With fewer rows the product is
# slow, since each thread reads the whole block of ``weight``.
CPU_TEAM_ROWS = 128
# They work on at most this many blocks of the vocabulary at the same time.
CPU_REACH = 2

# The sampled ``dW`` gathers rows of ``hidden`` in slices of at least this many of its columns: 512
# bytes of float32, eight cache lines.
CPU_SLICE = 128


def plan_cpu_slice(rows: int, width: int, element_bytes: int, cache: int) -> int:
    """How many columns of ``hidden`` to gather from at a time.

    Args:
        rows, width: ``N`` and ``D``.
        element_bytes: bytes of an element of ``hidden``.
        cache: bytes of one core's second-level cache; see :func:`cpu_cache_bytes`.

    Returns:
        ``D`` if all rows take at most half of the cache, or if no slice would fit. Otherwise as
        many columns as fit with all rows, at least :data:`CPU_SLICE`.
    """
    if rows * width * element_bytes <= cache // 2:
        return width
    columns = cache // max(1, rows * element_bytes) // CPU_SLICE * CPU_SLICE
    return min(width, columns) or width


# A pass over ``dW`` and two over ``weight``, 16 V D bytes at 10 GB/s, take as long as the product
# of about this many rows, 2 V D flops each at 160 GFLOPS.
CPU_PASS_ROWS = 128

# The batch is cut into pieces at documents that are at least this many rows apart.
PIECE_STEP = 32


def _stretch(room: int, rows: int) -> int:
    """The factor by which a block of ``rows`` rows has more columns than one of ``room`` rows.

    It is at most 8: two passes of the softmax over 4096 floats stay in a first-level cache.
    """
    return max(1, min(8, room // max(1, rows)))


@dataclass(frozen=True)
class CpuPlan:
    """Blocks of the ``cpu`` backend: ``[rows, columns]`` float32 logits at a time."""

    rows: int
    columns: int
    whole: bool  # whether the operand's rows are copied all at once, if they have to be copied
    team: int = 1  # threads that each compute a block at the same time; 1: all share each block


def plan_cpu_blocks(
    rows: int,
    vocabulary: int,
    width: int,
    budget: int,
    *,
    widens: bool,
    copies: bool,
    products: int = 1,
    narrow_gradient: bool = False,
    block_bytes: int = 2 * 2**20,
    threads: int = 1,
) -> CpuPlan:
    """Block sizes for passes over all rows, vocabulary blocks outside and row blocks inside.

    A block of ``weight`` should stay in cache over all rows, and a block of logits from its product
    to its softmax. Both favour few columns. The products' speed and, with a gradient, the passes
    over ``dH`` favour many. If all rows make one block, it takes as many columns as the cache has
    room for, unless columns are copied.

    Threads take blocks by themselves if there are :data:`CPU_TEAM_ROWS` rows for each. Together
    their blocks are as large as one that they would share. If there are enough rows, each thread
    has two blocks, so that the others can go on when the system puts a thread aside.

    Args:
        rows, vocabulary, width: ``N``, ``V`` and ``D``.
        budget: bytes for the blocks of logits and for the copies below.
        widens: whether blocks of ``weight`` are copied to float32 first.
        copies: whether rows of ``hidden`` are copied first.
        products: how many products use a block of logits.
        narrow_gradient: whether blocks of ``dW`` are accumulated in float32, to be rounded once.
        block_bytes: bytes of the caches for one product; see :func:`cpu_block_bytes`.
        threads: how many threads may take blocks by themselves.
    """
    for team in (cpu_team(rows, threads), 1):
        elements = budget // 4
        live = CPU_REACH if team > 1 else 1
        column_copies = int(width * ((live + 0.5) * widens + (live + 1) * narrow_gradient))
        columns = min(vocabulary, CPU_BLOCK_COLUMNS * products)
        if column_copies:
            columns = max(1, min(columns, elements // 2 // column_copies))
            elements -= columns * column_copies
        whole = copies and rows * width <= elements // 2
        if whole:
            elements -= rows * width
        row_copies = 2 * width if copies and not whole else 0
        block = min(elements, block_bytes * products // 4) // team
        columns = max(1, min(columns, block - row_copies))
        room = max(1, block // (columns + row_copies))
        if not column_copies and rows > 0:  # a block of fewer rows has room for more columns
            columns = min(vocabulary, columns * _stretch(room, rows))
        if room >= min(CPU_TEAM_ROWS, columns):  # otherwise the budget is small
            break
    return CpuPlan(cpu_part(rows, room, team), columns, whole, team)


def cpu_team(rows: int, threads: int) -> int:
    """How many threads take parts of ``rows`` rows by themselves; 1 if all share each part."""
    return threads if rows >= threads * CPU_TEAM_ROWS else 1


def cpu_part(rows: int, room: int, team: int) -> int:
    """Rows of a block that has room for ``room``. Parts are even; a team has two a thread."""
    if team > 1:
        parts = max(-(-rows // room), min(2 * team, rows // CPU_TEAM_ROWS))
        room = -(-rows // parts)
    return max(1, min(rows, room))


@dataclass(frozen=True)
class CpuWeightedPlan:
    """Blocks of the weighted loss, and how many rows keep their logits after their softmax."""

    # Rows for which a block has room. A block that waits in the gradient has in_gradient
    # rows, if that is more.
    rows: int
    columns: int  # columns of a block in the first pass, for the softmax
    group: int  # how many such blocks make one of the gradient, which goes through two products
    in_gradient: int  # rows whose logits wait where ``dW`` will be written, once a call
    in_buffer: int  # rows whose logits wait in a buffer, once a piece of the batch
    whole: bool  # whether the operand's rows are copied all at once, if they have to be copied
    copies: bool  # whether columns are copied; then no block has more columns than this
    team: int = 1  # see CpuPlan

    def columns_of(self, rows: int) -> int:
        """Columns of a block in the first pass over a piece of ``rows`` rows."""
        return self.columns * (1 if self.copies else _stretch(self.team * self.rows, rows))


def plan_cpu_weighted(
    rows: int,
    vocabulary: int,
    width: int,
    budget: int,
    *,
    widens: bool,
    copies: bool,
    trains_weight: bool,
    block_bytes: int = 2 * 2**20,
    threads: int = 1,
) -> CpuWeightedPlan:
    """Plans where logits wait for the weights of their tokens.

    ``dW`` is a float32 ``[V, D]`` to which nothing is written before the weights are known. A block
    of its rows has room for ``D`` rows of logits, over the same block of columns. The rest of
    the budget holds whole rows of the other logits.

    Args:
        rows, vocabulary, width: ``N``, ``V`` and ``D``.
        budget: bytes for waiting logits outside ``dW``, one block, and copies of operands.
        widens: whether blocks of ``weight`` are copied to float32 first.
        copies: whether rows of ``hidden`` are copied first.
        trains_weight: whether there is a ``dW``.
        block_bytes: bytes of the caches for one product; see :func:`cpu_block_bytes`.
        threads: how many threads may take blocks by themselves.
    """
    in_gradient = min(rows, width) if trains_weight else 0
    elements = budget // 4
    whole = copies and rows * width <= elements // 4
    if whole:
        elements -= rows * width
        copies = False
    if copies:
        in_gradient = min(in_gradient, elements // 4 // width)
        elements -= in_gradient * width
    blocks = plan_cpu_blocks(
        rows,
        vocabulary,
        width,
        4 * elements,
        widens=widens,
        copies=copies,
        products=3,
        block_bytes=block_bytes,
        threads=threads,
    )
    team = blocks.team
    block_columns = blocks.columns
    widened = int(((CPU_REACH if team > 1 else 1) + 0.5) * width * widens)  # of a column
    if in_gradient:  # a block of them is read before dW is written
        block_columns = min(block_columns, elements // 2 // in_gradient)
    if in_gradient > blocks.rows:  # it is in memory with the threads' own blocks
        own = team * blocks.rows if team > 1 else 0
        block_columns = min(
            block_columns, (elements - 2 * width * copies * own) // (in_gradient + own + widened)
        )
    block_columns = max(1, block_columns)
    group = min(3, block_columns)
    columns = block_columns // group
    block_columns = group * columns
    elements -= block_columns * widened
    block = blocks.rows * (block_columns + 2 * width * copies)
    waiting = in_gradient * block_columns if in_gradient > blocks.rows else 0
    elements -= max(block, waiting) if team == 1 else team * block + waiting
    in_buffer = min(rows, max(0, elements // (vocabulary + 2 * width)))
    return CpuWeightedPlan(blocks.rows, columns, group, in_gradient, in_buffer, whole, widens, team)


def plan_cpu_pieces(bounds: Sequence[int], plan: CpuWeightedPlan) -> list[int]:
    """Chooses which documents to take together, so that the least time is lost.

    A piece costs the rows whose logits cannot wait, since they are computed again. Each piece but
    the first also costs ``CPU_PASS_ROWS`` rows. The first piece has the room in ``dW`` too.

    Args:
        bounds: where documents begin and end, in rows; ascending, from 0.
        plan: the plan of the call.

    Returns:
        Places in ``bounds`` where pieces begin and end: from 0 to its last.
    """
    if len(bounds) < 2:
        return []
    if plan.in_buffer <= CPU_PASS_ROWS:  # a piece never saves what it costs
        return [0, len(bounds) - 1]
    places = [0]
    for place, bound in enumerate(bounds[:-1]):
        if bound - bounds[places[-1]] >= PIECE_STEP:
            places.append(place)
    places.append(len(bounds) - 1)
    first_room = plan.in_gradient + plan.in_buffer
    # For each place: the cost of the best pieces up to it, and where the last of them begins.
    cost, before = [0], [0]
    for i, place in enumerate(places[1:], start=1):
        best, begin = max(0, bounds[place] - first_room), 0
        for j in range(i - 1, 0, -1):
            again = max(0, bounds[place] - bounds[places[j]] - plan.in_buffer)
            if again >= best:  # a piece that begins further back costs even more
                break
            if cost[j] + CPU_PASS_ROWS + again < best:
                best, begin = cost[j] + CPU_PASS_ROWS + again, j
        cost.append(best)
        before.append(begin)
    cuts = [len(places) - 1]
    while cuts[-1] > 0:
        cuts.append(before[cuts[-1]])
    return [places[cut] for cut in reversed(cuts)]
