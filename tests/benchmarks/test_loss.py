"""``python -m benchmarks loss`` measures what it says, and refuses to where it cannot."""

import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.measure import noise
from benchmarks.measure.errors import certificate, first_rows, relative_error, step_errors, truth
from benchmarks.measure.memory import extra_memory
from benchmarks.measure.processes import in_fresh_process
from benchmarks.measure.timing import Timing, fastest_option, step, time_turns, timing
from benchmarks.providers.provider import WEIGHTINGS
from benchmarks.providers.registry import MODES, PROVIDERS, Case, cases, why_not
from benchmarks.results.schema import COLUMNS, append, number, read
from benchmarks.run import loss
from benchmarks.shapes import SHAPES, Shape, make_problem

SMALL = Shape(160, 16, 500)  # of one document of 128 tokens and one of 32
# Without those that are slow to start, and Triton's interpreter, which runs only in tests.
QUICK = [one.name for one in PROVIDERS.values() if not one.compiles and one.backend != "triton"]
RUNNING = [
    case for case in cases(QUICK, WEIGHTINGS, MODES) if not why_not(case, "cpu", torch.float32)
]


def config(**settings):
    given = {"shapes": ("tiny",), "tokens": 32, "device": "cpu", "repeats": 1, "memory": False}
    given |= {"providers": ("eager", "bft torch sampled"), "force": True}
    return loss.Config(**given | settings)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_every_provider_computes_the_same_loss_and_gradients(weighting):
    problem = make_problem(SMALL, torch.float32, "cpu")
    expected = truth(problem, weighting)
    value = step(Case("bft torch exact", weighting), problem)
    checked = set()
    for case in RUNNING:
        if case.weighting != weighting:
            continue
        checked.add(case.provider)
        for option in PROVIDERS[case.provider].options:
            found = step(replace(case, option=option), problem)
            torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-6)
            errors = step_errors(replace(case, option=option), problem, expected)
            errors |= certificate(case, problem, expected)
            names = {"forward": (), "both": ("hidden", "weight"), "frozen": ("hidden",)}[case.mode]
            sampled = PROVIDERS[case.provider].eps is not None
            kinds = ("error", "certificate") if sampled else ("error",)
            told = {f"{kind}_{name}" for kind in kinds for name in names}
            assert errors.keys() == {"error_loss"} | told
            assert errors["error_loss"] < 1e-5
            for name in names:
                limit = 3 * errors[f"certificate_{name}"] + 1e-5 if sampled else 1e-5
                assert errors[f"error_{name}"] < limit, (case, option, name)
    assert {"eager", "bft torch exact", "bft torch sampled"} <= checked


def test_a_wrong_gradient_shows_as_an_error(monkeypatch):
    problem = first_rows(make_problem(SMALL, torch.float32, "cpu"))
    assert problem.hidden.shape[0] == 64
    plain = PROVIDERS["eager"]
    broken = replace(plain, options={"": lambda problem, weighting: 1.1 * problem.hidden.sum()})
    monkeypatch.setitem(PROVIDERS, "eager", broken)
    errors = step_errors(Case("eager", "plain", "frozen"), problem, truth(problem, "plain"))
    assert min(errors["error_hidden"], errors["error_loss"]) > 0.1
    assert relative_error(torch.full((3, 2), 1.1), torch.ones(3, 2)) == pytest.approx(0.1)


def test_reasons_not_to_run(monkeypatch):
    def reason(provider, weighting="plain", mode="both"):
        return why_not(Case(provider, weighting, mode), "cpu", torch.float32)

    assert "it computes plain only" in reason("quack", "bft")
    assert reason("bft torch sampled", mode="forward") == "for forward see bft torch exact"
    assert "CUDA" in reason("bft cuda exact")
    assert reason("liger fused") in (
        "it runs on a GPU only",
        "liger-kernel is not installed (pip install liger-kernel)",
    )
    assert reason("eager", "bft", "frozen") == reason("own:loss") == ""
    assert "it computes plain only" in reason("own:loss", "bft")
    missing = replace(PROVIDERS["trl"], distribution="no-such-thing")
    monkeypatch.setitem(PROVIDERS, "trl", missing)
    assert reason("trl") == "no-such-thing is not installed (pip install no-such-thing)"
    broken = replace(missing, distribution="torch", module="torch.no_such")
    monkeypatch.setitem(PROVIDERS, "trl", broken)
    assert "torch is installed, but cannot be imported: No module" in reason("trl")


