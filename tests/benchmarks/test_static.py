"""What the compiler made of kernels: how it is read, and what is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from benchmarks.measure import compiled, compiled_cuda, rehearsal
from benchmarks.measure.compiled import (
    TARGETS,
    Usage,
    amd_instructions,
    instructions,
    outside_main_loop,
)
from benchmarks.run import static

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
        "copies": "",
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


def test_cuda_kernels_are_held_to_registers_memory_and_wide_loads():
    name = "cuda: kernel bf16 aligned"
    budget = {f"sm_90 {name}": {"slots": 100, "registers": 128, "shared": 1000}}
    good = {"name": name, "shared": 1000, "copied": True, "wide": True, "copies": "128"}
    assert static.complaints([usage(**good), usage(**(good | {"registers": 96}))], budget) == []
    changes = [{"registers": 129}, {"shared": 1001}, {"copies": "32"}, {"loads": "16/64"}]
    wrong = static.complaints([usage(**(good | change)) for change in changes], budget)
    assert wrong == [
        f"sm_90 {name}: 129 registers, expected 128",
        f"sm_90 {name}: 1001 shared, expected 1000",
        f"sm_90 {name}: copies nothing asynchronously, 16 bytes at once",
        f"sm_90 {name}: loads 16/64 bits at once, expected 128 among them",
    ]


def test_recording_keeps_what_was_not_compiled():
    budget = {"sm_80 kernel": 1, "sm_90 kernel": 2, "sm_90 cuda: kernel": {"slots": 3}}
    for found, changed in (
        (usage(), {"sm_90 kernel": 100}),
        (
            usage(name="cuda: new"),
            {"sm_90 cuda: new": {"slots": 100, "registers": 128, "shared": 0}},
        ),
    ):
        replaced = "sm_90 cuda: kernel" if "new" in found.name else "sm_90 kernel"
        kept = {key: value for key, value in budget.items() if key != replaced}
        assert json.loads(static._updated(budget, [found])) == kept | changed
    text = static.BUDGET.read_text()
    assert static._updated(json.loads(text), []) == text


SOURCE = """
// Sums.
template <typename T, bool Aligned, int kGroup>
__global__ void __launch_bounds__(kThreads, 1)
    tiled_kernel(Operands<T> in, int group) {
    Entries<T> z = next_products(in, loader);
}

constexpr int kOther = 3;

__global__ void plain_kernel(Global<float> out) {
    if (out) return;
}
"""
LAUNCHES = """
    launch(tiled_kernel<T, kAligned, 2>,
           {"tiled", static_cast<unsigned>(blocks), kThreads, kStagesBytes, stream},
           operands_of<T>(problem));
    launch(plain_kernel, {"plain", dim3(a, b), 128, 0, stream}, out);
"""


def test_sources_tell_what_a_kernel_is_and_how_it_is_launched(tmp_path, monkeypatch):
    (tmp_path / "csrc/cuda").mkdir(parents=True)
    source = tmp_path / "csrc/cuda/some.cu"
    source.write_text(SOURCE + LAUNCHES)
    monkeypatch.setattr(compiled_cuda, "ROOT", tmp_path)
    compiled_cuda._kernels.cache_clear()
    found = compiled_cuda._kernels()
    assert {name: (kernel.switches, kernel.tiled) for name, kernel in found.items()} == {
        "tiled": (("aligned", "kgroup"), True),
        "plain": ((), False),
    }
    probe = compiled_cuda._probe(source)
    assert '#include "csrc/cuda/some.cu"' in probe
    for name, value in (("threads_tiled", "kThreads"), ("shared_tiled", "kStagesBytes")):
        assert f'extern "C" __device__ unsigned probe_{name} = {value};' in probe
    assert "probe_threads_plain = 128;" in probe
    code = instructions(SASS)
    sizes = {"tile": 128 * 128, "threads_tiled": 256, "shared_tiled": 3000}
    function = "void bft::cuda::tiled_kernel<__nv_bfloat16, true, 2>(bft::cuda::Operands)"
    got = compiled_cuda._usage("sm_90", function, code, 100, 0, sizes)
    compiled_cuda._kernels.cache_clear()
    assert got.key == "sm_90 cuda: tiled bf16 aligned kgroup=2"
    assert (got.warps, got.shared, got.blocks) == (8, 3000, 2)
    assert got.multiplies
    assert got.copied
    assert got.wide
    # Two instructions on four schedulers, beside the cycles of one product.
    assert got.loop == pytest.approx((2 / 4) / (16 * 8 * 16 / 2048))


def test_a_missing_compiler_is_named(monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    static.main(static.Config(targets=("sm_80",), only="cuda"))
    assert capsys.readouterr().out.startswith("csrc/cuda is left out: no nvcc on PATH\n")


@pytest.mark.skipif(compiled_cuda.why_not() is not None, reason="needs nvcc")
def test_a_file_is_compiled_for_a_target():
    found = compiled_cuda._compile("sm_80", compiled_cuda.ROOT / "csrc/cuda/sampling.cu")
    assert sorted(usage.key for usage in found) == [
        "sm_80 cuda: fill_draws f32",
        "sm_80 cuda: fill_draws u32",
    ]
    for got in found:
        assert (got.warps, got.shared, got.spilled, got.tensor_core) == (8, 0, 0, 0)
        assert 0 < got.registers < 64


def test_an_unknown_target_is_refused():
    with pytest.raises(SystemExit, match="targets: got 'sm_1', expected some of sm_80"):
        static.main(static.Config(targets=("sm_1",)))


def test_every_kernel_has_a_budget():
    budget = json.loads(static.BUDGET.read_text())
    for target in TARGETS:
        assert any(key.startswith(f"{target} linear_nll_forward bf16") for key in budget)
        on_cuda = TARGETS[target].backend == "cuda"
        assert (f"{target} cuda: linear_nll_forward bf16 aligned emit" in budget) == on_cuda


def test_a_rehearsal_has_no_values():
    assert rehearsal._empty(3, 4).device == torch.device("meta")
