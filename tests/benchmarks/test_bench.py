"""A ratio that grew is seen, and one that did not is not."""

import pytest

from benchmarks.results.schema import append, read
from benchmarks.run import bench

NAME = "bft torch exact, bft, both"


def saved(path, **ratios):
    append(path, [{"name": NAME, "shape": key, "times_g": r} for key, r in ratios.items()])
    return path


def run(**settings):
    bench.main(bench.Config(only=NAME, device="cpu", **settings))


def test_only_a_ratio_far_above_the_saved_one_is_complained_of():
    assert bench.complain(1.34, 1.0) == ""
    assert bench.complain(0.1, 1.0) == ""
    assert bench.complain(99.0, None) == ""
    assert "took 1.36 G, expected up to 1.35 x 1.00 G" in bench.complain(1.36, 1.0)


def test_a_ratio_that_grew_fails_where_it_is_quiet(tmp_path, capsys):
    path = saved(tmp_path / "cpu.csv", tiny=1e-6, small=1e6)
    with pytest.raises(SystemExit) as error:
        run(baseline=path, max_spread=1e9)
    assert str(error.value).startswith(f"{NAME}, tiny took")
    assert len(str(error.value).splitlines()) == 1
    assert "1000000.00" in capsys.readouterr().out
    run(baseline=path, max_spread=-1)
    assert f"{NAME}, tiny: too noisy to compare" in capsys.readouterr().out


def test_a_peer_that_became_slower_is_shown_only(tmp_path, capsys):
    name = "eager, bft, both"
    path = tmp_path / "cpu.csv"
    append(path, [{"name": name, "shape": "tiny", "times_g": 1e-6}])
    bench.main(bench.Config(only=name, device="cpu", baseline=path, max_spread=1e9))
    assert name in capsys.readouterr().out


def test_a_baseline_that_was_just_saved_is_read(tmp_path):
    path = saved(tmp_path / "new" / "cpu.csv", tiny=1.0)
    run(baseline=path, rebase=True)
    assert bench.load(path).keys() == {(NAME, "tiny"), (NAME, "small")}
    assert read(path)[0]["torch"]


@pytest.mark.parametrize("path", sorted(bench.BASELINES.glob("*.csv")), ids=lambda path: path.name)
def test_committed_baselines_are_of_what_is_measured(path):
    ratios = bench.load(path)
    # Triton runs on a CPU in tests only.
    measured = {run[:2] for run in bench._runs(bench.Config(only="bft", device="cpu"))}
    ours = {key for key in measured if key[0].startswith("bft") and "triton" not in key[0]}
    assert (NAME, "tiny") in ours
    assert path.stem != "cpu" or ours <= ratios.keys()
    assert all(ratio > 0 for ratio in ratios.values())
