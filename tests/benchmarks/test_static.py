"""What the compiler made of kernels: which are compiled, how it is read, and what is refused."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from benchmarks.measure import compiled, compiled_cuda
from benchmarks.measure.compiled import TARGETS, Launch, Usage
from benchmarks.run import static
from bft_kernels.backends.triton import configs

GOOD = Usage(
    target="sm_90",
    kernel="kernel",
    operands="16 bit",
    switches=("emit",),
    multiplies=True,
    tensor_core=True,
    registers=121,
    spilled=0,
    shared=1000,
    warps=8,
)
BUDGET = {"kernel 16 bit": {"sm_80": [1, 2], "sm_90": [121, 1000]}}


def launch(kernel="k", switches="", **sizes):
    return Launch(
        lambda: None, kernel, frozenset(switches.split()), frozenset(sizes.items()), frozenset()
    )


def test_a_form_contains_another_that_does_less_with_the_same_tile():
    tile = {"BLOCK_N": 64, "OPERAND": 2}
    larger = launch(switches="emit statistics", **tile, bias_ptr=4)
    assert larger.contains(launch(switches="emit", **tile))
    assert larger.contains(launch(BLOCK_N=64))
    for other in (
        launch("other", "emit", **tile),
        launch(switches="emit smoothing", BLOCK_N=64),
        launch(switches="emit", BLOCK_N=128, OPERAND=2),
        launch(switches="emit", BLOCK_N=64, OPERAND=4),
    ):
        assert not larger.contains(other)


def test_the_largest_forms_are_chosen_and_each_switch_is_off_once():
    both, first, second, none = (
        launch(switches=on, BLOCK_N=64, OPERAND=2) for on in ("a b", "a", "b", "")
    )
    assert compiled.chosen([none, first, both, replace(both), second]) == [both, none]
    assert compiled.chosen([first, both, second]) == [both, second, first]
    assert compiled.chosen([first, second]) == [first, second]
    other = launch(BLOCK_N=128, OPERAND=2)
    assert compiled.chosen([both, other]) == [both, other]


# Not interpreted, as the tests are: in a process of its own.
REHEARSAL = """
import json
from benchmarks.measure import compiled, rehearsal

def rehearsed(target, names):
    return compiled.rehearsed(compiled.TARGETS[target], (rehearsal.CASES[x] for x in names))

def told(x):
    tile = [dict(x.sizes).get(f"BLOCK_{y}") for y in "NVD"]
    return x.kernel, x.operands, sorted(x.switches), tile

even = [name for name in rehearsal.CASES if " D " not in name]
both = {}
for target in ("sm_100", "gfx942"):
    forms = compiled.chosen(rehearsed(target, rehearsal.GATE)), rehearsed(target, even)
    both[target] = [[told(x) for x in some] for some in forms]
