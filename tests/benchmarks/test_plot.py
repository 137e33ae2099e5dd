"""Figures show what the CSVs say, and their letters can be read."""

import itertools
import shutil

import numpy as np
import pytest
from matplotlib.text import Text

from benchmarks.results import gain, panels
from benchmarks.results.figures import Bar, bars, colour, render
from benchmarks.results.schema import digits, latest, number, read
from benchmarks.run import plot


def test_rows_are_read_whatever_the_age_of_the_file(tmp_path):
    path = tmp_path / "loss.csv"
    assert read(path) == []
    path.write_text("provider,tokens,seconds\neager,8,2.5\ntrl,8,\neager,8,3.5\n")
    rows = read(path)
    assert [number(row, "seconds") for row in rows] == [2.5, None, 3.5]
    assert number(rows[0], "spread") is number({"spread": "nan"}, "spread") is None
    assert [row["seconds"] for row in latest(rows, "provider", "weighting")] == ["3.5", ""]
    with pytest.raises(ValueError, match="provider: got 'eager', expected a number"):
        number(rows[0], "provider")
    path.write_text("provider,tokens\neager,8\neager,8,9\n")
    with pytest.raises(ValueError, match=r"loss\.csv, line 3: expected 2 fields"):
        read(path)


def test_figures_are_told_in_three_digits():
    values = (0, 0.00012345, 0.0999, 0.5, 1.234, 12.345, 123.45, 1234.5, 12345.0)
    texts = ["0", "0.000123", "0.0999", "0.500", "1.23", "12.3", "123", "1,234", "12,345"]
    assert [digits(value) for value in values] == texts


def overlaps(drawn):
    """Bars' texts and titles that leave the figure, and pairs that lie on each other."""
    figure = render(drawn)
    found = [text for axes in figure.axes for text in axes.texts]
    found += [t for t in figure.findobj(Text) if t.get_text().startswith("A title")]
    figure.draw_without_rendering()
    boxes = [(text.get_text(), text.get_window_extent().padded(-1)) for text in found]
    assert len(boxes) > 4
    outside = [text for text, box in boxes if box.x0 < 0 or box.x1 > figure.bbox.x1]
    pairs = itertools.combinations(boxes, 2)
    return outside + [(text, other) for (text, a), (other, b) in pairs if a.overlaps(b)]


def letters(drawn):
    """All texts of a figure."""
    return "\n".join(text.get_text() for text in render(drawn).findobj(Text))


def test_no_text_lies_on_another():
    names = ["bft triton sampled 2^-12, frozen head", "eager", "torch chunked, 1024 rows", "trl"]
    given = [Bar(n, (1.1, 0.5), n.startswith("bft"), "3.05 G, 20,000 MiB") for n in names]
    title = "A title of a model with a long name, V 262,144\nN 2,048, D 640, float32, memory kept"
    assert overlaps([bars(title, given, "time, x G", unit=1.0)]) == []
    assert overlaps([bars(title, given, "seconds", ("layers, forward", "head"))]) == []
    crowded = [Bar(name * 2, (1,), False, "3.05 G") for name in names]
    assert overlaps([bars(title, crowded, "tokens/s")])  # so it would be seen


def test_ours_are_told_apart():
    own = [Bar(f"bft {name} exact", (1,), True) for name in ("cpu", "torch", "triton", "cuda")]
    peers = [Bar("torch chunked", (1,), False), Bar("eager", (1,), False)]
    assert len({colour(bar) for bar in own + peers}) == 5
    with pytest.raises(ValueError, match="panels: got none"):
        render([])


def test_plot_writes_every_figure_and_the_same_again(folder, tmp_path, capsys):
    written = tmp_path / "figures"
    plot.main(plot.Config((folder,), written))
    names = {"loss-bft-both", "loss-bft-forward", "loss-plain-both", "loss-plain-forward"}
    names |= {"scale", "train", "parts", "batch"}
    assert {path.name for path in written.iterdir()} == {f"{name}.png" for name in names}
    assert "missing" not in capsys.readouterr().out
    shutil.copy(folder / "train.csv", tmp_path)
    plot.main(plot.Config((tmp_path,)))
    said = capsys.readouterr().out
    assert "loss.csv: missing or empty" in said
    assert "scale.csv: missing or empty" in said
    assert (tmp_path / "train.png").read_bytes() == (written / "train.png").read_bytes()


def test_losses_are_compared_with_those_of_their_weighting_alone(folder):
    figures = panels.loss_figures(read(folder / "loss.csv"))
    assert set(figures) == {f"loss-{w}-{m}" for w in ("plain", "bft") for m in ("both", "forward")}
    balanced, plain = figures["loss-bft-both"], figures["loss-plain-both"]
    assert len(balanced) == len(plain) == 2  # a panel a problem
    assert balanced[0].title.startswith("model-1000, V 1,000\nN 64, D 16, float32, recorded")
    assert "3.00 G, 1,024 MiB" in letters(plain)
    assert "5.00 G, 1,024 MiB" in letters(balanced)
    assert 'odd <b>&"$x$, loss' in letters(balanced)
    row = {"provider": "eager", "times_g": "1.0", "extra_bytes": "1"}
    right = [row, row | {"status": "ok"}]
    assert panels.timed([*right, row | {"status": "wrong"}]) == right


def test_growth_draws_the_fitted_line_through_exact_times(folder):
    drawn = panels.growth_figures(read(folder / "scale.csv"))["scale"]
    titles = [panel.title.split(": ")[1] for panel in drawn]
    assert titles == ["growth with N, D 16", "growth with V, D 16"]
    axes = render(drawn[:1]).axes[0]
    points, line = axes.lines[:2]
    ends = line.get_ydata()[[0, -1]]
    np.testing.assert_allclose(ends, points.get_ydata(), rtol=1e-6)
    one = [row for row in read(folder / "scale.csv") if row["vocabulary"] == "1000"]
    (panel,) = panels.growth_figures(one)["scale"]
    assert len(render([panel]).axes[0].lines) == 1  # the points alone


def test_training_has_a_panel_a_limit(folder):
    figures = panels.train_figures(read(folder / "train.csv"))
    (speed,) = figures["train"]
    assert speed.title.startswith("tiny, full, weighted by BFT, batch 4 x 256 tokens\nspeed of a")
    assert letters([speed]).index("sampled") < letters([speed]).index("eager")
    assert "1,024" in letters([speed])
    (parts,) = figures["parts"]
    assert "6.50" in letters([parts])
    bars = render([parts]).axes[0].containers
    assert [bar.get_width() for bar in bars[1]] == pytest.approx([1.2, 0.2])
    assert [bar.get_x() for bar in bars[1]] == pytest.approx([1.1, 0.1])
    titles = [panel.title.splitlines()[1] for panel in figures["batch"]]
    assert titles == ["largest batch in 4 GiB", "largest batch in 16 GiB"]


def test_a_folder_without_results_is_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"folders: got .* expected one with some of loss\.csv"):
        plot.result_folders([tmp_path])
    assert all(any(folder.glob("*.csv")) for folder in plot.result_folders([]))


def test_readmes_figure_is_of_the_rows(monkeypatch, tmp_path):
    texts = [text.get_text() for text in gain.draw().findobj(Text)]
    assert {"1.13", "20.8", "3.48", "3.87", "2,122", "bft sampled", "bft exact"} <= set(texts)
    monkeypatch.setattr(gain, "FOLDER", tmp_path)
    missing = "no row with provider 'bft cpu sampled', shape 'smollm2-135m'"
    with pytest.raises(ValueError, match=missing):
        gain.draw()
