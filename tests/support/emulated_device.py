"""The emulated device: a problem on it, its kernels, and what stands for it in a backend."""

import math
import weakref
from dataclasses import replace
from functools import partial
from itertools import chain

import torch

from tests.support.problems import DTYPES

IGNORED = -100
TYPE_NUMBERS = {dtype: number for number, dtype in enumerate(DTYPES)}
UNTOUCHED = 0x55


def spread_out(x, pad):
    """The same values in rows with NaN before and behind them: aligned if `pad` is."""
    width = x.shape[1]
    wide = torch.nn.functional.pad(x.detach(), (pad, pad + -width % 8), value=math.nan)
    return wide[:, pad : pad + width]


def strided(p, pad):
    """A problem whose operands' rows do not lie together."""
    return replace(p, hidden=spread_out(p.hidden, pad), weight=spread_out(p.weight, pad))


def check_same(first, *others):
    """Results are the same to the bit, NaN for NaN."""
    for other in others:
        for name, value in first.items():
            assert torch.equal(value.nan_to_num(7.0), other[name].nan_to_num(7.0)), name


class Device:
    """A problem as kernels are given it, and calls that may touch nothing beside what they name."""

    def __init__(self, cuda, p, *, softcap=None, temperature=1.0, order_seed=0, strict=False):
        self.cuda, self.order_seed, self.strict = cuda, order_seed, strict
        self.hidden, self.weight = p.hidden.detach(), p.weight.detach()
        self.shape = (*self.hidden.shape, len(self.weight))
        labelled = p.target != IGNORED
        order = torch.sort(labelled.to(torch.uint8), descending=True, stable=True).indices
        self.arrays = {
            "hidden": self.hidden,
            "weight": self.weight,
            "bias": None if p.bias is None else p.bias.detach().float(),
            "target": p.target,
            "order": order,
            "count": labelled.sum().reshape(1),
        }
        self.rows = order[: int(labelled.sum())]
        self.problem = cuda.Problem(
            **{f"{name}_ptr": address(x) for name, x in self.arrays.items()},
            **dict(zip("NDV", self.shape, strict=True)),
            stride_hn=self.hidden.stride(0),
            stride_wv=self.weight.stride(0),
            dtype=TYPE_NUMBERS[self.hidden.dtype],
            softcap=softcap or 0.0,
            temperature=temperature,
        )

    def call(self, name, reads, writes, *, of_problem=True, reads_outputs=False, **numbers):
        """Runs a kernel, which may not read what nobody has written but with `reads_outputs`."""
        given = reads | writes
        listed = given | (self.arrays if of_problem else {})
        ranges = [
            (x.untyped_storage().data_ptr(), x.untyped_storage().nbytes(), key in writes, key)
            for key, x in listed.items()
            if x is not None and x.numel()
        ]
        numbers |= {f"{key}_ptr": address(x) for key, x in given.items()}
        numbers |= {"problem": self.problem} if of_problem else {}
        order = {"seed": self.order_seed, "strict": self.strict, "unwritten": not reads_outputs}
        with self.cuda.memory(ranges, **order):
            getattr(self.cuda, name)(**numbers, stream=0)

    def count(self, mask, first, counts):
        where = {"first_row": first, "rows": len(mask)}
        self.call("count_entries", {"mask": mask}, {"counts": counts}, **where)

    def list(self, mask, first, offsets, columns):
        where = {"first_row": first, "rows": len(mask), "capacity": len(columns)}
        reads = {"mask": mask, "offsets": offsets}
        self.call("list_entries", reads, {"columns": columns}, **where)

    def spmm_hidden(self, known, eps, offsets, columns, *wanted, values=None):
        """What is wanted of hidden, and of keys and packed as entries."""
        (count, width, vocabulary), capacity = self.shape, len(columns)
        out = {}
        if "hidden" in wanted:
            out["grad_hidden"] = torch.full((count, width), math.nan).to(self.hidden.dtype)
        if "entries" in wanted:
            out["keys"] = torch.full((capacity,), vocabulary, dtype=torch.int32)
            out["packed"] = torch.full((capacity,), UNTOUCHED)
        reads = {**known, "offsets": offsets, "columns": columns, "values": values}
        self.call("spmm_hidden", reads, dict(out), eps=eps, capacity=capacity)
        return out

    def sort(self, keys, packed):
        """Keys and packed words by key, and starts [V + 1]."""
        sizes = {"E": len(keys), "V": self.shape[2]}
        out = {
            "sorted_keys": torch.full_like(keys, -1),
            "sorted_packed": torch.full_like(packed, -1),
        }
        temporary = torch.zeros(self.cuda.sort_bytes(*sizes.values()), dtype=torch.uint8)
        self.call(
            "sort_entries",
            {"keys": keys, "packed": packed},
            {**out, "temporary": temporary},
            of_problem=False,
            temporary_bytes=len(temporary),
            **sizes,
        )
        starts = torch.full((self.shape[2] + 1,), -1)
        reads = {"sorted_keys": out["sorted_keys"]}
        self.call("column_starts", reads, {"starts": starts}, of_problem=False, **sizes)
        return out["sorted_keys"], out["sorted_packed"], starts

    def spmm_weight(self, starts, packed, weight, bias=None, adds=False):
        self.call(
            "spmm_weight",
            {"starts": starts, "packed": packed},
            {"grad_weight": weight, "grad_bias": bias},
            reads_outputs=adds or bias is not None,
            stride_gv=0 if weight is None else weight.stride(0),
            is_float32=weight is not None and weight.dtype != self.hidden.dtype,
            adds=adds,
        )


