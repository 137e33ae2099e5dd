"""What the compiler made of kernels: how it is read, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from benchmarks import compiled, rehearsal, static
from benchmarks.compiled import TARGETS, Usage, instructions, outside_main_loop

SASS = """
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0010*/                   MOV R1, c[0x0][0x28] ;
        /*0020*/                   HMMA.16816.F32.BF16 R4, R8, R2, R4 ;
        /*0030*/              @!P0 BRA 0x20 ;
        /*0040*/                   MUFU.EX2 R3, R4 ;
        /*0050*/                   STG.E desc[UR4][R2.64], R3 ;
        /*0060*/               @P1 BRA 0x10 ;
        /*0070*/                   EXIT ;
"""


def usage(**changes: object) -> Usage:
    values: dict[str, object] = {
        "target": "sm_90",
        "name": "kernel",
        "peer": False,
        "multiplies": True,
        "registers": 128,
        "spilled": 0,
        "shared": 0,
        "warps": 8,
        "blocks": 2,
        "tensor_core": 4,
        "loads": "128",
        "instructions": 100,
        "issue_slots": 100,
        "epilogue": None,
    }
    return Usage(**(values | changes))  # type: ignore[arg-type]


def test_a_tile_is_the_loop_around_the_products():
    code = instructions(SASS)
    assert len(code) == 8
    # MOV, MUFU, STG and the outer branch; not the products' loop, nor what lies outside both.
    assert outside_main_loop(code) == 4
    assert outside_main_loop([(0, "MOV R1, R2"), (16, "EXIT")]) == 2


@pytest.mark.parametrize(
    ("text", "bits"),
    [
        ("LDG.E.128 R4, [R2]", 128),
        ("LDG.E.64.CONSTANT R4, [R2]", 64),
        ("LDG.E.U16 R4, [R2]", 16),
        ("LDG.E R4, [R2]", 32),
        ("LDG.E.U8 R4, [R2]", 8),
    ],
)
def test_widths_of_loads(text, bits):
    assert compiled._width(text) == bits


def test_programs_of_a_multiprocessor():
    target = TARGETS["sm_90"]
    assert compiled._blocks(target, 255, 0, 8) == 1
    assert compiled._blocks(target, 128, 0, 8) == 2
    assert compiled._blocks(target, 32, 100 * 1024, 4) == 2
    assert compiled._blocks(target, 16, 0, 4) == 16


def test_complaints_name_what_is_wrong():
    budget = {"sm_90 kernel": 100}
    assert static.complaints([usage(), usage(issue_slots=103)], budget) == []
    wrong = static.complaints(
        [usage(spilled=8), usage(tensor_core=0), usage(issue_slots=104), usage(name="new")], budget
    )
    assert wrong == [
        "sm_90 kernel: spills 8 bytes, expected 0",
        "sm_90 kernel: has no tensor-core instruction",
        "sm_90 kernel: 104 issue slots, expected 100",
        "sm_90 new: has no budget; see --record",
    ]


def test_an_unknown_target_is_refused():
    with pytest.raises(SystemExit, match="targets: got 'sm_1', expected some of sm_80"):
        static.main(static.Config(targets=("sm_1",)))


def test_every_kernel_has_a_budget():
    budget = json.loads(static.BUDGET.read_text())
    for target in TARGETS:
        assert any(key.startswith(f"{target} linear_nll_forward bf16") for key in budget)


def test_a_rehearsal_has_no_values():
    assert rehearsal._empty(3, 4).device == torch.device("meta")
