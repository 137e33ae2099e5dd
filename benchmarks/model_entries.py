"""Which entries the sampled gradient keeps of real distributions, and how often a cache has them.

Measured on a CPU with the project's own draws, in the order in which the GPU's programs would fetch
rows: an input of ``python -m benchmarks model``, which measures nothing else.
"""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.results.environment import environment
from benchmarks.shapes import Recorded, make_problem
from bft_kernels.backends.gpu.floor import POPULAR
from bft_kernels.backends.torch.sampling import row_keys, scaled_uniforms

KEPT = Path(__file__).with_name("kept_entries.json")
EPS = (2**-8, 2**-10, 2**-12)
# What the kernels do at N 8192, D 4096 on 132 multiprocessors: columns of a tile, gathered rows a
# program holds, programs that run at once, and the columns that take a dense product; more of them
# could.
TILE, AT_ONCE, RESIDENT, DENSE, DENSER = 128, 8, 132, 256, 2048
# Parts of the vocabulary in the tiled forward, whose sums each begin at its first column.
SPLITS = 9
# Rows of 8 KiB that the second-level caches of A100, H100 and B200 have room for, and half of
# the second.
CAPACITIES = (3051, 4882, 6103, 15380)
SLACK = 1.001  # that the kernel leaves its bound
SEED = 20


@dataclass(frozen=True)
class Kept:
    """Entries of one model's text at one ``eps``, a token unless said otherwise."""

    model: str
    vocabulary: int
    tokens: int
    eps: float
    entries: float  # kept, the target's included
    # Not known to go while lse is not known yet: in the tiled forward's SPLITS by the target's
    # logit, or the sum so far if that is more; by the sum over popular columns too.
    listed: float
    listed_popular: float
    candidates: float  # by the popular columns and the target alone, as chunks do
    distinct: int  # columns that some token keeps
    growth: float  # d log(distinct) / d log(tokens), from half of the tokens to all
    common: dict[int, float]  # share of the entries in so many of the commonest columns
    # Hit rate of fetching rows of ``weight``, by rows the cache has room for.
    hits_kept: dict[int, float]
    hits_rare: dict[int, float]  # of what is kept, without the DENSER commonest columns
    hits_listed: dict[int, float]  # as the tiled forward lists them
    commit: str

    def distinct_at(self, tokens: int) -> float:
        """Columns kept by some of ``tokens`` tokens, along the line through the measured two."""
        return float(min(self.vocabulary, self.distinct * (tokens / self.tokens) ** self.growth))

    def hits_at(self, rows: float, *, listed: bool, rare: bool = False) -> float:
        """Hit rate of a cache for ``rows`` rows of ``weight``: that of the next smaller one."""
        hits = self.hits_listed if listed else self.hits_rare if rare else self.hits_kept
        fitting = [capacity for capacity in hits if capacity <= rows]
        return hits[max(fitting)] if fitting else 0.0


def measure(path: Path, tokens: int, block: int = 128) -> list[Kept]:
    """Entries of the first ``tokens`` recorded tokens, for every ``eps`` of ``EPS``."""
    problem = make_problem(Recorded(path, tokens), torch.float32, "cpu")
    hidden, weight = problem.hidden.detach(), problem.weight.detach()
    tokens = hidden.shape[0]
    columns = torch.arange(weight.shape[0], dtype=torch.int32)
    seed = torch.tensor(SEED)
    kept: dict[float, list[Tensor]] = {eps: [] for eps in EPS}
    listed: dict[float, list[Tensor]] = {eps: [] for eps in EPS}
    lengths = {(eps, name): 0 for eps in EPS for name in ("own", "popular", "chunks")}
    popular = popular_of(problem.target[:tokens])
    for first in tqdm(range(0, tokens, block), path.stem, unit="block"):
        rows = torch.arange(first, min(first + block, tokens))
        z = hidden[rows] @ weight.T
        target = problem.target[rows]
        e = in_tiles(z.sub_(z.amax(1, keepdim=True)).exp_(), 0.0)
        draws = in_tiles(scaled_uniforms(*row_keys(seed, rows), columns, 1.0), math.inf)
        upper = (draws * 2**16).floor_() / 2**16  # the bits that the backend lets through by
        own = e.flatten(1).gather(1, target[:, None])
        floor = torch.maximum(own, e.flatten(1)[:, popular].sum(1, keepdim=True))
        bounds = {
            "kept": e.sum((1, 2))[:, None],  # the sum itself
            "own": lower_bounds(e, own, SPLITS) / SLACK,
            "popular": lower_bounds(e, floor, SPLITS) / SLACK,
            "chunks": floor / SLACK,
        }
        for eps in EPS:
            for name, bound in bounds.items():
                least = eps * bound[:, :, None]
                chosen = draws * least < e if name == "kept" else upper * least <= e
                chosen = chosen.flatten(1)
                chosen.scatter_(1, target[:, None], True)
                if name in ("kept", "popular"):
                    found = kept[eps] if name == "kept" else listed[eps]
                    column = chosen.nonzero()[:, 1].to(torch.int32)
                    found += column.split(chosen.sum(1).tolist())
                if name != "kept":
                    lengths[eps, name] += int(chosen.sum())
    return [
        summarise(
            path.stem,
            weight.shape[0],
            eps,
            kept[eps],
            listed[eps],
            [lengths[eps, name] / tokens for name in ("own", "popular", "chunks")],
        )
        for eps in tqdm(EPS, "cache", unit="eps")
    ]


