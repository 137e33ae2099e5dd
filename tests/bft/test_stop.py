"""Ctrl-C and SIGTERM: the step is finished, a checkpoint saved, and the resumed run is the same."""

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest

from bft import run as run_module
from bft import train as train_module
from bft.cli import main
from bft.held_out import Evaluator
from bft.signals import Stopped, StopRequest
from bft.train import train
from tests.support.runs import checkpoints, on_two_processes, run_python, unevaluated


@pytest.fixture(autouse=True)
def not_in_the_background():
    """A shell's background job, as these tests may be, ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def kill(*numbers):
    """Sends this process signals, whatever the arguments."""
    return lambda *_: [os.kill(os.getpid(), number) for number in numbers]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_its_step_and_resumes(config, before_call, flags, capfd, number):
    whole = train(replace(config, output_dir=config.output_dir / "whole", eval_every=3))
    config = replace(config, output_dir=config.output_dir / "stopped", eval_every=3)
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    before_call(train_module, "training_step", 2, kill(number))
    assert main(["train", *flags(config)]) == 128 + number
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    error = capfd.readouterr().err
    name = signal.Signals(number).name
    assert f"{name}: stopping as soon as nothing is lost; once more to stop at once" in error
    assert checkpoints(config.output_dir) == ["step-0000002"]
    assert error.strip().splitlines()[-1] == (
        f"bft train: stopped by {name} after step 2 of 6; bft train --config "
        f"{config.output_dir}/config.yaml --resume goes on from step-0000002"
    )
    assert "Traceback" not in error
    result = train(replace(config, resume=True))
    for rows in ("history", "evaluations"):
        assert [(row["step"], row["nll"]) for row in getattr(result, rows)] == [
            (row["step"], row["nll"]) for row in getattr(whole, rows)
        ]


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [(Evaluator, "run", 2), (train_module, "save", 1)],
    ids=["evaluation", "save"],
)
def test_a_signal_between_two_steps_costs_no_other_step(config, before_call, owner, name, call):
    before_call(owner, name, call, kill(signal.SIGTERM))
    with pytest.raises(Stopped, match=r"after step 2 of 6; .* goes on from step-0000002$"):
        train(replace(config, eval_every=2, save_every=2))


def test_a_second_signal_stops_at_once(config, before_call, flags, capsys):
    before_call(train_module, "training_step", 3, kill(signal.SIGTERM, signal.SIGINT))
    assert main(["train", *flags(config)]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "bft train: stopped"
    assert not (config.output_dir / "checkpoints").exists()


def test_a_signal_while_the_model_is_written_waits_for_it(config, before_call):
    before_call(run_module, "save_model", 1, kill(signal.SIGTERM))
    with pytest.raises(Stopped, match=r"SIGTERM after the last step: .*model is not evaluated"):
        train(config)
    assert (config.output_dir / "model" / "model.safetensors").is_file()


def test_outside_of_the_main_thread_and_where_ignored_signals_are_left_alone():
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def ask():
        with StopRequest():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert seen == [before]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a shell's background job
    with StopRequest():
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    assert signal.getsignal(signal.SIGTERM) == before


def test_ctrl_c_while_the_command_starts_is_one_line(tmp_path):
    code = "import os, signal; os.kill(os.getpid(), signal.SIGINT)"
    (tmp_path / "tyro.py").write_text(code)  # as if it came while this is imported
    path = f"{tmp_path}{os.pathsep}{os.getcwd()}"
    done = run_python("-m", "bft", "train", "--help", status=130, PYTHONPATH=path)
    assert done.stderr == "bft: stopped\n"


@pytest.mark.slow
def test_one_of_two_ranks_stops_both(config, flags, tmp_path):
    """The launcher is not told to use CPUs: its ranks find each other, and are one run."""
    config = unevaluated(config, steps=20_000, batch_size=2)
    command = [sys.executable, *on_two_processes(*flags(config))]
    command[5:5] = ["--redirects=3", f"--log-dir={tmp_path / 'logs'}"]
    environment = {k: v for k, v in os.environ.items() if k != "ACCELERATE_USE_CPU"}
    with subprocess.Popen(command, env=environment | {"OMP_NUM_THREADS": "1"}) as process:
        try:
            log, end = config.output_dir / "metrics.jsonl", time.monotonic() + 120
            while not log.exists() or log.read_text(encoding="utf-8").count("\n") < 2:
                assert process.poll() is None
                assert time.monotonic() < end
                time.sleep(0.02)
            pid = int((config.output_dir / ".lock").read_text().split()[1])
            os.kill(pid, signal.SIGTERM)  # rank 0 alone
            process.wait(timeout=120)
        finally:
            process.kill()
    logs = sorted((tmp_path / "logs").rglob("stderr.log"))
    assert len(logs) == 2
    for log in logs:
        text = log.read_text(encoding="utf-8")
        assert "bft train: stopped by SIGTERM after step " in text
        assert "Traceback" not in text
    (folder,) = (config.output_dir / "checkpoints").iterdir()
    names = {path.name for path in folder.iterdir()}
    assert {"random_states_0.pkl", "random_states_1.pkl", "manifest.json"} <= names