def test_csv_has_a_row_a_case_and_the_reasons(tmp_path, capsys, monkeypatch):
    def fails(problem, weighting):
        raise ValueError("no such luck\nat all")

    monkeypatch.setitem(PROVIDERS, "trl", replace(PROVIDERS["eager"], options={"": fails}))
    path = tmp_path / "results.csv"
    providers = ("eager", "bft torch sampled", "bft cuda exact", "trl")
    how = {"weightings": ("bft",), "modes": ("forward", "both"), "output": path}
    for _ in range(2):
        loss.main(config(providers=providers, **how))
    rows = read(path)
    assert len(rows) == 2 * (1 + 4 * 2)
    assert tuple(rows[0]) == COLUMNS
    assert rows[0]["provider"] == "1G"
    assert float(rows[0]["times_g"]) == 1.0
    found = {(row["provider"], row["mode"]): row for row in rows}
    sampled, eager = found["bft torch sampled", "both"], found["eager", "both"]
    assert (sampled["weighting"], sampled["eps"], eager["eps"]) == ("bft", str(2**-12), "")
    assert (eager["inputs"], eager["tokens"], eager["vocabulary"]) == ("synthetic", "32", "8192")
    seconds, flops = number(eager, "seconds"), 3 * 2 * 32 * 128 * 8192
    assert number(eager, "times_g") == pytest.approx(seconds / number(eager, "g_seconds"))
    assert number(eager, "flops_per_second") == pytest.approx(flops / seconds)
    moved = 2 * 4 * (32 * 128 + 8192 * 128)
    assert number(eager, "bytes_per_second") == pytest.approx(moved / seconds)
    assert number(eager, "error_weight") < 1e-4 < number(sampled, "error_weight")
    assert number(sampled, "certificate_weight") > 1e-4
    assert found["eager", "forward"]["error_hidden"] == ""
    reasons = {"bft cuda exact": "CUDA", "trl": "failed: ValueError: no such luck"}
    for provider, reason in reasons.items():
        row = found[provider, "both"]
        assert row["seconds"] == row["times_g"] == row["extra_bytes"] == ""
        assert reason in row["reason"]
    printed = capsys.readouterr().out
    assert "  expected " in printed
    assert "missing: trl (bft forward, bft both): failed: ValueError: no such luck" in printed
    assert "synthetic inputs" in printed


def test_recorded_inputs_and_sizes_of_ones_own_are_told(tmp_path, capsys):
    problem = make_problem(SMALL, torch.float32, "cpu")
    inputs, path = tmp_path / "abstracts.pt", tmp_path / "results.csv"
    torch.save(tuple(one.detach() for one in problem.inputs), inputs)
    how = {"output": path, "errors": False, "providers": ("eager",)}
    loss.main(config(inputs=(inputs,), **how))
    loss.main(config(shapes=("48x16x500",), tokens=None, **how))
    columns = ("shape", "inputs", "tokens", "width", "vocabulary")
    assert {tuple(row[name] for name in columns) for row in read(path)} == {
        ("abstracts", "recorded", "32", "16", "500"),
        ("48x16x500", "synthetic", "48", "16", "500"),
    }
    assert "abstracts (recorded inputs)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"shapes": ("gpt-5",)},
            r"'gpt-5', expected rows x width .* 1500x320x20000, or some of tiny, smollm2-135m",
        ),
        ({"shapes": ("8x0x9",)}, "shapes: got '8x0x9', expected rows x width x vocabulary"),
        ({"shapes": ("8x9",)}, "shapes: got '8x9'"),
        (
            {"providers": ("egaer",)},
            "providers: got 'egaer', expected module:function or some of eager",
        ),
        ({"weightings": ("sft",)}, "weightings: got 'sft', expected some of plain, dft, bft"),
        ({"modes": ("backward",)}, "modes: got 'backward', expected some of forward"),
        ({"repeats": 0}, "repeats: got 0"),
        ({"tokens": 0}, "tokens: got 0"),
        ({"inputs": (Path("nowhere.pt"),)}, r"inputs: got nowhere\.pt .*No such file.* expected a"),
    ],
)
def test_refuses_bad_settings(settings, message):
    with pytest.raises(SystemExit, match=message):
        loss.main(config(**settings))


HIDDEN, WEIGHT, TARGET = torch.zeros(6, 4), torch.zeros(9, 4), torch.arange(6)


@pytest.mark.parametrize(
    ("content", "got"),
    [
        ({"hidden": HIDDEN, "weight": WEIGHT, "target": TARGET}, "dict"),
        ((HIDDEN, WEIGHT), "tuple"),
        (HIDDEN, "Tensor"),
        ((HIDDEN, WEIGHT[:, :3], TARGET), r"\(6, 4\) float32, \(9, 3\) float32, \(6,\) int64"),
        ((HIDDEN, WEIGHT, TARGET[:5]), r"\(6, 4\) float32, \(9, 4\) float32, \(5,\) int64"),
        ((HIDDEN[None], WEIGHT, TARGET[None]), r"\(1, 6, 4\) float32"),
        ((HIDDEN, WEIGHT, TARGET.int()), ".* int32"),
        ((HIDDEN.long(), WEIGHT, TARGET), r"\(6, 4\) int64"),
        ((HIDDEN, WEIGHT[:5], TARGET), ".* int64"),  # one target is no row of it
        ((HIDDEN[:0], WEIGHT, TARGET[:0]), r"\(0, 4\) float32"),
    ],
)
def test_inputs_of_another_form_are_refused_in_one_line(tmp_path, content, got):
    path = tmp_path / "own.pt"
    torch.save(content, path)
    with pytest.raises(SystemExit, match=rf"^inputs: got .*own\.pt with {got}.*, expected a file"):
        loss.main(config(inputs=(path,)))
    path.write_text("no such thing\n")
    with pytest.raises(SystemExit, match=r"^inputs: got .*own\.pt \(.*, expected a file") as error:
        loss.main(config(inputs=(path,)))
    assert "\n" not in str(error.value)