def address(x):
    return 0 if x is None else x.data_ptr()


class Address(int):
    """Stands for ``native.address``: a number that knows its tensor, and does not keep it alive."""

    def __new__(cls, x, *, writable):
        self = super().__new__(cls, 0 if x is None or x.numel() == 0 else x.data_ptr())
        if self:
            last = sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
            self.bytes = (last + 1) * x.itemsize
            self.tensor, self.writable = weakref.ref(x), writable
        return self


class Emulation:
    """Stands for ``bft_kernels._cuda``: what the ``cuda`` backend launches runs in the emulation,
    one launch at a time, and may touch its own arguments only.
    """

    def __init__(self, module):
        self.module = module
        self.launches = []
        self.how = {}  # arguments of `memory`
        self.arrays = {}  # by what was made of them

    def __getattr__(self, name):
        value = getattr(self.module, name)
        if isinstance(value, type):
            return partial(self.make, value)
        is_launch = "stream" in (getattr(value, "__doc__", None) or "")
        return partial(self.launch, name) if is_launch else value

    def make(self, kind, **arguments):
        """A problem, or the like."""
        made = kind(**arguments)
        self.arrays[made] = arguments
        return made

    def launch(self, name, **arguments):
        given = [arguments, *(self.arrays.get(x, {}) for x in arguments.values())]
        ranges = chain.from_iterable(map(byte_ranges, given))
        self.launches.append(name)
        # Another order of blocks and threads each time.
        with self.module.memory(merge(ranges), **({"seed": len(self.launches)} | self.how)):
            getattr(self.module, name)(**arguments)


def byte_ranges(arguments):
    """Address, bytes, whether it is writable, name: to the last element of each tensor."""
    for name, x in arguments.items():
        if isinstance(x, Address) and x:
            assert x.tensor() is not None, f"{name}: the tensor is gone before the launch"
            yield int(x), x.bytes, x.writable, name


def merge(ranges):
    """Ranges that share bytes as one."""
    merged = []
    for address, size, writable, name in sorted(ranges):
        if merged and address < merged[-1][0] + merged[-1][1]:
            first, before, also, other = merged[-1]
            size = max(before, address + size - first)
            merged[-1] = first, size, writable or also, f"{other}, {name}"
        else:
            merged.append((address, size, writable, name))
    return merged
