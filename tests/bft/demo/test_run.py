"""The demo's training run and its figure."""

from bft.config import DemoConfig
from bft.demo.run import plot_run, training
from bft.train import TrainResult


def test_the_demo_replaces_its_own_folder_only(tmp_path):
    assert training(DemoConfig(), tmp_path).overwrite
    assert not training(DemoConfig(output_dir=tmp_path), tmp_path).overwrite
    assert training(DemoConfig(output_dir=tmp_path, overwrite=True), tmp_path).overwrite


def test_figure_is_a_png(tmp_path):
    history = [
        {"step": step, "nll": 3.0 / step, "loss": 1.0 / step, "confidence": 0.1 * step}
        for step in (1, 2, 3)
    ]
    counts = {
        "It is red.": {"examples": 4, "correct": 1},
        "It is blue.": {"examples": 2, "correct": 2},
    }
    row = {"per_answer": counts, "accuracy": 0.5, "majority_accuracy": 0.6}
    result = TrainResult(tmp_path, 3, history, [row, row])
    path = plot_run(result, tmp_path / "sub" / "figure.png", "bft")
    assert path.read_bytes().startswith(b"\x89PNG")
