"""Schemes by import path: the examples are their formulas, and a wrong path is named."""

import functools
import math
import pickle
import re
import shutil
import sys
from dataclasses import replace

import pytest
import torch
import yaml

from bft import schemes
from bft.cli import main
from bft.loss import IGNORE, Head, HeadLoss
from bft.train import train
from bft_kernels import reference
from tests.support.runs import metrics, unevaluated

FORMULAS = {
    "dft": lambda c: c,
    "profit": lambda c: float(c >= 0.1),
    "infosft": lambda c: c * max(0.0, 1 - math.log(c / (1 - c)) / math.log(0.93 / 0.07)),
    "focal": lambda c: (1 - c) ** 2,
}
NAMES = pytest.mark.parametrize("name", FORMULAS)


@NAMES
def test_the_examples_are_their_formulas(name):
    confidence = torch.tensor(
        [1e-30, 1e-3, 0.09, 0.11, 0.5, 0.92, 0.94, 0.999], dtype=torch.float64
    )
    token, document = getattr(schemes, name)(confidence, torch.tensor([0, 3, 3, 8]))
    want = torch.tensor([FORMULAS[name](c) for c in confidence.tolist()], dtype=torch.float64)
    torch.testing.assert_close(token, want, rtol=1e-12, atol=1e-28)
    assert document.tolist() == [1, 1, 1]


@NAMES
def test_the_examples_are_finite_at_both_ends(name):
    token, _ = getattr(schemes, name)(torch.tensor([0.0, 1e-45, 1.0]), torch.tensor([0, 3]))
    ends = {"dft": [0, 1], "profit": [0, 1], "infosft": [0, 0], "focal": [1, 0]}
    assert token[[0, 2]].tolist() == ends[name]
    assert token[1] == pytest.approx(ends[name][0], abs=1e-40)


@NAMES
def test_a_loss_by_import_path_is_the_references_with_the_function(name):
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 9, 5, generator=draw, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 5, generator=draw, dtype=torch.float64, requires_grad=True)
    target = torch.randint(7, (2, 9), generator=draw)
    target[:, ::4] = IGNORE
    loss = HeadLoss(scheme=f"bft.schemes:{name}", normalize="token")
    assert pickle.loads(pickle.dumps(loss)) == loss
    got, _ = loss(hidden, Head(weight), target)
    want = reference.balanced_linear_cross_entropy(
        hidden.flatten(0, 1),
        weight,
        target.flatten(),
        torch.tensor([0, 9, 18]),
        scheme=getattr(schemes, name),
        normalize="token",
    )
    leaves = (hidden, weight)
    both = [(value, *torch.autograd.grad(value, leaves)) for value in (got, want)]
    torch.testing.assert_close(*both, rtol=1e-10, atol=1e-14)
    if name == "dft":
        named, _ = HeadLoss(scheme="dft", normalize="token")(hidden, Head(weight), target)
        torch.testing.assert_close(got, named, rtol=1e-12, atol=0)


# Two documents, the first of two tokens; a window of 2 is the token before and the token.
CONFIDENCE, BOUNDS = [0.2, 0.6, 0.9, 0.1, 0.5], [0, 2, 5]
TOKEN, DOCUMENT = [1, 1, 1, 0.1 / 0.5, 1], [1 - 0.2, 1 - 0.3]  # windows .2 .4 | .9 .5 .3


def weights_of(scheme):
    confidence = torch.tensor(CONFIDENCE, dtype=torch.float64)
    return scheme(confidence, torch.tensor(BOUNDS), window=2)


@pytest.mark.parametrize(
    ("name", "token", "document"),
    [("token_only", TOKEN, [1, 1]), ("document_only", [1] * 5, DOCUMENT)],
)
def test_an_ablation_keeps_one_of_the_two_weights(name, token, document):
    got = weights_of(getattr(schemes, name))
    assert got[0].tolist() == pytest.approx(token, abs=1e-6)
    assert got[1].tolist() == pytest.approx(document)


def test_shuffled_weights_stay_in_their_document_and_each_call_has_another_order():
    torch.manual_seed(0)
    drawn = [weights_of(schemes.shuffled) for _ in range(40)]
    for token, document in drawn:
        assert sorted(token[:2].tolist()) == pytest.approx(sorted(TOKEN[:2]), abs=1e-6)
        assert sorted(token[2:].tolist()) == pytest.approx(sorted(TOKEN[2:]), abs=1e-6)
        assert document.tolist() == pytest.approx(DOCUMENT)
    places = [token[2:].argmin().item() for token, _ in drawn]
    assert all(places.count(place) > 4 for place in range(3))
    torch.manual_seed(0)
    torch.testing.assert_close(weights_of(schemes.shuffled), drawn[0], rtol=0, atol=0)


def test_shuffled_draws_are_uniform_over_a_ragged_batch():
    """Each token of a document is as likely at each of its places; an empty document is none."""
    torch.manual_seed(1)
    confidence = torch.rand(9, dtype=torch.float64)
    bounds = torch.tensor([0, 1, 1, 5, 9])
    weight = schemes.token_only(confidence, bounds, window=3)[0]
    counts = torch.zeros(9, 9)
    for _ in range(2000):
        token, _ = schemes.shuffled(confidence, bounds, window=3)
        counts += (token[:, None] == weight) / (weight[:, None] == weight).sum(0)
    inside = torch.block_diag(*(torch.full((n, n), 1 / n) for n in (1, 4, 4)))
    same = (weight[:, None] == weight).double()  # equal weights cannot be told apart
    want = inside.double() @ same / same.sum(0)
    torch.testing.assert_close(counts.double() / 2000, want, rtol=0, atol=0.06)


