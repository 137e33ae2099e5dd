"""``bft compare``: what it trains, in which order, what it writes, and how it goes on."""

import json
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from accelerate.commands.launch import launch_command_parser
from accelerate.state import AcceleratorState

from bft import train as train_module
from bft.cli import main
from bft.config import CompareConfig, SettingError, seconds_of
from bft.data import StepBatches
from bft.metrics import to_json
from bft.nonfinite import NonFinite
from bft.study import compare as compare_module
from bft.study import report
from bft.study.arms import Arm, contrasts, make_arms
from bft.study.compare import best, compare, plan_steps, tune
from bft.usage import parse
from tests.support.runs import assert_same_weights, strict_json


@pytest.fixture(scope="session")
def splits(tmp_path_factory, data_file):
    """Records 0 to 9 to train on, 10 to 13 to tune on, 14 to 19 to test with."""
    folder = tmp_path_factory.mktemp("splits")
    lines = data_file.read_text(encoding="utf-8").splitlines(keepends=True)
    for name, part in (("train", lines[:10]), ("validation", lines[10:14]), ("test", lines[14:])):
        (folder / f"{name}.jsonl").write_text("".join(part), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def small(splits, model_dir):
    """Two arms, two seeds, one rate: six runs of a few steps."""
    return CompareConfig(
        data=splits,
        model=str(model_dir),
        schemes=("sft",),
        control=("shuffled",),
        windows=(3,),
        learning_rates=(3e-3,),
        seeds=2,
        steps=3,
        batch_size=2,
        save_every=1,
        bootstrap=200,
    )


@pytest.fixture(scope="module")
def whole(small, tmp_path_factory):
    """A comparison, and what was read and trained, in order."""
    AcceleratorState._reset_state(reset_partial_state=True)
    events = []

    def seen(original):
        def call(what, *args, **options):
            events.append(getattr(what, "name", None) or what)
            return original(what, *args, **options)

        return call

    config = replace(small, output_dir=tmp_path_factory.mktemp("whole") / "out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare_module, "read_jsonl", seen(compare_module.read_jsonl))
        patch.setattr(compare_module, "train", seen(compare_module.train))
        result = compare(config)
    AcceleratorState._reset_state(reset_partial_state=True)
    return config, result, events


def without_times(value):
    """The same without what a clock says, and without the command."""
    if isinstance(value, dict):
        clocks = ("seconds", "command")
        return {name: without_times(part) for name, part in value.items() if name not in clocks}
    return [without_times(part) for part in value] if isinstance(value, list) else value


# --- a whole comparison --------------------------------------------------------------------------


def test_the_test_file_is_read_once_after_all_training(whole):
    _, _, events = whole
    runs = [event for event in events if not isinstance(event, str)]
    assert len(runs) == 2 + 2 * 2
    assert events.index("test.jsonl") > max(map(events.index, runs))
    assert events.count("test.jsonl") == 1
    assert [run.scheme for run in runs[:2]] == ["sft", "bft.schemes:shuffled"]
    assert [run.steps for run in runs] == [1] * 2 + [3] * 4  # half the steps, then all of them


def test_arms_share_order_start_and_budget(whole):
    _, _, events = whole
    runs = [event for event in events if not isinstance(event, str)][2:]
    own = {"scheme", "output_dir", "window"}
    for seed in (0, 1):
        of_seed = [run for run in runs if run.seed == seed]
        assert len(of_seed) == 2
        shared = [{k: v for k, v in vars(run).items() if k not in own} for run in of_seed]
        assert shared[0] == shared[1]
    assert {run.window for run in runs if run.scheme != "sft"} == {3}
    assert list(StepBatches(10, batch_size=2, seed=0)) != list(
        StepBatches(10, batch_size=2, seed=1)
    )


def test_everything_is_written(whole):
    config, result, _ = whole
    out = config.output_dir
    written = strict_json((out / "compare.json").read_text(encoding="utf-8"))
    assert written == json.loads(to_json(result))
    items = pd.read_parquet(out / "items.parquet")
    assert items.groupby("arm").size().to_dict() == {
        "sft-cold": 12,
        "shuffled-w3-cold": 12,
        "untrained": 6,
    }
    assert set(items) >= {"arm", "seed", "id", "nll", "accuracy", "confidence", "token_accuracy"}
    other = items[items["arm"] == "shuffled-w3-cold"]
    mean = result["arms"]["shuffled-w3-cold"]["test"]["nll"]["mean"]
    assert mean == pytest.approx(other["nll"].mean())
    sft = items[items["arm"] == "sft-cold"]
    first = result["contrasts"]["nll"][0]
    assert (first["a"], first["b"]) == ("shuffled-w3-cold", "sft-cold")
    assert first["mean"] == pytest.approx(other["nll"].mean() - sft["nll"].mean())
    table = (out / "table.md").read_text(encoding="utf-8")
    assert "| shuffled-w3-cold | 0.003* |" in table
    assert "shuffled-w3-cold − sft-cold" in table
    assert "commonest answer" in table
    for name in ("forest.png", "curves.png"):
        assert min(plt.imread(out / name).shape[:2]) > 200
    assert not list(out.rglob("checkpoints"))
    assert not list((out / "runs" / "tune").rglob("model"))


def test_a_comparison_that_dies_goes_on_to_the_same_files(
    whole, small, tmp_path, before_call, fresh_accelerator, monkeypatch
):
    """In the middle of a run, and again while the test file is scored."""
    config = replace(small, output_dir=tmp_path / "out")
    before_call(train_module, "training_step", 8, KeyboardInterrupt)
    before_call(compare_module, "evaluate_items", 6, KeyboardInterrupt)
    steps = []
    monkeypatch.setattr(
        compare_module, "train", lambda run: steps.append(run.resume) or train_module.train(run)
    )
    for resume in (False, True, True):
        steps.append("start")
        try:
            compare(replace(config, resume=resume))
        except KeyboardInterrupt:
            assert not (config.output_dir / "compare.json").exists()
    assert steps.count("start") == 3
    assert steps.count(True) == 1  # the run that died went on from its checkpoint
    assert len([one for one in steps if one is False]) == 6
    assert_same_files(config.output_dir, whole[0].output_dir)


def assert_same_files(out, other):
    for name in ("compare.json", "plan.json"):
        both = [json.loads((place / name).read_text(encoding="utf-8")) for place in (out, other)]
        assert without_times(both[0]) == without_times(both[1])
    pd.testing.assert_frame_equal(
        *(pd.read_parquet(place / "items.parquet") for place in (out, other)), check_exact=True
    )
    assert (out / "forest.png").read_bytes() == (other / "forest.png").read_bytes()


def test_other_settings_and_other_records_are_refused_by_name(whole, splits, tmp_path):
    config, _, _ = whole
    with pytest.raises(SettingError, match=r"output_dir: .* holds a comparison; --resume goes on"):
        compare(config)
    with pytest.raises(SettingError, match="seeds: saved 2, given 3; steps: saved 3, given 4"):
        compare(replace(config, resume=True, seeds=3, steps=4))
    for name in ("train", "validation", "test"):
        text = (splits / f"{name}.jsonl").read_text(encoding="utf-8")
        (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
    with (tmp_path / "validation.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(SettingError, match=r"validation.jsonl \(contents\): saved "):
        compare(replace(config, resume=True, data=tmp_path))
    with pytest.raises(SettingError, match=r"resume: there is no plan.json in "):
        compare(replace(config, resume=True, output_dir=tmp_path / "new"))
    assert list(config.output_dir.glob("*.parquet"))


# --- arms, rates, budget -------------------------------------------------------------------------


def test_an_arm_has_a_window_only_where_its_scheme_has_one():
    arms = make_arms(["sft", "bft", "bft.schemes:focal", "shuffled"], [2, 5, 2], ["cold", "warm"])
    assert [arm.name for arm in arms[: len(arms) // 2]] == [
        "sft-cold",
        "bft-w2-cold",
        "bft-w5-cold",
        "bft.schemes-focal-cold",
        "shuffled-w2-cold",
        "shuffled-w5-cold",
    ]
    assert {arm.start for arm in arms[len(arms) // 2 :]} == {"warm"}
    assert Arm("token-only", 2, "cold").path == "bft.schemes:token_only"


def test_the_named_contrasts():
    names = ["sft", "dft", "bft", "shuffled", "token-only", "document-only"]
    pairs = [(a.name, b.name) for a, b in contrasts(make_arms(names, [4], ["warm"]))]
    assert pairs == [
        *((name, "sft-warm") for name in ("dft-warm", "bft-w4-warm", "shuffled-w4-warm")),
        *((f"{name}-w4-warm", "sft-warm") for name in ("token-only", "document-only")),
        ("bft-w4-warm", "shuffled-w4-warm"),
        ("token-only-w4-warm", "bft-w4-warm"),
        ("document-only-w4-warm", "bft-w4-warm"),
    ]


@pytest.mark.parametrize(
    ("nll", "tried", "chosen"),
    [
        ([3.0, 2.0, 2.5, 1.0], 3, 2e-5),
        ([3.0, 2.0, 1.0, 0.5], 4, 4e-5),
        ([3.0, 3.0, 1.0, 0.5], 2, 1e-5),
        ([3.0, 2.0, None, 1.0], 3, 2e-5),
    ],
    ids=["rises", "falls to the end", "stays", "diverges"],
)
def test_rates_ascend_until_the_validation_nll_rises(
    small, tmp_path, monkeypatch, nll, tried, chosen
):
    config = replace(small, learning_rates=(1e-5, 2e-5, 3e-5, 4e-5), output_dir=tmp_path)
    study = compare_module.Study(config, [], [], [], 5, {})
    found = iter(nll)
    configs = []
    monkeypatch.setattr(
        compare_module, "run", lambda *args: configs.append(args[2]) or {"nll": next(found)}
    )
    rows = tune(study, Arm("bft", 3, "cold"))
    assert [row["nll"] for row in rows] == nll[:tried]
    assert best(rows) == chosen
    assert {(run.steps, run.seed, run.window) for run in configs} == {(2, 0, 3)}
    assert report.at_the_edge(study, rows) == (chosen in (1e-5, 4e-5))


def test_a_rate_that_diverges_is_a_result_and_a_run_that_does_is_none(small, tmp_path, monkeypatch):
    def diverge(_):
        raise NonFinite("step 2: the loss is nan")

    monkeypatch.setattr(compare_module, "train", diverge)
    study = compare_module.Study(replace(small, output_dir=tmp_path), [], [], [], 4, {})
    config = compare_module.training(study, Arm("sft", None, "cold"), 0, 1.0, 2)
    row = compare_module.run(study, tmp_path / "rate", config, dict)
    assert (row["nll"], row["why"]) == (None, "step 2: the loss is nan")
    with pytest.raises(NonFinite, match="step 2"):
        compare_module.run(study, tmp_path / "run", config)
    with pytest.raises(NonFinite, match=r"learning_rates: 0\.003 gave no finite loss"):
        tune(study, Arm("sft", None, "cold"))


def test_a_budget_becomes_steps():
    """2 arms, 3 seeds, 2 rates: 6 whole runs and 4 of half the steps are 8 times the steps.

    Around them 10 runs of 1 s, 4 scorings of 2 s, 6 of 5 s, 10 steps of the start: 68 s.
    """
    times = {"per_step": 2.0, "per_run": 1.0, "scoring": 2.0, "testing": 5.0}
    sizes = {"arms": 2, "seeds": 3, "rates": 2, "start": 10}
    assert plan_steps(68 + 8 * 2 * 7 + 1, **times, **sizes)["steps"] == 7
    with pytest.raises(SettingError, match="budget: got 60 s for 6 runs and 4 rates to try"):
        plan_steps(60, **times, **sizes)


@pytest.mark.parametrize(
    ("text", "seconds"), [("2h", 7200), ("1h30m", 5400), ("45s", 45), ("1.5h", 5400)]
)
def test_durations(text, seconds):
    assert seconds_of(text) == seconds


# --- bad inputs ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--schemes dft bft", "--schemes: got dft bft, expected sft among them"),
        ("--schemes sft bfg", "scheme: got 'bfg', expected one of 'sft'"),
        ("--schemes sft sft", r"--schemes: got \['sft', 'sft'\], expected some, each once"),
        ("--windows 0", "--windows: got 0, "),
        ("--windows 2 2", "--windows: got .2, 2., expected some, each once"),
        ("--learning-rates 1e-4 1e-5", "--learning-rates: got .* above 0 and ascending"),
        ("--learning-rates 0", "--learning-rates: got .* above 0 and ascending"),
        ("--budget 2h", "steps, budget: got both, expected one of them"),
        ("--steps None", "steps, budget: got neither, expected one of them"),
        ("--steps None --budget 2x", "--budget: got '2x', expected a duration as 2h"),
        ("--steps None --budget 0h", "--budget: got '0h', expected a duration as 2h"),
        ("--tune-on test", "--tune-on: got test, which is for testing alone"),
        ("--tune-on dev", "--data: there is no file .*dev.jsonl"),
        ("--schemes sft", "schemes, control: got sft alone"),
        ("--seeds 0", "--seeds: got 0, "),
        ("--lora-alpha 2", "--lora-alpha: got 2.0, which does nothing without --lora-rank"),
        ("--forgetting-file no.jsonl", "--forgetting-file: there is no file no.jsonl"),
        ("--model no-such", "--model: expected one of "),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_run(splits, capsys, tmp_path, flags, says):
    out = tmp_path / "out"
    given = ["--data", str(splits), "--output-dir", str(out), "--steps", "2", *shlex.split(flags)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare_module, "train", lambda _: pytest.fail("a run is started"))
        assert main(["compare", *given]) == 2
    printed = capsys.readouterr().err
    line = next(line for line in printed.splitlines() if line.startswith("bft compare: "))
    assert re.search(says, line), line
    assert not list(out.rglob("*.json"))


# --- processes -----------------------------------------------------------------------------------


def test_a_launcher_that_fails_is_named(small, tmp_path):
    study = compare_module.Study(small, [], [], [], 4, {})
    config = replace(
        compare_module.training(study, Arm("sft", None, "cold"), 0, 1.0, 2), output_dir=tmp_path
    )
    with pytest.raises(compare_module.LauncherError, match=r"^false -m bft train .* status 1$"):
        compare_module.launch("false", config)
    with pytest.raises(SettingError, match="launcher: no-such-program cannot be run"):
        compare_module.launch("no-such-program --flag", config)


def test_ranks_of_a_launcher_do_not_compare(small, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SettingError, match="launcher: got several processes"):
        compare(small)


@pytest.mark.slow
def test_a_launched_run_is_the_run_of_this_process(small, tmp_path, fresh_accelerator):
    study = compare_module.Study(small, [], [], [], 2, {})
    config = compare_module.training(study, Arm("shuffled", 3, "cold"), 1, 1e-3, 2)
    compare_module.run(study, tmp_path / "here", config)
    launched = replace(study, config=replace(small, launcher=sys.executable))
    compare_module.run(launched, tmp_path / "there", config)
    assert_same_weights(tmp_path / "here" / "model", tmp_path / "there" / "model")


@pytest.mark.slow
def test_after_kill_9_a_comparison_gives_the_same_files(small, tmp_path, fresh_accelerator):
    """With a window from the records, and other text."""
    other = small.file("validation")
    config = replace(small, windows=("auto",), seeds=1, forgetting_file=other)
    whole, out = tmp_path / "whole", tmp_path / "killed"
    compare(replace(config, output_dir=whole))
    (last,) = (whole / "runs").glob("shuffled-w*-cold")
    words = f"""--data {config.data} --model {config.model} --output-dir {out} --schemes sft
        --control shuffled --windows auto --learning-rates 3e-3 --seeds 1 --steps 3 --batch-size 2
        --save-every 1 --bootstrap 200 --forgetting-file {other}"""
    command = [sys.executable, "-m", "bft", "compare", *words.split()]
    checkpoint = out / "runs" / last.name / "seed-0" / "checkpoints" / "step-0000001"
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        ends = time.monotonic() + 120
        while not checkpoint.exists() and process.poll() is None and time.monotonic() < ends:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, (tmp_path / "log").read_text(encoding="utf-8")
    assert not (out / "compare.json").exists()
    AcceleratorState._reset_state(reset_partial_state=True)
    compare(replace(config, output_dir=out, resume=True))
    assert_same_files(out, whole)
    assert (out / "forgetting.png").read_bytes() == (whole / "forgetting.png").read_bytes()


def test_a_budget_is_measured_before_the_plan_is_made(
    small, tmp_path, fresh_accelerator, monkeypatch
):
    """The arms read their steps from what the plan holds."""
    seen = {}

    def steps(budget, **times):
        seen.update(times, budget=budget)
        return {"steps": 4, "seconds": {}}

    monkeypatch.setattr(compare_module, "plan_steps", steps)
    config = replace(small, steps=None, budget="1h", test_limit=3, output_dir=tmp_path)
    study = compare_module.start(config)
    assert (study.steps, study.tune_steps) == (4, 2)
    assert json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))["steps"] == 4
    assert min(seen[name] for name in ("per_step", "scoring", "testing")) > 0
    assert seen["testing"] == pytest.approx(seen["scoring"] * 3 / 4)  # of 4 records
    assert (seen["budget"], seen["arms"], seen["seeds"], seen["rates"]) == (3600, 2, 2, 1)
    assert not (tmp_path / "runs" / "measure").exists()
    assert compare_module.start(replace(config, resume=True)).steps == 4


# --- the study at 8B -----------------------------------------------------------------------------


def test_the_study_at_8b_is_read_and_its_launcher_takes_its_flags(splits):
    config = parse(CompareConfig, ["--config", "study-8b", "--data", str(splits)], "bft compare")
    assert (config.model, config.start, config.windows) == ("Qwen/Qwen3-8B", "60", ("auto", 256))
    program, command, *flags = shlex.split(config.launcher)
    assert (program, command) == ("accelerate", "launch")
    found = launch_command_parser().parse_args([*flags, "-m", "bft", "train", "--config", "x"])
    assert (found.num_processes, found.use_fsdp, found.fsdp_version) == (8, True, "2")
    assert (found.module, found.training_script) == (True, "bft")
    runs = len(make_arms((*config.schemes, *config.control), [10, 256], ["cold", "warm"]))
    assert runs == 20  # as its comments count


@pytest.mark.slow
def test_the_study_at_8b_runs_one_step_of_a_tiny_model(
    splits, model_dir, tmp_path, fresh_accelerator
):
    flags = ["--config", "study-8b", "--data", str(splits), "--model", str(model_dir)]
    config = parse(CompareConfig, flags, "bft compare")
    small = {"launcher": None, "steps": 1, "start": "1", "seeds": 1, "control": ()}
    cut = {
        "learning_rates": config.learning_rates[:1],
        "windows": ("auto",),
        "output_dir": tmp_path / "out",
    }
    result = compare(replace(config, **small, **cut))
    assert len(result["arms"]) == 6
    assert set(result["floors"]) == {"untrained", "start", "commonest answer"}