def test_refuses_a_file_with_other_columns(tmp_path):
    path = tmp_path / "results.csv"
    append(path, [{"provider": "eager", "seconds": 1}])
    with pytest.raises(SystemExit, match=r"output: got .* whose columns are provider,seconds"):
        loss.main(config(output=path))
    with pytest.raises(ValueError, match="expected a new file"):
        append(path, [{"provider": "eager", "minutes": 1}])
    assert len(read(path)) == 1


def test_a_noisy_machine_is_refused(tmp_path, monkeypatch, capsys):
    noise.check_spread(Timing(1.0, 0.15, 0.9, 1.1, 5), 0.15, False)
    noise.check_spread(Timing(1.0, 0.4, 0.5, 1.9, 5), 0.15, True)
    assert "spread (interquartile range over median) of 40%" in capsys.readouterr().err
    path = tmp_path / "results.csv"
    monkeypatch.setattr(noise.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(noise.os, "getloadavg", lambda: (3.0, 0.0, 0.0))
    with pytest.raises(SystemExit, match=r"expected up to --max-spread -100%.*--force"):
        loss.main(config(force=False, max_spread=-1.0, output=path))
    monkeypatch.setattr(noise.os, "getloadavg", lambda: (7.0, 0.0, 0.0))
    with pytest.raises(
        SystemExit, match=r"load average is 7\.0 on 2 cores, expected up to 3\.0.*own run"
    ):
        loss.main(config(force=False, output=path))
    assert not path.exists()


def test_timing_is_median_and_spread():
    assert timing([2.0]) == Timing(2.0, 0.0, 2.0, 2.0, 1)
    assert timing([1.0, 2.0, 3.0, 4.0, 100.0]) == Timing(3.0, 2.0 / 3.0, 1.0, 100.0, 5)


def test_turns_are_interleaved_and_the_first_one_warms_up():
    order = []

    def run(name):
        time.sleep(0.05 if len(order) < 2 else 0)
        order.append(name)

    times = time_turns({"a": lambda: run("a"), "b": lambda: run("b")}, "cpu", 3)
    assert order == ["a", "b"] * 4
    assert max(one.seconds for one in times.values()) < 0.05


def test_turns_end_in_time_and_short_ones_go_on():
    assert time_turns({"a": lambda: None}, "cpu", 11, until=0.0)["a"].repeats == 3
    lasting = time_turns({"a": lambda: time.sleep(0.01)}, "cpu", 1, lasting=0.2)
    assert lasting["a"].repeats > 2


def test_of_several_options_the_fastest_is_reported(monkeypatch):
    def slow(problem, weighting):
        time.sleep(0.05)
        return problem.hidden.sum()

    quick = replace(
        PROVIDERS["eager"],
        options={"slow": slow, "quick": lambda problem, weighting: problem.hidden.sum()},
    )
    monkeypatch.setitem(PROVIDERS, "eager", quick)
    problem = make_problem(SMALL, torch.float32, "cpu")
    assert fastest_option(Case("eager"), problem, "cpu").option == "quick"


def test_the_readme_lists_every_head_and_column():
    text = (Path(loss.__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    heads = re.findall(r"^\| (\S+) \| (\d+) \| ([\d,]+) \| \S+/\S+ \|$", text, re.MULTILINE)
    told = {name: Shape(2048, int(d), int(v.replace(",", ""))) for name, d, v in heads}
    assert told | {"tiny": Shape(256, 128, 8192)} == SHAPES
    for column in COLUMNS:
        assert f"`{column}`" in text, column


def memory(case, shape):
    return in_fresh_process(extra_memory, case, shape, torch.float32, "cpu")


def test_memory_of_a_process_that_fails_is_an_error():
    with pytest.raises(KeyError, match="none such"):
        memory(Case("eager", option="none such"), SMALL)


@pytest.mark.slow
def test_memory_of_eager_is_that_of_its_logits():
    shape = Shape(512, 64, 49_152)
    logits = shape.tokens * shape.vocabulary * 4

    assert 1.9 * logits < memory(Case("eager"), shape) < 4 * logits
    assert memory(Case("bft torch sampled"), shape) < logits
    # A frozen head has no gradient that could be taken for memory saved.
    assert memory(Case("bft cpu sampled", "bft", "frozen"), shape) > 2**20