def popular_of(target: Tensor) -> Tensor:
    """Columns of up to ``POPULAR`` of the targets at even distances, each once.

    As the backend takes them, but of fewer targets where fewer tokens are recorded than a batch
    has.
    """
    few = min(POPULAR, target.numel())
    return target[torch.arange(few) * target.numel() // max(1, few)].unique()


def in_tiles(x: Tensor, fill: float, tile: int = TILE) -> Tensor:
    """``x [n, V]`` as ``[n, tiles, tile]``, the last filled up."""
    tiles = math.ceil(x.shape[1] / tile)
    x = torch.nn.functional.pad(x, (0, tiles * tile - x.shape[1]), value=fill)
    return x.view(x.shape[0], tiles, tile)


def lower_bounds(e: Tensor, floor: Tensor, splits: int) -> Tensor:
    """What a tile knows of the sum over all of ``e [n, tiles, tile]``: ``[n, tiles]``.

    The sum over the tiles before it in its part of the vocabulary, or ``floor [n, 1]``.
    """
    count, tiles, _ = e.shape
    each = math.ceil(tiles / splits)
    sums = torch.nn.functional.pad(e.sum(2), (0, splits * each - tiles))
    parts = sums.view(count, splits, each)
    before = (parts.cumsum(2) - parts).reshape(count, splits * each)[:, :tiles]
    return torch.maximum(before, floor)


def summarise(
    model: str,
    vocabulary: int,
    eps: float,
    kept: Sequence[Tensor],
    listed: Sequence[Tensor],
    lengths: Sequence[float],
) -> Kept:
    """Counts and hit rates of the columns ``kept`` and ``listed`` by each token."""
    tokens = len(kept)
    counts = torch.cat(list(kept)).bincount(minlength=vocabulary)
    half = torch.cat(list(kept[: tokens // 2])).unique().numel()
    distinct = int((counts > 0).sum())
    ranked = counts.sort(descending=True).values.cumsum(0) / counts.sum()
    rare = torch.ones(vocabulary, dtype=torch.bool)
    rare[counts.topk(min(DENSER, vocabulary // 8)).indices] = False
    return Kept(
        model=model,
        vocabulary=vocabulary,
        tokens=tokens,
        eps=eps,
        entries=float(counts.sum()) / tokens,
        listed=lengths[0],
        listed_popular=lengths[1],
        candidates=lengths[2],
        distinct=distinct,
        growth=math.log2(distinct / half),
        common={few: float(ranked[min(few, vocabulary // 8) - 1]) for few in (DENSE, DENSER)},
        hits_kept=hit_rates(kept),
        hits_rare=hit_rates([columns[rare[columns.long()]] for columns in kept]),
        hits_listed=hit_rates(listed),
        commit=str(environment("cpu")["commit"]),
    )


def hit_rates(lists: Sequence[Tensor]) -> dict[int, float]:
    """Of fetching the rows of each list, by ``CAPACITIES``."""
    rows = [columns.tolist() for columns in lists]
    return {
        capacity: hit_rate(interleaved(rows, RESIDENT, AT_ONCE), capacity)
        for capacity in CAPACITIES
    }


def interleaved(lists: Sequence[Sequence[int]], resident: int, at_once: int) -> Iterator[int]:
    """Items in the order in which ``resident`` programs, a list each, fetch ``at_once`` in turn.

    A program that ends makes room for the next list.
    """
    waiting = iter(lists)
    running: list[tuple[Sequence[int], int]] = []
    while True:
        while len(running) < resident:
            following = next(waiting, None)
            if following is None:
                break
            running.append((following, 0))
        if not running:
            return
        still = []
        for items, place in running:
            yield from items[place : place + at_once]
            if place + at_once < len(items):
                still.append((items, place + at_once))
        running = still


def hit_rate(accesses: Iterable[int], capacity: int) -> float:
    """Share of ``accesses`` that a least-recently-used cache of ``capacity`` rows has."""
    held: OrderedDict[int, None] = OrderedDict()
    hits = total = 0
    for row in accesses:
        total += 1
        if row in held:
            hits += 1
            held.move_to_end(row)
        else:
            held[row] = None
            if len(held) > capacity:
                held.popitem(last=False)
    return hits / max(1, total)


def save(found: Sequence[Kept], path: Path = KEPT) -> None:
    """Writes ``found`` in the place of what the file says of the same models."""
    models = {kept.model for kept in found}
    before = [kept for kept in load(path) if kept.model not in models] if path.exists() else []
    path.write_text(json.dumps([asdict(kept) for kept in [*before, *found]], indent=1) + "\n")


def load(path: Path = KEPT) -> list[Kept]:
    """What :func:`save` wrote."""
    found = []
    for values in json.loads(path.read_text()):
        for name in ("common", "hits_kept", "hits_rare", "hits_listed"):
            values[name] = {int(key): value for key, value in values[name].items()}
        found.append(Kept(**values))
    return found
