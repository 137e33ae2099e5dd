"""Steps of fine-tuning with each loss, and the search for the largest batch."""

import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks.measure import train_step
from benchmarks.measure.largest_batch import attempt
from benchmarks.measure.memory import in_use
from benchmarks.measure.train_step import Stepper, documents, time_steps, token_rows
from benchmarks.providers import at_head
from benchmarks.providers.at_head import LOSSES
from benchmarks.results.schema import PARTS, read
from benchmarks.run import train
from bft.config import TrainConfig
from tests.support.models import tiny

TEXT = "the heart pumps blood through a vessel and insulin lowers sugar in it"
WORDS = TEXT.split()
VOCABULARY = 8000


@pytest.fixture
def config(tmp_path):
    """Settings with a model of random weights, its tokenizer and a text."""
    spread = {"initializer_range": 0.3}  # some tokens are more likely than others
    model = tiny("LlamaForCausalLM", vocab_size=VOCABULARY, hidden_size=32, **spread)
    words = {word: place for place, word in enumerate(["<end>", *WORDS])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    model.save_pretrained(tmp_path / "tiny")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    tokenizer.save_pretrained(tmp_path / "tiny")
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join([TEXT, "", " ".join(reversed(WORDS))]) + "\n")
    sizes = {"batch": 2, "length": 12, "window": 4, "max_batch": 4, "repeats": 2}
    where = {"model": str(tmp_path / "tiny"), "texts": texts, "device": "cpu", "force": True}
    return sizes | where


def gradients(stepper, label, ids):
    """The loss and the gradients that the optimizer is given, clipped."""
    seen = []
    parameters = [p for group in stepper.optimizer.param_groups for p in group["params"]]

    def look(*_):
        seen.extend(parameter.grad.clone() for parameter in parameters)

    hook = stepper.optimizer.register_step_pre_hook(look)
    loss = stepper.step(label, ids)
    hook.remove()
    assert seen
    assert all(parameter.grad is None for parameter in parameters)
    return loss, *seen


COMPARED = [
    loss.label
    for loss in LOSSES
    if loss.name != "cut-cross-entropy"  # takes long to compile
    and not loss.why_missing("cpu")
    and loss.name not in ("eager", "sampled")
]


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_losses_of_a_weighting_agree(config, lora):
    settings = train.Config(**config | {"lora": lora})
    ids = torch.randint(VOCABULARY, (3, 12))
    assert "exact, bft" in COMPARED
    for label in COMPARED:
        results = []
        for each in ("eager, " + label.partition(", ")[2], label):
            torch.manual_seed(0)  # of the adapters
            stepper = Stepper(settings.job())
            stepper.optimizer.param_groups[0]["lr"] = 0.0
            results.append(gradients(stepper, each, ids))
        for expected, got in zip(*results, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_the_weightings_differ_and_windows_reach_the_loss(config):
    ids = torch.randint(VOCABULARY, (3, 12))
    losses = {}
    for window in (2, 12):
        stepper = Stepper(train.Config(**config | {"window": window}).job())
        stepper.optimizer.register_step_pre_hook(lambda optimizer, *_: optimizer.zero_grad())
        for label in ("eager, plain", "eager, bft", "exact, bft"):
            losses[label, window] = float(stepper.step(label, ids))
    assert losses["eager, plain", 2] == losses["eager, plain", 12]
    distinct = losses["eager, plain", 2], losses["eager, bft", 2], losses["eager, bft", 12]
    assert min(abs(a - b) for a, b in itertools.combinations(distinct, 2)) > 1e-3
    for window in (2, 12):
        assert losses["eager, bft", window] == pytest.approx(losses["exact, bft", window], rel=1e-5)


@pytest.mark.parametrize("label", ["eager, plain", "torch chunked, plain", "sampled, bft"])
def test_the_parts_of_a_step_are_told_apart(config, label, monkeypatch):
    stepper = Stepper(train.Config(**config).job())
    ids = torch.randint(VOCABULARY, (2, 12))
    stepper.step(label, ids)  # the patch measures the model
    now = 0
    monkeypatch.setattr(train_step, "time", SimpleNamespace(perf_counter=lambda: now))

    def takes(seconds):
        def pass_time(*_):
            nonlocal now
            now += seconds

        return pass_time

    layer, head = stepper.model.model.layers[-1], stepper.model.get_output_embeddings()
    layer.register_forward_hook(takes(1))
    head.register_forward_hook(takes(20))  # the patch calls it too
    layer.register_full_backward_hook(takes(300))
    stepper.optimizer.register_step_pre_hook(takes(4000))
    stepper.step(label, ids)
    assert stepper.clock.parts == dict(zip(PARTS, (1, 20, 0, 300, 4000), strict=True))


def test_a_step_trains(config):
    stepper = Stepper(train.Config(**config).job())
    for group in stepper.optimizer.param_groups:
        group["lr"] = 0.01
    ids = torch.randint(VOCABULARY, (2, 12))
    for label in ("eager, plain", "sampled, bft"):
        before = stepper.step(label, ids)
        for _ in range(4):
            after = stepper.step(label, ids)
        assert after < before - 0.05


def test_turns_are_timed_and_a_loss_that_fails_says_why(config, monkeypatch):
    def broken(*_):
        raise ValueError("no such luck")

    class Broken(at_head.StepLoss):
        def make(self, settings):
            return broken

    monkeypatch.setattr(at_head, "LOSSES", (*LOSSES, Broken("broken", "plain")))
    job = train.Config(**config).job()
    turns = torch.randint(VOCABULARY, (3, 2, 12))
    results = time_steps(job, ["broken, plain", "exact, plain"], turns, keep=False)
    assert results["broken, plain"] == "ValueError: no such luck"
    assert len(results["exact, plain"]) == 2


def test_a_head_that_a_peer_cannot_express_is_refused():
    loss = at_head.find("torch chunked, plain").make(TrainConfig(Path("unread.jsonl")))
    head = at_head.Head(torch.zeros(8, 4), softcap=30.0)
    with pytest.raises(at_head.UnsupportedModel, match=r"got one with .*softcap"):
        loss(torch.zeros(1, 2, 4), head, torch.zeros(1, 2, dtype=torch.int64), None, None)


def test_rows_are_cut_from_joined_documents():
    rows = token_rows([[1, 2, 3], [4, 5], [6, 7]], 3, 5)
    assert rows.tolist() == [[1, 2, 3], [4, 5, 6]] * 2 + [[1, 2, 3]]
    with pytest.raises(SystemExit, match="texts: got 2 tokens, expected at least length, 3"):
        token_rows([[1, 2]], 3, 5)


def test_texts_and_questions_become_tokens(config):
    settings = train.Config(**config)
    found = list(documents(settings.job().settings, settings.texts))
    ids = list(range(1, len(WORDS) + 1))
    assert found == [[*ids, 0], [*reversed(ids), 0]]


@pytest.mark.parametrize(
    ("text", "size"), [("8GiB", 2**33), ("1.5 MiB", 3 * 2**19), ("2GB", 2 * 10**9), ("77", 77)]
)
def test_sizes(text, size):
    assert train.parse_bytes(text) == size


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"limit": ("8 gigs",)}, "limit: got '8 gigs', expected a number and a unit"),
        ({"limit": ("0GiB",)}, "limit: got '0GiB'"),
        ({"losses": ("eager", "egaer")}, "losses: got 'egaer', expected some of eager"),
        ({"batch": 0}, "batch: got 0, expected at least 1"),
    ],
)
def test_refuses_bad_settings(settings, message):
    with pytest.raises(SystemExit, match=message):
        train.Config(**settings)