print(json.dumps(both))
"""


def test_the_gate_has_every_kernel_every_switch_and_every_tile():
    """Of all calls but those with rows of odd length."""
    command, environment = [sys.executable, "-c", REHEARSAL], os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    families = {"sm_100": 100, "gfx942": configs.AMD}
    for target, (gate, every) in json.loads(done.stdout).items():
        kinds = [
            {(kernel, operands, x) for kernel, operands, on, _ in forms for x in ("", *on)}
            for forms in (gate, every)
        ]
        assert kinds[0] == kinds[1]
        assert len({kernel for kernel, *_ in gate}) == 18
        assert len(gate) < len(every) / 2
        tiles = {tuple(tile) for *_, tile in gate}
        assert tiles == {tuple(tile) for *_, tile in every}
        for (family, _), shipped in configs.SHIPPED.items():
            if family == families[target]:
                needed = (shipped.logits, shipped.capped, shipped.hidden, shipped.weight)
                assert {(x.block_n, x.block_v, x.block_d) for x in needed} <= tiles


def test_operands_are_told_by_their_bits():
    assert launch(BLOCK=32).operands == ""
    assert launch(OPERAND=2, hidden_ptr=2, weight_ptr=2).operands == "16 bit"
    assert launch(OPERAND=2, hidden_ptr=2, weight_ptr=4).operands == "16 of 32 bit"


def test_instructions_are_seen():
    products = ("HMMA.16816.F32.BF16 R4, R8", "HGMMA.64x128x16.F32.BF16 R24", "UTCHMMA gdesc[UR4]")
    for code in (*products, "v_mfma_f32_32x32x8_bf16_1k a[0:15], v[0:1]"):
        assert compiled.MMA.search(f"FFMA R4, R8, R2 ;\n{code} ;")
    assert not compiled.MMA.search("FFMA R4, R8, R2, R4 ;")
    copy = "LDGSTS.E.BYPASS.LTC128B.128 [R4], [R2.64]"
    assert compiled_cuda._wide("LDG.E.128 R4, [R2]", "LDG")
    assert compiled_cuda._wide(copy, "LDG")
    assert compiled_cuda._wide(copy, "LDGSTS")
    assert not compiled_cuda._wide("LDG.E.64.CONSTANT R4, [R2]", "LDG")
    assert not compiled_cuda._wide("LDGSTS.E.LTC128B [R4], [R2.64]", "LDGSTS")
    assert not compiled_cuda._wide("LDG.E.128 R4, [R2]", "LDGSTS")


@pytest.mark.parametrize(
    ("target", "registers", "shared", "warps", "fits"),
    [
        ("sm_90", 255, 227 * 1024, 8, True),
        ("sm_90", 129, 0, 16, False),
        ("sm_90", 128, 0, 16, True),
        ("sm_89", 64, 99 * 1024, 8, True),
        ("sm_89", 64, 99 * 1024 + 1, 8, False),
        ("gfx942", 128, 64 * 1024, 8, True),
    ],
)
def test_what_fits_a_multiprocessor(target, registers, shared, warps, fits):
    got = replace(GOOD, target=target, registers=registers, shared=shared, warps=warps)
    assert got.fits == fits


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({}, None),
        ({"registers": 128}, None),  # registers are given out in eights
        ({"registers": 40, "shared": 10}, None),
        ({"registers": 129}, "129 registers, expected 121"),
        ({"shared": 1001}, "1001 shared bytes, expected 1000"),
        ({"registers": 255, "shared": 9999, "budgeted": False}, None),
        ({"spilled": 8, "budgeted": False}, "spills 8 bytes, expected 0"),
        ({"tensor_core": False}, "has no tensor-core instruction"),
        ({"tensor_core": False, "multiplies": False}, None),
        (
            {"shared": 300_000, "budgeted": False},
            "does not fit a multiprocessor, with 121 registers and 300000 shared bytes",
        ),
        ({"narrow": "LDGSTS"}, "no LDGSTS of 16 bytes at once"),
        ({"operands": "32 bit"}, "has no budget; see --record"),
        ({"target": "sm_100"}, "has no budget; see --record"),
    ],
)
def test_complaints_name_what_is_wrong(change, wrong):
    usage = replace(GOOD, **change)
    expected = [] if wrong is None else [f"{usage.name}: {wrong}"]
    assert static.complaints([usage], BUDGET) == expected


def test_recording_keeps_what_was_not_compiled():
    budget = BUDGET | {"cuda: kernel": {"sm_90": [5, 6]}, "gone": {"sm_90": [1, 1]}}
    found = [GOOD, replace(GOOD, registers=90, shared=2000, switches=())]
    assert static.updated(budget, found) == {
        "kernel 16 bit": {"sm_80": [1, 2], "sm_90": [121, 2000]},
        "cuda: kernel": {"sm_90": [5, 6]},
    }
    text = static.BUDGET.read_text()
    assert static.text_of(static.updated(json.loads(text), [])) == text


def test_every_target_has_a_budget_that_a_human_can_read():
    budget = json.loads(static.BUDGET.read_text())
    assert budget["linear_nll_forward 16 bit"].keys() == TARGETS.keys()
    assert set(budget["softmax_rows"]) == {name for name, x in TARGETS.items() if not x.brief}
    assert set(budget["cuda: linear_nll_forward bf16"]) == set(compiled_cuda.GATE)
    assert len(static.BUDGET.read_text().splitlines()) < 100


def test_sources_tell_what_a_kernel_is_and_how_it_is_launched():
    found = compiled_cuda._kernels()
    told = {name: (x.switches, x.typed, x.tiled) for name, x in found.items()}
    assert told["linear_nll_forward"] == (("aligned", "emit"), True, True)
    assert told["combine"] == ((), False, False)
    probe = compiled_cuda._probe(compiled_cuda.ROOT / "csrc/cuda/forward.cu")
    assert '#include "csrc/cuda/forward.cu"' in probe
    for name, value in (("threads", "kThreads"), ("shared", "kForwardShared")):
        line = f'extern "C" __device__ unsigned probe_{name}_linear_nll_forward = {value};'
        assert line in probe
    assert "probe_shared_combine = 0;" in probe


@pytest.mark.parametrize(
    ("kernel", "values", "switches", "tiled"),
    [
        ("linear_nll_forward", "true, false", "aligned", True),
        ("spmm_hidden", "true, 2, false", "aligned pieces=2", False),
    ],
)
def test_a_kernel_is_told_by_its_name_and_its_code(kernel, values, switches, tiled):
    sizes = {f"threads_{kernel}": 256, f"shared_{kernel}": 3000}
    function = f"void bft::cuda::{kernel}_kernel<__nv_bfloat16, {values}>(bft::cuda::Operands)"
    code = "HMMA.16816.F32.BF16 R4, R8, R2, R4 ;\nLDG.E.64 R4, [R2] ;"
    got = compiled_cuda._usage("sm_90", function, code, 100, 0, sizes)
    assert got.name == f"sm_90 cuda: {kernel} bf16 {switches}"
    assert (got.warps, got.shared, got.registers, got.spilled) == (8, 3000, 100, 0)
    assert (got.multiplies, got.tensor_core) == (tiled, True)
    assert got.narrow == ("LDG, LDGSTS" if tiled else "LDG")
    code = code.replace(".64", ".128")
    got = compiled_cuda._usage("sm_90", function, code, 100, 0, sizes)
    assert got.narrow == ("LDGSTS" if tiled else "")


def test_a_missing_compiler_is_named(monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    static.main(static.Config(targets=("sm_80",), only="cuda"))
    assert capsys.readouterr().out.startswith("csrc/cuda is left out: no nvcc on PATH\n")


@pytest.mark.skipif(compiled_cuda.why_not() is not None, reason="needs nvcc")
def test_a_file_is_compiled_for_a_target():
    source = compiled_cuda.ROOT / "csrc/cuda/lists.cu"
    found = compiled_cuda.compile_source("sm_80", source)
    assert sorted(usage.name for usage in found) == [
        "sm_80 cuda: column_starts",
        "sm_80 cuda: count_entries",
        "sm_80 cuda: list_entries",
    ]
    for got in found:
        assert (got.warps, got.shared, got.spilled, got.tensor_core) == (8, 0, 0, False)
        assert 0 < got.registers < 64


def test_an_unknown_target_is_refused():
    with pytest.raises(SystemExit, match="targets: got 'sm_1', expected some of sm_80"):
        static.main(static.Config(targets=("sm_1",)))
