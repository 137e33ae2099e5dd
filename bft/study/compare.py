"""``bft compare``: a plan, a learning rate for each arm, the runs, and at last the test file.

Whatever is finished leaves a file that appears whole, so that a comparison that was killed finds
out where it was. A run goes on from its own last checkpoint, see :mod:`bft.train`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from bft.checkpoint import CHECKPOINTS, checkpoint_folders
from bft.config import CompareConfig, SettingError, StepOptions, TrainConfig, plain, seconds_of
from bft.data import AnswerDataset
from bft.encode import Record
from bft.load import pretrained
from bft.metrics import naming, to_json
from bft.nonfinite import NonFinite
from bft.records import read_jsonl
from bft.run_folder import CONFIG, METRICS, MODEL, locked
from bft.same_run import differences
from bft.signals import Stopped
from bft.study.arms import COLD, WARM, Arm, make_arms
from bft.study.items import evaluate_items, free, mean_nll
from bft.train import train

logger = logging.getLogger(__name__)

PLAN, RESULT, ITEMS = "plan.json", "result.json", "items.json"
# Where a comparison reads and writes, and how its steps are computed. The data and the given start
# are compared by their contents.
_MAY_CHANGE = ("output_dir", "resume", "data", "launcher", "save_every", "backend")
_PROBES = (1, 4)  # steps of the two runs that measure what a run and a step take
_SAVES = 4  # checkpoints of a run, if save_every does not say more


class LauncherError(RuntimeError):
    """A training run in a process of its own that failed; it has said why."""


@dataclass(frozen=True)
class Study:
    """A comparison that is under way."""

    config: CompareConfig
    train: list[Record]
    tune: list[Record]
    arms: list[Arm]
    steps: int
    plan: dict[str, Any]  # as plan.json holds it

    @property
    def runs(self) -> Path:
        """The folder of the runs."""
        return self.config.output_dir / "runs"

    @property
    def tune_steps(self) -> int:
        """Steps of a run that tries a rate."""
        return max(1, self.steps // 2)

    def start_of(self, arm: Arm) -> str:
        """The model that the arm's runs start from."""
        config = self.config
        if arm.start == COLD or config.start is None:
            return config.model
        return str(self.runs / "start" / MODEL) if config.start.isdigit() else config.start

    def folder(self, arm: Arm, seed: int) -> Path:
        """Where a run of the arm writes."""
        return self.runs / arm.name / f"seed-{seed}"


