"""What draws a run gets the log's numbers, and histograms of its own kind."""

import importlib.metadata
import json
import re
import sqlite3
from dataclasses import replace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bft.config import SettingError
from bft.train import train
from tests.support.runs import assert_same_weights, metrics, run_python, unevaluated

HISTOGRAMS = ["confidence_histogram", "document_weight_histogram"]


@pytest.fixture
def tracked(config):
    how = {"gradient": "sampled", "eps": 0.01, "tensorboard": True, "histogram_every": 2}
    return unevaluated(config, steps=4, **how)


def test_tensorboard_draws_the_log_and_changes_nothing(tracked):
    model_dir = train(tracked).model_dir
    rows = metrics(tracked.output_dir, "train")
    assert [row["step"] for row in rows if HISTOGRAMS[0] in row] == [2, 4]
    folder = str(tracked.output_dir / "tensorboard")
    events = EventAccumulator(folder, size_guidance={"histograms": 0}).Reload()
    for name in HISTOGRAMS:
        (_, last) = events.Histograms(f"train/{name}")
        value = last.histogram_value
        filled = [(place + 1) / 20 for place, count in enumerate(rows[3][name]) if count]
        drawn = zip(value.bucket_limit, value.bucket, strict=True)
        assert [limit for limit, count in drawn if count] == pytest.approx(filled)
        assert value.num == sum(rows[3][name])
        assert abs(value.sum / value.num - rows[3][name.removesuffix("_histogram")]) < 1 / 20
    numbers = rows[0].keys() - {"kind", "step"}
    assert {"low_confidence", "low_run_tokens", "document_weight"} < numbers
    assert 0 < rows[0]["sampled_error"] < 0.1
    for name in numbers:
        values = [event.value for event in events.Scalars(f"train/{name}")]
        assert values == pytest.approx([row[name] for row in rows])
    plain = replace(tracked, tensorboard=False, output_dir=tracked.output_dir.parent / "plain")
    assert_same_weights(train(plain).model_dir, model_dir)


def test_a_tracker_that_is_not_installed_is_named(tracked, monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(SettingError, match=r"^trackers: trackio is not installed; pip install"):
        train(replace(tracked, trackers=("trackio",)))
    assert not tracked.output_dir.exists()


@pytest.mark.slow
def test_wandb_offline_and_trackio_draw_the_log(tracked, flags, tmp_path):
    pytest.importorskip("wandb")
    pytest.importorskip("trackio")
    config = replace(tracked, trackers=("wandb", "trackio"), histogram_every=4)
    places = {"TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}
    done = run_python("-m", "bft", "train", *flags(config), **places)
    assert "offline" in done.stderr
    rows = metrics(config.output_dir, "train")
    with sqlite3.connect(tmp_path / "trackio" / "bft.db") as database:
        found = database.execute("select step, metrics from metrics order by step, id")
        drawn = [(step, json.loads(values)) for step, values in found]
    assert [step for step, _ in drawn] == [1, 2, 3, 4]
    for (_, values), row in zip(drawn, rows, strict=True):
        for name in row.keys() - {"kind", "step", *HISTOGRAMS}:
            assert values[f"train/{name}"] == pytest.approx(row[name])
    (file,) = config.output_dir.glob("wandb/offline-run-*/*.wandb")
    written = file.read_bytes()
    for name in HISTOGRAMS:
        histogram = drawn[-1][1][f"train/{name}"]
        assert histogram["_type"] == "trackio.histogram"
        assert histogram["values"] == rows[-1][name]
        counts = ",".join(str(int(count)) for count in rows[-1][name])
        of_wandb = rf'train/{name}\x12\x05_type\x82\x01\x0b"histogram".*?\[{counts}\]'
        assert re.search(of_wandb.encode(), written, re.DOTALL)
    for row in rows:
        value = json.dumps(row["sampled_error"]).encode()
        assert re.search(rb"train/sampled_error\x82\x01." + re.escape(value), written, re.DOTALL)
