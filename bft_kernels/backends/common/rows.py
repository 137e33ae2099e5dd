"""The rows of the input that carry a label, and the values that are known for each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bft_kernels.problem import Problem, storage
from bft_kernels.results import Forward


def count_is_known(device_type: str) -> bool:
    """Whether the host can count rows without waiting for the device."""
    return device_type == "cpu"


class LabelledRows:
    """The rows that carry a label.

    On a CPU ignored rows are dropped, so they cost nothing. On an accelerator the host would have
    to wait for the device to learn their number. There they stay, as rows of zeros whose results
    are masked.

    Attributes:
        size: rows that are computed.
        labelled, ignored: ``[N]`` bool; ``ignored`` exists only if rows are masked.
        copies: whether :meth:`take` copies rows; otherwise it gives a view.
    """

    def __init__(self, target: Tensor, ignore_index: int) -> None:
        self.labelled = target != ignore_index
        self.index: Tensor | None = None
        self.masked = not count_is_known(target.device.type)
        if self.masked:
            self.ignored = ~self.labelled
        else:
            index = self.labelled.nonzero().squeeze(1)
            if index.numel() < target.numel():
                self.index = index
        self.size = target.numel() if self.index is None else self.index.numel()
        self.total = target.numel()
        self.copies = self.masked or self.index is not None

    def positions(self, first: int, stop: int) -> Tensor:
        """Positions in the flattened input, int64."""
        if self.index is None:
            return torch.arange(first, stop, dtype=torch.int64, device=self.labelled.device)
        return self.index[first:stop]

    def live(self, first: int, stop: int) -> Tensor:
        """``[stop - first]`` bool: which of these rows carry a label."""
        index = self.index
        return self.labelled[first:stop] if index is None else self.labelled[index[first:stop]]

    def take(self, values: Tensor, first: int, stop: int) -> Tensor:
        """``values[rows[first:stop]]`` of ``values [N, ...]``; ignored rows become zeros."""
        if self.index is not None:
            return values[self.index[first:stop]]
        part = values[first:stop]
        return part.masked_fill(self._ignored(part, first, stop), 0) if self.masked else part

    def _ignored(self, values: Tensor, first: int, stop: int) -> Tensor:
        """The mask of the ignored rows of ``values [stop - first, ...]``."""
        return self.ignored[first:stop].view(-1, *[1] * (values.dim() - 1))

    def spread(self, values: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """``[size, ...] -> [N, ...]``, with zeros for ignored rows; in place if both are equal."""
        values = values if dtype is None else values.to(dtype)
        if self.index is not None:
            full = values.new_zeros(self.total, *values.shape[1:])
            return full.index_copy_(0, self.index, values)
        if self.masked:
            values.masked_fill_(self._ignored(values, 0, self.total), 0)
        return values


@dataclass(frozen=True)
class DeviceRows:
    """The labelled rows, in order, and their number. Only the device knows them.

    A host that counted them would wait for the device. So labelled rows are listed first, their
    number stays on the device, and programs whose rows lie past it return at once.
    """

    order: Tensor  # [N] int64, positions of the labelled rows, then the last position, repeated
    count: Tensor  # [1] int64
    labelled: Tensor  # [N] bool
    through: Tensor  # [N] int64, labelled rows up to and with each position

    @property
    def size(self) -> int:
        """Rows that may have to be computed: ``N``."""
        return self.order.numel()

    def take(self, values: Tensor, first: int, stop: int) -> Tensor:
        """``values[order[first:stop]]`` of ``values [N, ...]``."""
        return values[self.order[first:stop]]

    @staticmethod
    def of(target: Tensor, ignore_index: int) -> DeviceRows:
        return DeviceRows.chosen(target != ignore_index)

    def spread(self, values: Tensor) -> Tensor:
        """The first ``count`` of ``values [N]``, at the positions of the labelled rows; else 0."""
        return self.mask(values[(self.through - 1).clamp_(min=0)])

    @staticmethod
    def chosen(among: Tensor) -> DeviceRows:
        """The rows where ``among [N]`` is true, instead of the labelled ones."""
        through = among.cumsum(0)
        places = torch.arange(among.numel(), dtype=torch.int64, device=among.device)
        # Row k is at the first position up to which there are more than k such rows.
        order = torch.searchsorted(through, places, right=True).clamp_(max=max(0, len(places) - 1))
        count = through[-1:] if len(places) else places.new_zeros(1)
        return DeviceRows(order, count, among, through)

    def mask(self, values: Tensor) -> Tensor:
        """``values [N, ...]``, with 0 for ignored rows."""
        ignored = (~self.labelled).view(-1, *[1] * (values.dim() - 1))
        return values.masked_fill(ignored, 0)


# The results that every kernel writes for a row, by the names of `Forward`.
ROW_RESULTS = ("loss", "nll", "lse", "lse_low", "entropy", "correct")


def wanted_results(problem: Problem) -> dict[str, bool]:
    """Whether a call wants each result of a row, by the names of `Forward`."""
    settings = problem.settings
    statistics = settings.return_stats
    return {
        "loss": True,
        "nll": True,
        "lse": True,
        "lse_low": problem.saved in ("recompute", "unit"),
        "entropy": statistics,
        "correct": statistics,
        "variance": statistics and settings.gradient == "sampled",
        "hidden_variance": statistics and settings.hidden_variance,
    }


def row_results(problem: Problem, size: int, *, filled: bool = False) -> dict[str, Tensor]:
    """The results of rows, ``[size]`` each, or ``[0]`` if not wanted.

    They hold zeros if ``filled``, else anything.
    """
    make = problem.hidden.new_zeros if filled else problem.hidden.new_empty
    acc = problem.acc_dtype
    return {
        name: make(size * want, dtype=torch.bool if name == "correct" else acc)
        for name, want in wanted_results(problem).items()
    }


def by_position(
    problem: Problem, rows: LabelledRows, results: dict[str, Tensor], names: tuple[str, ...]
) -> dict[str, Tensor]:
    """The named results of ``rows``, ``[N]``; those that are not wanted stay ``[0]``."""
    wanted = wanted_results(problem)
    return {name: rows.spread(results[name]) if wanted[name] else results[name] for name in names}


def packed(
    problem: Problem,
    results: dict[str, Tensor],  # of rows; see row_results
    unit: Tensor | None = None,  # [size, D], dH of the rows for unit upstream gradient
    lists: dict[str, Tensor] | None = None,  # of the sample, by the names of `Forward`
    rows: LabelledRows | None = None,  # None where the results lie by position already
) -> Forward:
    """What a forward returns, over all ``N`` rows."""
    new, dtype = problem.hidden.new_empty, storage(problem.hidden.dtype)
    names = tuple(wanted_results(problem))
    if rows is not None:
        results = by_position(problem, rows, results, names)
        unit = None if unit is None else rows.spread(unit, dtype)
    if problem.saved == "unit":  # the gradient that needed it exists already
        results = results | {"lse_low": new(0, dtype=problem.acc_dtype)}
    lists = lists or {
        "csr_offsets": new(0, dtype=torch.int64),
        "csr_columns": new(0, dtype=torch.int32),
        "csr_values": new(0, dtype=problem.acc_dtype),
    }
    unit = new((0, problem.shape[2]), dtype=dtype) if unit is None else unit
    return Forward(**{name: results[name] for name in names}, unit=unit, **lists)


class KnownRows(NamedTuple):
    """The values of each row that a recomputing backward knows, ``[N]`` float32 each."""

    lse: Tensor
    lse_low: Tensor  # or [0]
    nll: Tensor
    grad: Tensor  # upstream, 0 where ignored