def compare(config: CompareConfig) -> dict[str, Any]:
    """Compares as ``config`` says. Returns what compare.json holds.

    Raises:
        SettingError: the folder holds another comparison, or one with other settings; a package is
            missing; several processes were started.
        NonFinite: no rate of an arm, or not a run, ended with finite numbers.
        LauncherError: a run of ``launcher`` failed.
        FolderInUse, CheckpointError, WriteError, Stopped: as :func:`bft.train.train`.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise SettingError(
            "launcher: got several processes of bft compare, expected one that starts them: "
            "--launcher 'torchrun --nproc-per-node 8'"
        )
    try:
        from bft.study import report
    except ModuleNotFoundError as error:
        raise SettingError(
            f"bft compare needs {error.name}, which is not installed; run: "
            "pip install 'bft-kernels[study]'"
        ) from error
    with locked(config.output_dir):
        study = start(config)
        tuned: dict[Arm, list[dict[str, Any]]] = {}
        for phase in (COLD, WARM):  # the common start needs the rate of sft
            arms = [arm for arm in study.arms if arm.start == phase]
            if phase == WARM and arms and config.start is not None and config.start.isdigit():
                make_start(study, best(tuned[Arm("sft", None, COLD)]))
            for arm in arms:
                tuned[arm] = tune(study, arm)
        done = {
            (arm, seed): run(
                study,
                study.folder(arm, seed),
                training(study, arm, seed, best(tuned[arm]), study.steps),
            )
            for seed in range(config.seeds)
            for arm in study.arms
        }
        return report.write(study, tuned, done, read_test(study))


def start(config: CompareConfig) -> Study:
    """Reads the files, and the plan; without one, measures and makes it."""
    path = config.output_dir / PLAN
    if config.resume != path.exists():
        raise SettingError(
            f"resume: there is no {PLAN} in {config.output_dir}; leave --resume out"
            if config.resume
            else f"output_dir: {config.output_dir} holds a comparison; --resume goes on with it, "
            "or give another folder"
        )
    pretrained(config.model)  # raises for a name that is none
    if config.start is not None and not config.start.isdigit():
        pretrained(config.start)
    train_records = read_jsonl(config.file("train"))
    tune_records = read_jsonl(config.file(config.tune_on), limit=config.tune_limit)
    known_by = identity(config)
    if config.resume:
        plan = json.loads(path.read_text(encoding="utf-8"))
        if wrong := differences(plan["identity"], known_by):
            raise SettingError(
                f"resume: {path} is of a comparison with other settings: {'; '.join(wrong)}"
            )
    else:
        plan = {"identity": known_by, "auto": auto_window(config, train_records)}
    windows = [plan["auto"] if window == "auto" else window for window in config.windows]
    starts = [COLD] if config.start is None else [COLD, WARM]
    arms = make_arms((*config.schemes, *config.control), windows, starts)
    study = Study(config, train_records, tune_records, arms, plan.get("steps", 1), plan)
    if not config.resume:
        plan |= measured(study) if config.steps is None else {"steps": config.steps}
        plan["arms"] = [arm.name for arm in arms]
        write_whole(path, plan)
    study = replace(study, steps=plan["steps"])
    logger.info("%d arms, %d seeds, %d steps a run", len(arms), config.seeds, study.steps)
    return study


def identity(config: CompareConfig) -> dict[str, Any]:
    """The settings that the numbers depend on, and the contents of the files before the test."""
    known = {name: value for name, value in plain(config).items() if name not in _MAY_CHANGE}
    for name in ("train", config.tune_on):
        known[f"{name}.jsonl (contents)"] = digest(config.file(name))
    return known


def digest(path: Path) -> str:
    """A short name of a file's contents."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def auto_window(config: CompareConfig, records: list[Record]) -> int | None:
    """The window that `auto` stands for; None if nothing asks for it."""
    if "auto" not in config.windows:
        return None
    tokenizer = AutoTokenizer.from_pretrained(str(pretrained(config.model)))
    return AnswerDataset(records, tokenizer, max_length=config.max_length).auto_window()


def measured(study: Study) -> dict[str, Any]:
    """The number of steps that the budget allows, from what two short runs take.

    Counted are the runs of all arms, seeds and rates, and the scoring of their models. The test
    file is not read for it: its size tells how long it takes beside the file to tune on.
    """
    config = study.config
    assert config.budget is not None
    took = []
    for steps in _PROBES:
        folder = study.runs / "measure" / f"{steps}-steps"
        shutil.rmtree(folder, ignore_errors=True)
        short = training(study, study.arms[0], 0, config.learning_rates[0], steps)
        took.append(run(study, folder, short)["seconds"])
    per_step = (took[1] - took[0]) / (_PROBES[1] - _PROBES[0])
    rows = step_rows(study.runs / "measure" / f"{_PROBES[1]}-steps")
    per_step = max(per_step, statistics.median(row["seconds"] for row in rows))
    per_run = max(0.0, took[0] - per_step)
    began = time.perf_counter()
    evaluate_items(config.model, study.tune, train=study.train, max_length=config.max_length)
    scoring = time.perf_counter() - began
    tune_file = config.file(config.tune_on)
    records = len(tune_file.read_bytes().splitlines())
    tests = records * config.file("test").stat().st_size / tune_file.stat().st_size
    tests = min(tests, config.test_limit or math.inf)
    shutil.rmtree(study.runs / "measure")
    return plan_steps(
        seconds_of(config.budget),
        per_step=per_step,
        per_run=per_run,
        scoring=scoring,
        testing=scoring * tests / len(study.tune),
        arms=len(study.arms),
        seeds=config.seeds,
        rates=len(config.learning_rates),
        start=int(config.start) if config.start and config.start.isdigit() else 0,
    )