def windowed(confidence, cu_seqlens, window):
    return confidence.new_full(confidence.shape, window), schemes.every_document(
        cu_seqlens, confidence
    )


@pytest.mark.parametrize("scheme", [windowed, f"{__name__}:windowed"], ids=["function", "path"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_function_that_asks_for_the_window_gets_the_setting(scheme, compiled):
    hidden, weight = torch.randn(1, 4, 3), torch.randn(5, 3)
    loss = HeadLoss(scheme=scheme, window=7)

    def total(hidden):
        return loss(hidden, Head(weight), torch.ones(1, 4, dtype=torch.int64))[0]

    call = torch.compile(total, backend="eager", fullgraph=True) if compiled else total
    plain = HeadLoss(scheme="sft")(hidden, Head(weight), torch.ones(1, 4, dtype=torch.int64))[0]
    torch.testing.assert_close(call(hidden), 7 * plain)


def test_window_goes_with_a_function_that_asks_for_it(data, capsys):
    flags = ["train", "--train-file", str(data), "--model", "no such", "--window", "3"]
    assert main([*flags, "--scheme", "bft.schemes:shuffled"]) == 2
    assert "--model: expected one of" in capsys.readouterr().err
    assert main([*flags, "--scheme", "bft.schemes:focal"]) == 2
    assert "--window: got 3, which --scheme=bft.schemes:focal ignores" in capsys.readouterr().err


def test_shuffled_weights_resume_with_their_own_draws(config, capsys):
    config = unevaluated(config, steps=4, save_every=2, scheme="bft.schemes:shuffled")
    whole = [row["loss"] for row in train(config).history]
    shutil.rmtree(config.output_dir / "checkpoints" / "step-0000004")
    assert [row["loss"] for row in train(replace(config, resume=True)).history] == whole


OWN = """
from functools import partial
from bft.schemes import focal

mild = partial(focal, gamma=1.0)
name = "no function"
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """A package of the user's in the current folder."""
    folder = tmp_path / "my_weights"
    folder.mkdir()
    (folder / "__init__.py").write_text("", encoding="utf-8")
    (folder / "tokens.py").write_text(OWN, encoding="utf-8")
    (folder / "broken.py").write_text("import bft.nothing_here\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield folder
    for loaded in [name for name in sys.modules if name.startswith("my_weights")]:
        del sys.modules[loaded]


def test_a_run_takes_a_function_of_the_current_folder_and_resumes(
    config, flags, own_module, capsys
):
    path = "my_weights.tokens:mild"
    config = unevaluated(config, steps=2, save_every=1)
    assert main(["train", *flags(config), "--scheme", path]) == 0
    before = [row["loss"] for row in metrics(config.output_dir, "train")]
    saved = config.output_dir / "config.yaml"
    assert yaml.safe_load(saved.read_text(encoding="utf-8"))["scheme"] == path
    shutil.rmtree(config.output_dir / "checkpoints" / "step-0000002")
    again = ["train", "--config", str(saved), "--resume"]
    assert main([*again, "--scheme", "bft.schemes:focal"]) == 2
    said = 'scheme: saved "my_weights.tokens:mild", given "bft.schemes:focal"'
    assert said in capsys.readouterr().err
    assert main(again) == 0
    assert [row["loss"] for row in metrics(config.output_dir, "train")] == before


def test_a_function_of_other_arguments_is_refused_where_it_is_given():
    fixed = functools.partial(schemes.focal, cu_seqlens=None)
    for scheme, says in (
        (lambda confidence: confidence, r"<lambda> takes \(confidence\), expected \(confid"),
        (lambda confidence, window: confidence, r"takes \(confidence, \*, window=7\), expected"),
        (fixed, r"partial takes .*expected \(confidence, cu_seqlens\)"),
        (3, "got int, expected a name or a callable"),
    ):
        with pytest.raises(TypeError, match=f"^scheme: .*{says}"):
            HeadLoss(scheme=scheme, window=7)


def test_a_confidence_that_is_nan_makes_the_loss_nan_and_blames_no_scheme():
    hidden, target = torch.full((1, 4, 3), math.nan), torch.ones(1, 4, dtype=torch.int64)
    assert HeadLoss(scheme="bft.schemes:focal")(hidden, Head(torch.randn(5, 3)), target)[0].isnan()


@pytest.mark.parametrize(
    ("scheme", "says"),
    [
        (
            "focal",
            "got 'focal', expected one of 'sft', .* or the import path of a function, as 'pa",
        ),
        ("my_weights.tokens", "got 'my_weights.tokens', expected one of 'sft', "),
        ("my_weight:mild", "'my_weight:mild' cannot be imported .ModuleNotFoundError: No module"),
        ("my_weights.tokens:mid", "'my_weights.tokens:mid' cannot be .* has no attribute 'mid'"),
        ("my_weights.tokens:", "'my_weights.tokens:' is of <class 'module'>, expected a function"),
        ("my_weights.broken:f", "No module named 'bft.nothing_here'"),
        ("my_weights.tokens:name", "is of <class 'str'>, expected a function"),
        ("math:sqrt", r"'math:sqrt' takes \(x, /\), expected \(confidence, cu_seqlens\)"),
        ("my weights:f", "'my weights:f' cannot be imported .ValueError: invalid format"),
    ],
)
def test_a_path_without_a_function_is_named_before_the_model_loads(
    config, flags, own_module, capsys, monkeypatch, scheme, says
):
    monkeypatch.setattr("bft.train.load_model", lambda _: pytest.fail("the model is loaded"))
    assert main(["train", *flags(config), f"--scheme={scheme}"]) == 2
    assert not config.output_dir.exists()
    printed = capsys.readouterr().err
    assert re.search(rf"^bft train: --scheme: .*{says}", printed, re.MULTILINE), printed
