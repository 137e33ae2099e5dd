"""The GPU benchmark, rehearsed without one: its flow, its limits and its way with failures."""

import json
import os
import random
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from benchmarks.measure import suite_plugin
from benchmarks.providers.registry import PROVIDERS, find, telling_cases
from benchmarks.results.folder import Folder, slug
from benchmarks.results.schema import full, read
from benchmarks.results.summary import draw_figures, write_summary
from benchmarks.run import gpu
from benchmarks.shapes import ON_A_GPU

ROOT = Path(__file__).parents[2]


# What a machine with a GPU may lack; no process of a run may import them.
BLOCKED = """
from importlib.machinery import PathFinder

find = PathFinder.find_spec


def find_spec(cls, name, path=None, target=None):
    return None if name.partition(".")[0] in {names} else find(name, path, target)


PathFinder.find_spec = classmethod(find_spec)
"""
ABSENT = (
    *("tyro", "rich", "accelerate", "hypothesis", "ninja", "pybind11", "matplotlib", "peft"),
    *("transformers", "datasets", "pandas", "jinja2", "yaml", "xdist", "pytest_benchmark", "scipy"),
)


def start_bare(tmp_path, *arguments):
    """A dry run in whose processes none of ``ABSENT`` can be imported, whatever starts them."""
    folder = tmp_path / "bare"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(BLOCKED.format(names=ABSENT))
    path = os.pathsep.join([str(folder), str(ROOT)])
    command = [sys.executable, "-m", "benchmarks", "gpu", "--dry-run", "--output", "results"]
    return subprocess.Popen(
        [*command, *arguments],
        cwd=tmp_path,
        # Plugins of pytest that are installed would be imported by their entry points.
        env=os.environ | {"PYTHONPATH": path, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_a_dry_run_needs_torch_triton_numpy_and_pytest_alone(tmp_path):
    process = start_bare(tmp_path, "--providers", "bft triton sampled", "quack")
    text, _ = process.communicate()
    folder = tmp_path / "results"
    assert process.returncode == 0, text
    assert "no figures: matplotlib is not installed" in text
    peer, ours, frozen = read(folder / "loss.csv")
    assert [row["mode"] for row in (peer, ours, frozen)] == ["both", "both", "frozen"]
    assert (ours["weighting"], ours["eps"], ours["shape"]) == ("bft", str(2**-12), "")
    assert (peer["status"], ours["status"]) == ("unavailable", "ok")
    assert peer["commit"] == ours["commit"]
    assert all((peer["reason"], ours["entries_per_token"], ours["listed_per_token"]))
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["nvidia_smi"]
    assert environment["build"]["status"] == "ok"
    outcomes = suite_plugin.read(folder / "tests.jsonl")
    assert {row["outcome"] for row in outcomes.values()} <= {"passed", "skipped"}
    order = [name.partition("[")[0].partition("::")[2] for name in outcomes]
    graph = order.index("test_a_graph_replays_what_the_inputs_have_become")
    assert graph < order.index("test_the_hash_has_the_bits_of_the_definition")
    assert order.index("test_ties_go_to_the_lowest_index") > graph
    summary = (folder / "summary.md").read_text()
    assert "bft triton sampled" in summary
    assert f"{suite_plugin.told(outcomes)};" in summary


@pytest.mark.slow
@pytest.mark.parametrize("when", [8.0, 20.0])
def test_what_a_kill_leaves_can_be_read(tmp_path, when):
    process = start_bare(tmp_path, "--providers", "eager")
    time.sleep(when * random.uniform(0.7, 1.3))
    assert process.poll() is None
    process.kill()
    process.communicate()
    folder = tmp_path / "results"
    found = {path.name: path.read_text() for path in folder.glob("*.*") if path.suffix != ".png"}
    assert json.loads(found.get("environment.json", '{"torch": "none yet"}'))["torch"]
    lines = found.get("tests.jsonl", "")
    assert not lines or lines.endswith("\n")
    assert all(json.loads(line)["test"] for line in lines.splitlines())
    assert all(row["status"] for row in read(folder / "loss.csv"))
    assert "## Failures\n\nNone." in found.get("summary.md", "## Failures\n\nNone.")


def test_earlier_results_stay(tmp_path):
    names = ["gpu", "gpu-2", "gpu-3"]
    for name in names:
        Folder(tmp_path / "gpu", "cpu").note(run=name)
    for name in names:
        assert json.loads((tmp_path / name / "environment.json").read_text()) == {"run": name}


def test_what_the_backends_say_comes_from_another_process(run, monkeypatch):
    run.look()
    assert run.noted["bft_kernels"]["backends"]["torch"]["cpu"] == []
    monkeypatch.setenv("PYTHONHOME", "/nowhere")  # as one that dies
    run.look()
    assert run.failed == ["info"]
    assert run.noted["bft_kernels"] == {}


def test_a_part_that_fails_leaves_the_others(tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("this part is broken")

    monkeypatch.setattr(gpu, "compile_ahead", broken)
    config = gpu.Config(dry_run=True, output=tmp_path, providers=("quack",), tests=False)
    with pytest.raises(SystemExit) as exit_:
        gpu.main(config)
    assert exit_.value.code == 1
    assert "this part is broken" in (tmp_path / "failures.txt").read_text()
    assert read(tmp_path / "loss.csv")[0]["status"] == "unavailable"
    assert "- figures" in (tmp_path / "summary.md").read_text()  # there was nothing to draw


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_refuses_without_a_gpu(tmp_path):
    with pytest.raises(SystemExit, match=r"found no GPU that torch can use .*--dry-run"):
        gpu.main(gpu.Config(output=tmp_path / "results"))
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [({}, "output: got none"), ({"providers": ("eager", "egaer")}, "providers: got 'egaer'")],
)
def test_refuses_bad_settings(settings, message, tmp_path):
    if settings:
        settings["output"] = tmp_path / "results"
    with pytest.raises(SystemExit, match=message):
        gpu.main(gpu.Config(dry_run=True, **settings))
    assert not (tmp_path / "results").exists()


def test_names():
    assert slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert find("own:wrong").family == "own:wrong"


def test_ours_come_first_and_what_is_slow_to_start_last():
    order = list(dict.fromkeys(case.provider for case in telling_cases(tuple(PROVIDERS))))
    assert set(order) == set(PROVIDERS)
    assert order[0] == "bft triton exact"
    assert order.index("bft cuda exact") < order.index("eager") < order.index("trl")
    assert set(order[-2:]) == {"compiled eager", "quack"}
    of_ours = telling_cases(["bft triton exact"])
    assert [case.mode for case in of_ours] == ["both", "frozen", "forward"]
    assert {case.weighting for case in of_ours} == {"bft"}


def test_figures_and_summary_of_several_shapes(run):
    for place, shape in enumerate(ON_A_GPU):
        where = asdict(shape) | {"dtype": "bfloat16"}
        where |= {"scaled_down_from": "16384 x 262144" if place == 1 else ""}
        for index, case in enumerate(telling_cases(gpu.Config.providers)):
            row = {"status": "ok", "seconds": (1 + index) * 0.02, "first_seconds": 1.0}
            row |= {"g_seconds": 0.02, "times_g": 1.0 + index, "tokens_per_second": 1e5}
            row |= {"extra_bytes": 10 ** (6 + index % 4), "error_hidden": 0.01}
            if index == 3:
                row = {"status": "cut", "reason": "not done after 20 s"}
            run.rows.append(full(case.columns | where | row))
    draw_figures(run)
    write_summary(run)
    text = (run.path / "summary.md").read_text()
    assert "Scaled down from 16384 x 262144" in text
    assert "1G is 20.00 ms" in text
    assert text.count("cut: bft triton sampled (bft both): not done after 20 s") == len(ON_A_GPU)
    assert "![Time and memory](loss.png)" in text
    assert (run.path / "loss.png").stat().st_size > 0
    with pytest.raises(ValueError, match=r"loss\.csv has no column nonsense"):
        run.row({"nonsense": 1})