def plan_steps(
    budget: float,
    *,
    per_step: float,
    per_run: float,
    scoring: float,
    testing: float,
    arms: int,
    seeds: int,
    rates: int,
    start: int,
) -> dict[str, Any]:
    """The steps of a run that fill ``budget`` seconds if every rate is tried, and what it rests on.

    Raises:
        SettingError: there is no time for one step of each run.
    """
    tried, runs = arms * rates, arms * seeds
    fixed = tried * (per_run + scoring) + runs * (per_run + testing) + start * per_step
    steps = math.floor((budget - fixed) / (per_step * (runs + tried / 2)))
    if steps < 1:
        needed = fixed + per_step * (runs + tried)
        raise SettingError(
            f"budget: got {budget:.0f} s for {runs} runs and {tried} rates to try, expected at "
            f"least {needed:.0f} s; or give fewer schemes, windows, learning_rates or seeds"
        )
    seconds = {"step": per_step, "run": per_run, "tune_scoring": scoring, "test_scoring": testing}
    return {"steps": steps, "seconds": seconds}


def training(study: Study, arm: Arm, seed: int, rate: float, steps: int) -> TrainConfig:
    """A training run of the arm."""
    config = study.config
    shared = {option.name: getattr(config, option.name) for option in fields(StepOptions)}
    loss = {name: getattr(config, name) for name in ("gradient", "eps", "normalize", "backend")}
    shared["save_every"] = config.save_every or max(1, steps // _SAVES)
    return TrainConfig(
        train_file=config.file("train"),
        model=study.start_of(arm),
        scheme=arm.path,
        window=TrainConfig.window if arm.window is None else arm.window,
        steps=steps,
        learning_rate=rate,
        seed=seed,
        tensorboard=False,
        **shared,
        **loss,
    )


def tune(study: Study, arm: Arm) -> list[dict[str, Any]]:
    """The rates that were tried, each with the NLL of a validation label (None: not finite).

    They ascend, and end with the first whose NLL is not below that of the one before.

    Raises:
        NonFinite: no rate gave a finite one.
    """
    tried: list[dict[str, Any]] = []
    for rate in study.config.learning_rates:
        folder = study.runs / "tune" / arm.name / f"{rate:g}"
        result = run(
            study,
            folder,
            training(study, arm, 0, rate, study.tune_steps),
            lambda folder: {"nll": validation_nll(study, folder / MODEL)},
        )
        shutil.rmtree(folder / MODEL, ignore_errors=True)
        nll = result["nll"]
        tried.append({"learning_rate": rate, **result})
        if nll is None or (len(tried) > 1 and nll >= tried[-2]["nll"]):
            break
    best(tried)
    return tried


def best(tried: list[dict[str, Any]]) -> float:
    """The rate with the lowest NLL. Raises NonFinite if there is none."""
    finite = [row for row in tried if row["nll"] is not None]
    if not finite:
        raise NonFinite(
            f"learning_rates: {tried[0]['learning_rate']:g} gave no finite loss; expected lower "
            "ones to start with"
        )
    return float(min(finite, key=lambda row: row["nll"])["learning_rate"])


def validation_nll(study: Study, model: Path) -> float | None:
    """The NLL of a label, in nats; None if it is not finite."""
    rows = evaluate_items(
        str(model), study.tune, train=study.train, max_length=study.config.max_length, desc="tune"
    )
    nll = mean_nll(rows)
    return nll if math.isfinite(nll) else None


def make_start(study: Study, rate: float) -> None:
    """Trains the common start of the warm arms: sft, at its own rate."""
    assert study.config.start is not None
    sft = Arm("sft", None, COLD)
    run(study, study.runs / "start", training(study, sft, 0, rate, int(study.config.start)))


def run(
    study: Study,
    folder: Path,
    config: TrainConfig,
    measure: Callable[[Path], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Trains in ``folder`` unless that is done, from its last checkpoint if it has one.

    Returns what ``measure`` found in the folder, ``steps``, and the ``seconds`` that the process
    which finished the run took for it. With ``measure`` a run whose loss is not finite is a result
    too: ``nll`` is None, and ``why`` says more.
    """
    path = folder / RESULT
    if not path.exists():
        began = time.perf_counter()
        goes_on = bool(checkpoint_folders(folder))
        config = replace(config, output_dir=folder, resume=goes_on, overwrite=not goes_on)
        logger.info("%s: %d steps at %g", folder, config.steps or 0, config.learning_rate)
        try:
            if study.config.launcher is None:
                train(config)
            else:
                launch(study.config.launcher, config)
            free()
            found = {} if measure is None else measure(folder)
        except Stopped as error:
            done = f"during {folder}; bft compare goes on there with --resume"
            raise Stopped(error.exit_status - 128, done) from error
        except NonFinite as error:
            if measure is None:
                raise
            found = {"nll": None, "why": str(error)}
        took = time.perf_counter() - began
        write_whole(path, {**found, "steps": config.steps, "seconds": took})
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return result


def launch(launcher: str, config: TrainConfig) -> None:
    """A training run as processes of ``launcher``.

    Raises:
        LauncherError: it ended with another status than 0.
        Stopped: it was stopped by a signal.
    """
    path = config.output_dir.with_name(f"{config.output_dir.name}.{CONFIG}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(config.to_yaml(), encoding="utf-8")
    command = [*shlex.split(launcher), "-m", "bft", "train", "--config", str(path)]
    try:
        status = subprocess.run(command, check=False).returncode
    except OSError as error:
        raise SettingError(
            f"launcher: {command[0]} cannot be run ({error.strerror}), expected a program that "
            "starts a module, as torchrun or accelerate launch"
        ) from error
    if status in (130, 143):
        raise Stopped(status - 128, "in the launched processes")
    if status:
        raise LauncherError(f"{shlex.join(command)} ended with status {status}")


def read_test(study: Study) -> dict[str, Any]:
    """Reads the test file, and scores with it every run, the start and the untrained model.

    Returns ``digest``, and ``rows`` and ``forgetting`` (or None) of each ``(arm or name, seed)``.
    """
    config = study.config
    path, forgetting = config.file("test"), config.forgetting_file
    known_by = [digest(path), config.test_limit]
    known_by += [] if forgetting is None else [digest(forgetting)]
    records = read_jsonl(path, limit=config.test_limit)
    other = None if forgetting is None else read_jsonl(forgetting)
    found: dict[Any, dict[str, Any]] = {}
    for key, model, folder in models(study):
        file = folder / ITEMS
        scored = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        if scored.get("of") != known_by:
            rows = evaluate_items(
                model, records, train=study.train, max_length=config.max_length, desc="test"
            )
            scored = {"of": known_by, "rows": rows, "forgetting": None}
            if other is not None:
                rows = evaluate_items(
                    model, other, train=[], max_length=config.max_length, desc="forgetting"
                )
                scored["forgetting"] = mean_nll(rows)
            write_whole(file, scored)
        found[key] = scored
    return {"digest": known_by[0], "models": found}


def models(study: Study) -> Iterator[tuple[Any, str, Path]]:
    """What is scored: ``(arm, seed)`` or a name, the model, and the folder of its scores."""
    yield "untrained", study.config.model, study.runs / "untrained"
    if any(arm.start == WARM for arm in study.arms):
        yield "start", study.start_of(Arm("sft", None, WARM)), study.runs / "start"
    for arm in study.arms:
        for seed in range(study.config.seeds):
            folder = study.folder(arm, seed)
            yield (arm, seed), str(folder / MODEL), folder


def step_rows(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's steps in metrics.jsonl."""
    lines = (folder / METRICS).read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == "train"]


def write_whole(path: Path, value: Any) -> None:
    """Writes JSON that is there whole, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with naming(partial):
        partial.write_text(to_json(value, indent=1), encoding="utf-8")
        os.replace(partial, path)


def command_line() -> str:
    """What was typed."""
    return shlex.join(["bft", *sys.argv[1:]])
