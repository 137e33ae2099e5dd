"""What the compiler made of kernels: how it is read, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from benchmarks import compiled, rehearsal, static
from benchmarks.compiled import TARGETS, Usage, amd_instructions, instructions, outside_main_loop

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
AMD = """
 .text
kernel:                                 ; @kernel
 s_load_dwordx2 s[0:1], s[4:5], 0x0      ; a comment
.LBB0_1:                                ; =>This Loop Header
 buffer_load_dwordx4 v[0:3], v4, s[0:3], 0 offen
.LBB0_2:
 v_mfma_f32_32x32x8_bf16_1k a[0:15], v[0:1], v[2:3], a[0:15]
 s_cbranch_scc1 .LBB0_2
 v_exp_f32_e32 v5, v5
 s_cbranch_vccnz .LBB0_1
 s_endpgm
.Lfunc_end0:
 v_exp_f32_e32 v5, v5
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
        "loop": None,
    }
    return Usage(**(values | changes))  # type: ignore[arg-type]


def test_a_tile_is_the_loop_around_the_products():
    code = instructions(SASS)
    assert len(code) == 8
    # MOV, MUFU, STG and the outer branch; not the products' loop, nor what lies outside both.
    assert outside_main_loop(code) == 4
    assert outside_main_loop([(0, "MOV R1, R2"), (16, "EXIT")]) == 2


def test_what_few_tiles_do_can_be_left_out():
    code = instructions(SASS.replace("MUFU.EX2 R3, R4", "BRA 0x60"))
    assert outside_main_loop(code) == 4
    assert outside_main_loop(code, detour=False) == 3  # without the STG
    alone = [line for line in code if line[0] != 0x60]  # no loop over tiles
    assert outside_main_loop(alone) == outside_main_loop(alone, detour=False)


def test_amd_assembly_reads_like_nvidias():
    code = amd_instructions(AMD)
    assert code[-2:] == [(5, "BRA 0x1"), (6, "s_endpgm")]
    assert len(code) == 7
    # The vector load, the exponential and the outer branch.
    assert outside_main_loop(code) == 3
    assert sum(bool(compiled._MMA.search(text)) for _, text in code) == 1


@pytest.mark.parametrize(
    ("text", "bits"),
    [
        ("LDG.E.128 R4, [R2]", 128),
        ("LDG.E.64.CONSTANT R4, [R2]", 64),
        ("LDG.E.U16 R4, [R2]", 16),
        ("LDG.E R4, [R2]", 32),
        ("LDG.E.U8 R4, [R2]", 8),
        ("buffer_load_dwordx4 v[0:3], v4, s[0:3], 0 offen", 128),
        ("global_load_dword v0, v1, s[0:1]", 32),
        ("global_load_ushort v0, v1, s[0:1]", 16),
        ("buffer_load_sbyte v0, v1, s[0:3], 0", 8),
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
    assert compiled._blocks(TARGETS["sm_89"], 64, 99 * 1024, 8) == 1
    assert compiled._blocks(TARGETS["sm_89"], 64, 99 * 1024 + 1, 8) == 0
    assert compiled._blocks(TARGETS["gfx942"], 128, 64 * 1024, 8) == 1


def test_complaints_name_what_is_wrong():
    budget = {"sm_90 kernel": 100}
    assert static.complaints([usage(), usage(issue_slots=103)], budget) == []
    wrong = static.complaints(
        [
            usage(spilled=8),
            usage(tensor_core=0),
            usage(issue_slots=104),
            usage(blocks=0, shared=200_000),
            usage(name="new"),
        ],
        budget,
    )
    assert wrong == [
        "sm_90 kernel: spills 8 bytes, expected 0",
        "sm_90 kernel: has no tensor-core instruction",
        "sm_90 kernel: 104 issue slots, expected 100",
        "sm_90 kernel: does not fit a multiprocessor, with 128 registers and 200000 shared bytes",
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
