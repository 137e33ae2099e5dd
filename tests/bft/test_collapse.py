"""What `bft train` warns of: windows of whole answers, and a model that learns what it knows."""

import logging
from dataclasses import replace

import pytest
import torch

from bft.collapse import SPAN, collapse, warn_of_window
from bft.train import train
from bft_kernels import token_weights
from tests.support.runs import unevaluated

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


@pytest.mark.parametrize(
    ("scheme", "window", "labels", "warned"),
    [
        ("bft", 20, [10, 10, 3], True),
        ("bft", 18, [10, 10, 3], False),
        ("bft-v1", 10, [10, 10, 30], True),
        ("bft-v1-code", 9, [10, 10, 30], False),
        ("dft", 10**6, [3], False),
        ("sft", 10**6, [3], False),
        ("module:name", 10**6, [3], False),
    ],
)
def test_a_window_of_the_whole_answer_is_told_of(scheme, window, labels, warned, caplog):
    warn_of_window(scheme, window, labels)
    assert ("window: " in caplog.text) == warned
    if scheme.startswith("bft"):  # the warning is true: no longer window changes a number
        confidence = torch.rand(10, dtype=torch.float64)
        ends = torch.tensor([0, 10])
        own, longer = (
            token_weights(confidence, ends, scheme=scheme, window=size) for size in (window, 10**4)
        )
        same = torch.allclose(own.window_confidence, longer.window_confidence, rtol=1e-12)
        assert same == warned


def rows(losses, nlls, confident=0.5):
    return [
        {"loss": loss, "nll": nll, "confident_weight": confident}
        for loss, nll in zip(losses, nlls, strict=True)
    ]


@pytest.mark.parametrize(
    ("losses", "nlls", "told"),
    [
        ([1.0] * SPAN + [0.1] * SPAN, [2.0] * SPAN + [2.5] * SPAN, True),
        ([1.0] * SPAN + [0.1] * SPAN, [2.0] * SPAN + [1.5] * SPAN, False),  # it learns
        ([1.0] * SPAN + [1.1] * SPAN, [2.0] * SPAN + [2.5] * SPAN, False),  # it diverges
        ([1.0] * SPAN + [0.1] * (SPAN - 1), [2.0] * SPAN + [2.5] * (SPAN - 1), False),  # too early
        ([1.0] * SPAN + [float("nan")] * SPAN, [2.0] * SPAN + [2.5] * SPAN, False),
    ],
)
def test_a_falling_loss_and_a_rising_nll_are_a_collapse(losses, nlls, told):
    said = collapse(rows(losses, nlls))
    assert bool(said) == told
    if told:
        assert "from 1 to 0.1 while the nll has risen from 2 to 2.5, and 50% of the weight" in said


def test_a_run_tells_once(config, monkeypatch, caplog):
    """The numbers of a collapse, in place of the step's own."""
    taken = iter(range(100))

    def collapsing(*_, **__):
        step = next(taken)
        return {"loss": 1.0 if step < SPAN else 0.1, "nll": 1.0 + step}

    from bft import train as module

    own = module.training_step
    monkeypatch.setattr(module, "training_step", lambda *given: own(*given) | collapsing())
    steps = 3 * SPAN
    with caplog.at_level(logging.INFO):
        train(unevaluated(config, steps=steps))
    told = [r for r in caplog.records if "the model learns what it knows" in r.getMessage()]
    assert [r.getMessage().partition(":")[0] for r in told] == [f"step {2 * SPAN}"]
    # No terminal shows a bar here, so a line tells of each twentieth of the steps.
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("step ")]
    assert sum(f" of {steps}: loss" in line for line in lines) == steps


def test_a_run_without_first_evaluation_and_model(config):
    result = train(replace(config, steps=2, eval_first=False, save_model=False))
    assert [row["step"] for row in result.evaluations] == [2]
    assert result.model_dir is None
    assert not (config.output_dir / "model").exists()
    assert {"token_weight", "confident_weight"} <= result.history[0].keys()
    assert 0 <= result.history[0]["confident_weight"] <= 1


def test_the_first_step_has_a_rate_and_the_peak_is_reached(config):
    rates = [row["learning_rate"] for row in train(unevaluated(config, steps=10)).history]
    warmup = round(config.warmup_ratio * 10)
    assert rates[0] == pytest.approx(config.learning_rate / (warmup + 1))
    assert max(rates) == rates[warmup] == pytest.approx(config.learning_rate)
    assert 0 < rates[-1] < rates[-2] < rates[warmup]
