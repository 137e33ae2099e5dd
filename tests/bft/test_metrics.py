"""Step metrics, the run's log."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from bft.loss import IGNORE, Targets
from bft.metrics import LOW_CONFIDENCE, MetricLog, StepMeter, peak_memory_bytes
from bft_kernels import balanced_linear_cross_entropy
from tests.support.runs import files_up_to


def test_meter_takes_means_over_micro_batches():
    torch.manual_seed(0)
    weight = torch.randn(11, 4)
    meter = StepMeter(torch.device("cpu"))
    nll, losses, labels = [], [], 0
    for rows in (2, 3):
        hidden, target = torch.randn(rows, 5, 4), torch.randint(11, (rows, 5))
        target[:, 0] = -100
        loss, stats = balanced_linear_cross_entropy(hidden, weight, target, return_stats=True)
        meter.add(loss, Targets(target, None), stats, "sequence")
        nll.append(stats.nll.sum())
        losses.append(loss)
        labels += rows * 4
    values = meter.read(Accelerator(cpu=True))
    assert values["labelled"] == labels
    assert values["tokens"] == 25
    assert values["nll"] == pytest.approx(float(sum(nll)) / labels)
    assert values["loss"] == pytest.approx(float(sum(losses)))
    assert 0 < values["confidence"] < 1
    assert values["tokens_per_second"] == pytest.approx(25 / values["seconds"])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("normalize", ["sequence", "token"])
def test_meter_tells_of_documents_runs_and_the_samples_error(normalize, packed):
    """Beside loops over documents in Python, and the expected error of the gradient of logits."""
    draw = torch.Generator().manual_seed(0)
    hidden = 2 * torch.randn(3, 16, 4, generator=draw)
    weight = torch.randn(11, 4, generator=draw)
    target = (hidden @ weight.T).argmax(-1)  # confident, but for some
    target[:, 5:9] = torch.randint(11, (3, 4), generator=draw)
    target[:, ::4] = target[2] = IGNORE
    factor = torch.randn(3, 16, generator=draw).masked_fill(target == IGNORE, torch.nan)
    cu_seqlens = torch.tensor([0, 7, 7, 32, 48]) if packed else None
    loss, stats = balanced_linear_cross_entropy(
        hidden, weight, target, cu_seqlens=cu_seqlens, window=2, normalize=normalize,
        token_weight=factor.nan_to_num(), gradient="sampled", eps=0.1, seed=3, return_stats=True,
    )  # fmt: skip
    meter = StepMeter(torch.device("cpu"))
    for _ in range(2):
        meter.add(loss, Targets(target, cu_seqlens, factor), stats, normalize)
    values = meter.read(Accelerator(cpu=True))

    edges = [0, 7, 7, 32, 48] if packed else [0, 16, 32, 48]
    labelled, low, runs, error, square, weights = 0, 0, 0, 0.0, 0.0, []
    for number, (start, end) in enumerate(itertools.pairwise(edges)):
        tokens = [i for i in range(start, end) if target.flatten()[i] != IGNORE]
        labelled += len(tokens)
        weights += [float(stats.sequence_weight[number])] * bool(tokens)
        is_low = [bool(stats.window_confidence.flatten()[i] < LOW_CONFIDENCE) for i in tokens]
        low += sum(is_low)
        runs += sum(key for key, _ in itertools.groupby(is_low))
        for i in tokens:
            share = float(stats.token_weight.flatten()[i] * factor.flatten()[i]) * weights[-1]
            share /= len(tokens) if normalize == "sequence" else 1
            error += share**2 * float(stats.variance.flatten()[i])
            square += share**2 * (1 - float(stats.confidence.flatten()[i])) ** 2
    assert runs > len(weights) == 2  # a run ends within a document
    assert values["documents"] == 2 * len(weights)
    assert values["document_weight"] == pytest.approx(sum(weights) / len(weights))
    assert values["low_confidence"] == pytest.approx(low / labelled)
    assert values["low_run_tokens"] == pytest.approx(low / runs)
    assert values["sampled_error"] == pytest.approx(math.sqrt(error / square))
    for name, inside in (
        ("confidence", stats.confidence[target != IGNORE]),
        ("document_weight", torch.tensor(weights)),
    ):
        counts = torch.histc(inside.clamp(0, 1), 20, 0, 1)
        assert values[f"{name}_histogram"] == (2 * counts).tolist()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells it twice")
def test_peak_memory_is_the_processs_in_bytes():
    status = Path("/proc/self/status").read_text()
    kib = int(status.partition("VmHWM:")[2].split()[0])
    # A process starts with the peak of the one that started it.
    assert 0.99 * 1024 * kib <= peak_memory_bytes(torch.device("cpu")) < 100 * 1024 * kib


def test_log_drops_what_comes_after_the_step_it_resumes_from(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricLog(path, enabled=True)
    for step in (1, 2, 3):
        log.write("train", step, {"loss": 1.0 / step})
    with path.open("a") as file:
        file.write('{"kind": "train", "st')  # died here
    resumed = MetricLog(path, enabled=True, resumed_step=2)
    resumed.write("train", 3, {"loss": 9.0})
    assert [row["step"] for row in resumed.of("train")] == [1, 2, 3]
    rows = MetricLog(path, enabled=True, resumed_step=3).rows
    assert [row["loss"] for row in rows] == [1, 0.5, 9]


def test_log_is_json_where_numbers_are_none(tmp_path):
    """And a resumed run reads a number's null as NaN, but no other null."""
    path = tmp_path / "metrics.jsonl"
    log = MetricLog(path, enabled=True)
    log.write("train", 1, {"loss": math.nan, "grad_norm": math.inf})
    log.write("eval", 1, {"nll": -math.inf, "accuracy": None, "per_answer": {"a": [math.nan]}})
    assert path.read_text().splitlines() == [
        '{"kind": "train", "step": 1, "loss": null, "grad_norm": null}',
        '{"kind": "eval", "step": 1, "nll": null, "accuracy": null, "per_answer": {"a": [null]}}',
    ]
    train, held_out = MetricLog(path, enabled=True, resumed_step=1).rows
    assert math.isnan(train["loss"])
    assert held_out["accuracy"] is None


def test_lines_that_a_full_disk_does_not_take_wait(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    log = MetricLog(path, enabled=True)
    log.write("train", 1, {"loss": 1.0})
    before = path.read_bytes()
    with files_up_to(len(before) + 5):  # in a line's middle
        for step in (2, 3):
            log.write("train", step, {"loss": 1.0 / step})
            assert path.read_bytes() == before
    assert len(log.waiting) == 2
    assert caplog.text.count("wait in memory") == 1
    log.write("train", 4, {"loss": 0.25})
    assert not log.waiting
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]