def test_writes_a_row_a_loss(config, tmp_path, capsys):
    config |= {"losses": ("eager", "liger fused", "exact"), "memory": False}
    train.main(train.Config(**config, output=tmp_path / "train.csv"))
    rows = read(tmp_path / "train.csv")
    told = ["eager, plain", "exact, plain", "eager, bft", "exact, bft"]
    told += ["liger fused, plain", "liger fused, bft"]
    assert [f"{row['loss']}, {row['weighting']}" for row in rows] == told
    for row in rows[-2:]:
        assert row["reason"].startswith(("it runs on a GPU only", "liger-kernel is not"))
        assert row["seconds"] == ""
    for row in rows[:-2]:
        assert row["mode"] == "full"
        assert row["model"] == "tiny"
        assert float(row["tokens_per_second"]) == pytest.approx(24 / float(row["seconds"]))
        assert float(row["spread"]) >= 0
        assert all(float(row[f"{part}_seconds"]) > 0 for part in PARTS)
        assert row["reason"] == row["largest_batch"] == ""
    assert "exact" in capsys.readouterr().out


@pytest.mark.slow
def test_limits_are_kept_in_processes_of_their_own(config, tmp_path):
    job = train.Config(**config).job()
    ids = torch.randint(VOCABULARY, (256, 128))
    ours, eager = (attempt(job, f"{name}, plain", ids).peak for name in ("exact", "eager"))
    assert ours is not None
    assert eager is not None
    logits = 256 * 128 * VOCABULARY * 4
    assert eager - ours > logits
    between = (ours + eager) // 2
    assert attempt(job, "eager, plain", ids, limit=between).status == "over"
    slow = attempt(job, "exact, plain", ids, limit=between, patience=0.01)
    assert (slow.status, slow.reason) == ("slow", "took longer than 0.01 s")
    assert attempt(job, "exact, plain", ids[:1] + VOCABULARY).reason.startswith("IndexError")

    # A quarter of what this process itself has is too little for any.
    limits = f"{in_use('cpu') // 4}", f"{between}"
    config |= {"losses": ("exact",), "weightings": ("plain",), "memory": False, "repeats": 0}
    config |= {"max_batch": 2, "limit": limits, "output": tmp_path / "train.csv"}
    train.main(train.Config(**config))
    found = [(row["largest_batch"], row["note"]) for row in read(config["output"])]
    assert found == [("0", "1 did not fit"), ("2", "at least; no larger one was allowed")]
