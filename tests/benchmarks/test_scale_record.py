"""Growth with the sizes, and inputs recorded from a model."""

import itertools

import pytest
import torch

from benchmarks.measure import noise
from benchmarks.measure.growth import fit, predict
from benchmarks.providers.losses import ours
from benchmarks.results.schema import read
from benchmarks.run import record, scale
from benchmarks.shapes import Recorded, Shape, make_problem


def test_fit_finds_the_two_slopes():
    shapes = [Shape(n, 64, v) for n in (256, 4096) for v in (1000, 50_000)]
    exact = [predict(shape, 3e-9, 2e-12) for shape in shapes]
    fixed, slope = fit(shapes, exact)
    assert fixed == pytest.approx(3e-9)
    assert slope == pytest.approx(2e-12)


@pytest.fixture
def quick(monkeypatch):
    """What a growth needs, but for the sizes."""
    monkeypatch.setattr(scale, "_LEAST_SECONDS", 0.0)
    return {"device": "cpu", "repeats": 1, "force": True}


def test_scale_writes_a_row_a_shape(tmp_path, capsys, quick):
    path = tmp_path / "scale.csv"
    sizes = {"widths": (16, 32), "tokens": (64, 256), "vocabularies": (512, 2048)}
    scale.main(scale.Config("bft torch sampled", **sizes, **quick, output=path))
    rows = read(path)
    told = [tuple(int(row[name]) for name in ("width", "vocabulary", "tokens")) for row in rows]
    assert told == list(itertools.product((16, 32), (512, 2048), (64, 256)))
    assert all(float(row["spread"]) >= 0 for row in rows)
    printed = capsys.readouterr().out
    assert "passes over dW" in printed
    assert "off by" in printed


@pytest.mark.parametrize(("tokens", "vocabularies"), [((4, 8), (16,)), ((4, 4), (16, 32))])
def test_two_unknowns_are_not_fitted_to_one_size(tokens, vocabularies, tmp_path, capsys, quick):
    path = tmp_path / "scale.csv"
    sizes = {"widths": (8,), "tokens": tokens, "vocabularies": vocabularies}
    scale.main(scale.Config("bft torch exact", **sizes, **quick, output=path))
    assert {row["fitted_seconds"] for row in read(path)} == {""}
    printed = capsys.readouterr().out
    assert "no fit: a V D + b N V D needs two or more --tokens and" in printed
    assert "±" in printed
    assert "off by" not in printed


def test_scale_refuses_a_noisy_machine(monkeypatch, quick):
    monkeypatch.setattr(noise.os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    sizes = {"widths": (8,), "tokens": (4, 8), "vocabularies": (16,)}
    noisy = quick | {"force": False, "max_spread": -1.0}
    with pytest.raises(SystemExit, match=r"N 4, D 8, V 16: the bare GEMM .* expected up to"):
        scale.main(scale.Config("bft torch exact", **sizes, **noisy))


@pytest.mark.parametrize(
    ("provider", "message"),
    [("bft", "providers: got 'bft'"), ("bft cuda exact", "which cannot run here")],
)
def test_scale_refuses_who_cannot_run(provider, message):
    with pytest.raises(SystemExit, match=message):
        scale.main(scale.Config(provider=provider, device="cpu"))


@pytest.mark.slow
def test_recorded_inputs_are_those_of_the_models_own_loss(tmp_path):
    transformers = pytest.importorskip("transformers")
    from bft.load import pretrained
    from bft.packaged import PretrainedError

    try:
        folder = pretrained("smollm2-135m")
    except PretrainedError as error:
        pytest.skip(str(error))
    texts = tmp_path / "texts.txt"
    texts.write_text("The heart pumps blood\nthrough the vessels.\n\n\nInsulin lowers glucose.\n")
    assert list(record.documents(texts)) == [
        "The heart pumps blood through the vessels.",
        "Insulin lowers glucose.",
    ]
    path = tmp_path / "inputs.pt"
    record.main(record.Config(texts, path, tokens=10))
    problem = make_problem(Recorded(path, 7), torch.float32, "cpu")
    assert problem.hidden.shape[0] == 7
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = transformers.AutoTokenizer.from_pretrained(folder)(
        "The heart pumps blood through the vessels.", return_tensors="pt"
    ).input_ids[:, :8]
    expected = model(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(ours(problem, "plain"), expected, rtol=1e-4, atol=1e-4)
