"""What becomes of fragments in machine code: the emulation believes the PTX ISA, and this the GPU.

Instructions are followed with a symbol for each register. ``ldmatrix`` (LDSM) fills four registers
in a row, ``mma`` (HMMA) takes the first of four and of two: no permutation may lie between.
"""

import re
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise

import pytest

Code = list[tuple[int, str]]  # addresses and texts of instructions
# A register's contents: what kind of instruction wrote it, which one (of sums the first that added
# to them), and the register's place among the four.
Symbol = tuple[str, int, int]
OTHER = ("other", 0, 0)


def instructions(sass):
    """What a disassembly holds, without predicates."""
    found = re.findall(r"/\*([0-9a-f]{4,6})\*/\s+(?:@!?U?P\w+\s+)?(.+?);", sass)
    return [(int(address, 16), text) for address, text in found]


def main_loop(code):
    """The shortest part from where a branch leads back to, up to it, that multiplies matrices."""
    back = [
        (int(match[1], 16), at) for at, x in code if (match := re.match(r"BRA.*?0x([0-9a-f]+)", x))
    ]
    loops = [[line for line in code if to <= line[0] <= at] for to, at in back if to <= at]
    products = [loop for loop in loops if any(text.startswith("HMMA") for _, text in loop)]
    return min(products, key=len)


@dataclass
class Product:
    """One HMMA: the first registers of its operands, and what was in them."""

    registers: tuple[int, ...]  # of d, a, b, c; -1 for zeros
    a: list[Symbol]
    b: list[Symbol]
    d: list[Symbol]


@dataclass
class Lane:
    """The registers of a lane, and what became of them."""

    registers: dict[int, Symbol] = field(default_factory=dict)
    products: list[Product] = field(default_factory=list)
    stored: dict[tuple[str, int], Symbol] = field(default_factory=dict)  # by base and word
    step: int = 0

    def run(self, code):
        for _, text in code:
            self.step += 1
            opcode, _, rest = text.partition(" ")
            operands = [x.strip().removesuffix(".reuse") for x in rest.split(", ")]
            if opcode.startswith("HMMA"):
                self.multiply(operands)
            elif opcode.startswith("STG"):
                self.store(operands)
            else:
                self.write(opcode, operands)

    def read(self, first, count):
        return [self.registers.get(first + i, OTHER) for i in range(count)]

    def fill(self, first, count, kind):
        for i in range(count):
            self.registers[first + i] = (kind, self.step, i)

    def multiply(self, operands):
        numbers = [-1 if x == "RZ" else int(x.removeprefix("R")) for x in operands[:4]]
        d, a, b, c = numbers
        left, right, before = self.read(a, 4), self.read(b, 2), self.read(c, 4)
        started = before[0][1] if before[0][0] == "HMMA" else self.step
        sums = [("HMMA", started, i) for i in range(4)]
        assert before[0][0] != "HMMA" or before == sums
        self.registers |= {d + i: x for i, x in enumerate(sums)}
        self.products.append(Product(tuple(numbers), left, right, sums))

    def store(self, operands):
        address = re.search(r"\[(R\d+)\.64(?:\+0x([0-9a-f]+))?\]", operands[0])
        value = re.fullmatch(r"R(\d+)", operands[1])
        if address and value:
            word = int(address[2] or "0", 16) // 4
            self.stored[address[1], word] = self.read(int(value[1]), 1)[0]

    def write(self, opcode, operands):
        target = re.fullmatch(r"R(\d+)", operands[0])
        if target is None:
            return
        first, source = int(target[1]), re.fullmatch(r"R(\d+)", operands[-1])
        if match := re.fullmatch(r"LDSM\.16\.(MT?88)\.4", opcode):
            self.fill(first, 4, match[1])
        elif re.fullmatch(r"MOV|IMAD\.MOV\.U32", opcode) and source:
            self.registers[first] = self.read(int(source[1]), 1)[0]
        else:
            wide = re.search(r"\.(?:WIDE|64|128)\b|^CS2R$", opcode)
            count = 1 if wide is None else 4 if wide[0] == ".128" else 2
            self.fill(first, count, "other")


def follow(*parts):
    lane = Lane()
    for code in parts:
        lane.run(code)
    return lane


def aligned(product):
    """Whether operands lie as the machine wants them: in groups of four, of b of two."""
    d, a, b, c = product.registers
    return d % 4 == 0 and a % 4 == 0 and b % 2 == 0 and (c == -1 or c % 4 == 0)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "sm_120"])
def test_fragments_reach_the_tensor_core_in_the_order_of_their_registers(assemble, arch):
    found = assemble("tests/cuda/emulation/programs/layouts.cu", arch).sass()
    assert len(found) == 6
    for name, code in found.items():
        across, swapped = (flag == "1" for flag in re.findall(r"Lb([01])E", name))
        dtype = r"\.BF16" if "bfloat16" in name else ""
        assert len(re.findall(rf"HMMA\.16816\.F32{dtype} ", code)) == 2, name
        lane = follow(instructions(code))
        # Two arrays of eight words: the registers as PTX numbers them.
        bases = {base for base, _ in lane.stored}
        arrays = [[lane.stored[base, word] for word in range(8)] for base in sorted(bases)]
        assert len(lane.stored) == 16, name
        sums, words = sorted(arrays, key=lambda array: array[0][0] != "HMMA")
        kind = "MT88" if across else "M88"
        for four in (words[:4], words[4:]):
            assert [(x[0], x[2]) for x in four] == [(kind, i) for i in range(4)], name
        a = [words[i] for i in ((0, 2, 1, 3) if swapped else (0, 1, 2, 3))]
        for n, product in enumerate(lane.products):
            assert aligned(product), name
            assert product.a == a, name
            assert product.b == words[4 + 2 * n : 6 + 2 * n], name
        for four in (sums[:4], sums[4:]):
            assert [(x[0], x[2]) for x in four] == [("HMMA", i) for i in range(4)], name
        assert sums[0][1] < sums[4][1], name  # the first product is of the first half of b


