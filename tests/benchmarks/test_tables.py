"""docs/ say what the committed CSVs say."""

import pytest

from benchmarks.results import cells
from benchmarks.results.loss_table import markdown
from benchmarks.results.schema import RESULTS, number, read
from benchmarks.run import tables


def test_documents_and_csvs_agree():
    tables.main(tables.Config(check=True))


def test_a_changed_figure_is_found_and_written_again(tmp_path, monkeypatch):
    page = tmp_path / "performance.md"
    right = tables.PAGE.read_text(encoding="utf-8")
    monkeypatch.setattr(tables, "PAGE", page)
    row = next(line for line in right.splitlines() if line.startswith("| eager |"))
    page.write_text(right.replace(row, row.replace(" | ", " | 9", 1)), encoding="utf-8")
    with pytest.raises(SystemExit, match=r"performance\.md: its tables are not those of the CSVs"):
        tables.main(tables.Config(check=True))
    tables.main(tables.Config())
    assert page.read_text(encoding="utf-8") == right
    page.write_text(right.replace("<!-- end of table -->", ""), encoding="utf-8")
    with pytest.raises(SystemExit, match=r"\.md: table measured: found 0 pairs of markers"):
        tables.main(tables.Config())


def test_cells_are_those_of_the_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(cells, "RESULTS", tmp_path)
    (tmp_path / "loss.csv").write_text(
        "provider,weighting,mode,shape,tokens,vocabulary,dtype,inputs,memory_kept,seconds,g_seconds,"
        "times_g,extra_bytes\n"
        "1G,,,m,8,5000,float32,recorded,True,0.7,0.7,1,\n"
        "eager,bft,both,m,8,5000,float32,recorded,True,1.0,0.5,2.004,3145728\n"
        "eager,bft,frozen,m,8,5000,float32,recorded,True,1.0,0.7,9,1\n"
        "eager,plain,both,m,8,5000,float32,recorded,True,1.0,0.7,9,1\n"
        "eager,bft,both,m,16,5000,float32,recorded,True,1.0,0.7,9,1\n"
        "eager,bft,both,m,8,5000,bfloat16,recorded,True,1.0,0.7,9,1\n"
        "eager,bft,both,m,8,5000,float32,synthetic,True,1.0,0.7,9,1\n"
        "eager,bft,both,m,8,5000,float32,recorded,False,1.0,0.7,9,1\n"
        "trl,bft,both,m,8,5000,float32,recorded,True,,0.5,,\n"
    )
    lines = (cells.Line("E", "eager", bold=True), cells.Line("T", "trl"))
    table = cells.losses(".", 8, {"m": "Model"}, lines)
    assert markdown(table).splitlines() == [
        "| | Model, `V` 5,000 | MiB |",
        "|---|---:|---:|",
        "| 1G, seconds | 0.500 | |",
        "| **E** | **2.00** | **3** |",
        "| T | | |",
    ]
    with pytest.raises(ValueError, match="no row with provider 'liger', weighting 'bft', mode"):
        cells.losses(".", 8, {"m": "Model"}, (cells.Line("L", "liger"),))
    with pytest.raises(ValueError, match="no row with provider 'eager', weighting 'bft'"):
        cells.growth(".", "eager")


def test_two_runs_beside_each_other(tmp_path, monkeypatch):
    monkeypatch.setattr(cells, "RESULTS", tmp_path)
    head = "provider,weighting,mode,shape,dtype,inputs,memory_kept,tokens,times_g\n"
    row = "eager,bft,both,m,float32,recorded,True"
    (tmp_path / "loss.csv").write_text(f"{head}{row},8,2.0\n{row},16,9\n")
    (tmp_path / "again.csv").write_text(f"{head}{row},8,3\n{row},8,2.1\n")
    table = cells.repeated(".", 8, {"m": "Model"}, (cells.Line("E", "eager"),), "again.csv")
    assert table == [["", "Model", "again", "ratio"], ["E", "2.00", "2.10", "1.05"]]


def test_the_committed_table_was_reproduced():
    ratios = [float(ratio) for line in tables.TABLES["again"]()[1:] for ratio in line[3::3]]
    assert len(ratios) == 3 * len(tables.LINES)
    assert 0.9 <= min(ratios) <= max(ratios) <= 1.1


def test_steps_and_largest_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(cells, "RESULTS", tmp_path)
    (tmp_path / "train.csv").write_text(
        "model,mode,gradient_checkpointing,weighting,loss,batch,seconds,head_forward_seconds,"
        "head_backward_seconds,peak_bytes,limit_bytes,largest_batch,note,reason\n"
        "m,full,False,bft,exact,4,2.5,0.5,0.25,3221225472,,,,\n"
        "m,full,False,bft,exact,,,,,,8589934592,30,31 did not fit,\n"
        "m,full,False,bft,exact,,,,,,4294967296,9,at least; 10: took longer than 5 s,\n"
        "m,full,True,bft,exact,4,9,1,1,1,,,,\n"
        "m,lora,False,bft,exact,4,9,1,1,1,,,,\n"
        "m,full,False,bft,liger fused,,,,,,,,,it runs on a GPU only\n"
        "other,full,False,bft,exact,4,9,1,1,1,,,,\n"
    )
    assert cells.steps(".", "m") == [
        ["", "step of 4, s", "the head's part", "peak GiB", "fit in 4 GiB", "fit in 8 GiB"],
        ["exact, weighted by BFT", "2.50", "0.750", "3.00", "at least 9", "30"],
    ]
    with pytest.raises(ValueError, match="found no row with model 'x', mode 'full'"):
        cells.steps(".", "x")


def test_the_last_column_of_other_cpus_is_that_of_the_csv():
    rows = read(RESULTS / "xeon-emerald-rapids" / "loss.csv")
    text = tables.PAGE.read_text(encoding="utf-8")
    table = text[text.index("| | goal | Zen 4") :].split("\n\n")[0].splitlines()
    told = {line.split(" | ")[0].strip("| "): line.split(" | ")[-1].strip("| ") for line in table}
    for label, provider, mode, column in (
        ("1G, seconds", "1G", "", "seconds"),
        ("sampled", "bft cpu sampled", "both", "times_g"),
        ("`no_grad`, all statistics", "bft cpu exact", "forward", "times_g"),
        ("exact, 256 MiB", "bft cpu exact, 256 MiB", "both", "times_g"),
        ("exact, 16 MiB", "bft cpu exact, 16 MiB", "both", "times_g"),
        ("exact, frozen head", "bft cpu exact", "frozen", "times_g"),
    ):
        what = {"provider": provider, "weighting": "bft" if mode else "", "mode": mode}
        found = (cells.find(rows, **what, shape=shape) for shape in tables._MODELS)
        assert told[label] == ", ".join(f"{number(row, column):.2f}" for row in found), label
