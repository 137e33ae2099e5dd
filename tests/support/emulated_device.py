"""What stands for a GPU and the compiled module under the ``cuda`` backend."""

import weakref
from functools import partial


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

    def __init__(self, module, seed):
        self.module, self.seed = module, seed
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
        self.launches.append(name)
        given = [arguments, *(self.arrays.get(x, {}) for x in arguments.values())]
        known, unwritten = [], []
        for key, x in (item for some in given for item in some.items()):
            if isinstance(x, Address) and x:
                assert x.tensor() is not None, f"{key}: the tensor is gone before the launch"
                read = not x.writable or is_read(name, key, arguments)
                (known if read else unwritten).append((int(x), x.bytes, x.writable, key))
        # Another order of blocks and threads each time.
        how = {"seed": self.seed + len(self.launches)} | self.how
        with (
            self.module.memory(merge(known), **how),
            self.module.memory(unwritten, **how | {"unwritten": True}),
        ):
            getattr(self.module, name)(**arguments)


def is_read(launch, key, arguments):
    """Whether a launch may read what an argument that it writes to already holds."""
    return (
        key in ("logits_ptr", "grad_bias_ptr", "x_ptr")
        or (launch, key) in (("thin_rows", "mask_ptr"), ("gradient_rows", "dy_ptr"))
        or (key == "grad_weight_ptr" and arguments["adds"])
        or (key == "sums_ptr" and arguments.get("first_column", 0) > 0)
    )


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