KINDS = {  # of the left and the right operand
    "linear_nll_forward": ("M88", "M88"),
    "logit_gradient": ("M88", "M88"),
    "hidden_gradient": ("M88", "MT88"),
    "weight_gradient": ("MT88", "MT88"),
}


def check_loop(name, code, kinds):
    """A turn of the loop multiplies each fragment of a warp's 32 rows with each of its columns."""
    turn = main_loop(code)
    lane = follow(turn, turn)  # the second turn reads what the first may have loaded
    products = lane.products[len(lane.products) // 2 :]
    assert len(products) == 64, name  # 64 deep: 4 steps of 2 x 8 fragments
    pairs = []
    for product in products:
        assert aligned(product), name
        for got, kind in zip((product.a, product.b), kinds, strict=True):
            assert {x[0] for x in got} == {kind}, f"{name}: {got}"
            assert len({x[1] for x in got}) == 1, f"{name}: {got}"  # of one LDSM
            assert all(y[2] == x[2] + 1 for x, y in pairwise(got)), f"{name}: {got}"
        assert product.a[0][2] == 0, name
        assert product.b[0][2] in (0, 2), name
        pairs.append((product.a[0], product.b[0], product.d[0]))
    left, right = ({pair[i] for pair in pairs} for i in (0, 1))
    assert (len(left), len(right)) == (8, 32), name
    assert {x[1] for x in left}.isdisjoint({x[1] for x in right}), name
    assert len({pair[:2] for pair in pairs}) == 64, name
    # Each sum is of one place in either operand, and adds up the four steps.
    assert sorted(Counter(pair[2] for pair in pairs).values()) == [4] * 16, name


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("source", ["forward", "recompute"])
def test_the_loops_operands_come_from_ldmatrix(assemble, source, arch):
    checked = 0
    for name, code in assemble(f"csrc/cuda/{source}.cu", arch).sass().items():
        kernel = next((kernel for kernel in KINDS if f"{kernel}_kernelI" in name), None)
        if kernel is not None and "_kernelIf" not in name:
            check_loop(name, instructions(code), KINDS[kernel])
            checked += 1
    assert checked == {"forward": 8, "recompute": 20}[source]


def halves(name):
    return "kernelIf" not in name


def whole_vectors(name):
    return "Lb1E" in name


TENSOR_CORE, COPY = r"HMMA\.16816\.F32", r"LDGSTS\.E\.BYPASS\.128\.ZFILL "
# Of a file: how many kernels it has; which of them, an instruction, and whether they have it.
FOUND = {
    "forward": (
        16,
        ("linear_nll_forward", TENSOR_CORE, halves),
        ("linear_nll_forward", r"LDSM\.16\.M88\.4 ", halves),
        ("linear_nll_forward", COPY, lambda name: "Lb1ELb" in name),
        ("linear_nll_forward", r"LDS\.128 ", lambda name: not halves(name)),
    ),
    "recompute": (
        27,
        ("logit|hidden|weight", TENSOR_CORE, halves),
        ("logit", r"LDSM\.16\.M88\.4 ", halves),
        ("hidden|weight", r"LDSM\.16\.MT88\.4 ", halves),
        ("(logit|hidden|weight).*Lb1E", COPY, bool),
    ),
    "certificate": (
        13,
        ("squared_norms", r"LDG\.E\.128", whole_vectors),
        ("certificate", TENSOR_CORE, halves),
        ("certificate", COPY, whole_vectors),
    ),
    "spmm": (
        50,  # the first flag is that of whole vectors, in spmm_hidden the last one of values
        ("", r"LDGSTS\.E\.BYPASS\.128", lambda name: re.findall(r"Lb([01])E", name)[0] == "1"),
    ),
    "rows": (8, ("softmax_rows_kernelILb1", r"VOTE\.ANY ", bool)),
    "weighting": (5, ("close_gaps", r"LDG\.E\.128", whole_vectors)),
}


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("source", FOUND)
def test_the_kernels_spill_nothing_and_use_the_machine(assemble, source, arch):
    kernels, *expected = FOUND[source]
    assembled = assemble(f"csrc/cuda/{source}.cu", arch)
    assert assembled.kernels == kernels
    for name, code in assembled.sass().items():
        for kernel, instruction, has_it in expected:
            if re.search(kernel, name):
                assert bool(re.search(instruction, code)) == has_it(name), (name, instruction)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_lists_spill_nothing(assemble, arch):
    assert assemble("csrc/cuda/lists.cu", arch).kernels > 3  # some are CUB's
