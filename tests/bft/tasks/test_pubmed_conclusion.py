"""Abstracts: which are taken, what stands beside a conclusion, and that no article leaks."""

import gzip
import json
from collections import Counter
from itertools import combinations
from xml.sax.saxutils import escape

import pytest

from bft.cli import main
from bft.packaged import PretrainedError
from bft.tasks import pubmed_conclusion as pubmed
from bft.tasks import task

pytest.importorskip("sklearn", reason="needs the extra study")

LONG = "word " * 30


def article(n, *, title=None, results=None, conclusion=None, keywords=(), mesh=(), language="eng"):
    """A record as PubMed writes it."""
    title = title or f"Title of {n}"
    results = results or f"We saw {n}. {LONG}"
    conclusion = conclusion or f"We conclude of {n} what had to be concluded here, in some words."
    heads = "".join(
        f"<MeshHeading><DescriptorName>{m}</DescriptorName></MeshHeading>" for m in mesh
    )
    keys = "".join(f"<Keyword>{k}</Keyword>" for k in keywords)
    return f"""<PubmedArticle><MedlineCitation><PMID Version="1">{n}</PMID><Article>
    <ArticleTitle>{title}</ArticleTitle><Abstract>
    <AbstractText Label="AIMS" NlmCategory="OBJECTIVE">To see.</AbstractText>
    <AbstractText Label="RESULTS" NlmCategory="RESULTS">{results}</AbstractText>
    <AbstractText Label="END" NlmCategory="CONCLUSIONS">{conclusion}</AbstractText>
    </Abstract><Language>{language}</Language></Article>
    <MeshHeadingList>{heads}</MeshHeadingList><KeywordList>{keys}</KeywordList>
    </MedlineCitation></PubmedArticle>"""


def written(path, articles):
    text = f"<PubmedArticleSet>{''.join(articles)}</PubmedArticleSet>"
    path.write_bytes(gzip.compress(text.encode()))
    return path


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Thirty articles in place of the real file."""
    path = written(tmp_path / "small.xml.gz", [article(n, keywords=[n % 3]) for n in range(30)])
    monkeypatch.setattr(pubmed, "path", lambda: path)
    for name, size in (("test", 5), ("validation", 3), ("distractors", 12)):
        monkeypatch.setitem(pubmed.HELD_OUT, name, size)


def test_articles_that_fit_are_read(tmp_path):
    ours = article(1, results=f"A <i>p</i>\n of {escape('<')} 1. {LONG}", mesh=["Mice", "Eye"])
    others = [
        article(2, language="fre"),
        article(3, results="Too short."),
        article(4, conclusion="Too short."),
        article(5, results=f"{LONG} It helps those who are in need of help more than others do."
                " So.", conclusion="It helps those who are in need of help more than others do."),
        article(6, keywords=[" Eye ", "mice"]),
    ]  # fmt: skip
    first, second = pubmed.read(written(tmp_path / "some.xml.gz", [ours, *others]))
    assert first.results == f"A p of < 1. {LONG}".strip()
    assert first.title == "Title of 1"
    assert (first.id, first.subjects, first.mesh) == ("1", {"mice", "eye"}, True)
    assert (second.id, second.subjects, second.mesh) == ("6", {"mice", "eye"}, False)


def read(n, *subjects, title=None, conclusion=None, results="nothing"):
    title, conclusion = title or f"title {n}", conclusion or f"conclusion {n}"
    return pubmed.Article(str(n), title, results, conclusion, frozenset(subjects), mesh=True)


def test_articles_of_one_title_or_conclusion_are_a_group(monkeypatch):
    for name in pubmed.HELD_OUT:
        monkeypatch.setitem(pubmed.HELD_OUT, name, 2)
    chain = [
        read(1, title="One"),
        read(2, title="Two", conclusion="So it is"),
        read(3, title="one!", conclusion="So it is."),  # joins both
    ]
    parts = pubmed.split([*chain, *(read(n) for n in range(4, 12))], seed=0)
    group = {a.id: (g, name) for name, part in parts.items() for g, a in part}
    assert group["1"] == group["2"] == group["3"]
    assert len({g for g, _ in group.values()}) == 9
    assert Counter(name for _, name in group.values()).total() == 11


def test_distractors_share_a_subject_and_then_words_with_the_prompt():
    ours = read(0, "eye", title="lens and cornea", conclusion="ours")
    pool = [
        read(1, conclusion="lens and cornea and lens"),  # of no subject in common
        read(2, "eye", "ear", conclusion="a lens"),
        read(3, "eye", conclusion="a kidney"),
        read(4, "eye", conclusion="lens, cornea"),
        read(5, "eye", conclusion="Lens cornea!"),  # the same words as the one before
        read(6, conclusion="a liver"),
    ]
    rows = pubmed.records([("g", ours)])
    pubmed.add_choices(rows, [ours], pool, seed=0)
    (row,) = rows
    assert row["choices"][row["answer_index"]] == "ours"
    assert set(row["choices"]) == {"ours", "Lens cornea!", "a lens", "a kidney"}
    pubmed.add_choices(rows, [ours], [*pool[:2], pool[5]], seed=0)  # one of the subject
    assert set(row["choices"]) == {"ours", "a lens", pool[0].conclusion, "a liver"}
    with pytest.raises(ValueError, match="pool: got 2 conclusions, expected 3 or more"):
        pubmed.add_choices(rows, [ours], pool[:2], seed=0)


@pytest.mark.usefixtures("small")
def test_the_command_writes_it(tmp_path, capsys):
    pytest.importorskip("rouge_score", reason="needs the extra study")
    out = tmp_path / "out"
    assert main(["data", "pubmed-conclusion", "--output-dir", str(out)]) == 0
    assert "10 train, 5 test" in " ".join(capsys.readouterr().out.split())
    splits = {
        name: [json.loads(line) for line in (out / f"{name}.jsonl").open("rb")]
        for name in task.SPLITS
    }
    texts = [{row["completion"] for row in rows} for rows in splits.values()]
    assert not any(one & other for one, other in combinations(texts, 2))
    for row in splits["test"] + splits["validation"]:
        assert row["choices"][row["answer_index"]] == row["completion"]
        assert len(set(row["choices"])) == 4
        assert all(len({*row["choices"]} & part) <= 1 for part in texts)  # of no split but its own
    assert all("choices" not in row for row in splits["train"])
    assert {row["answer_index"] for row in splits["test"] + splits["validation"]} > {0}
    notice = (out / "NOTICE").read_text(encoding="utf-8")
    assert "U.S. National Library of Medicine" in notice
    assert "Subjects of 30 articles: MeSH headings of 0, keywords of 30" in notice
    floors = json.loads((out / "leak.json").read_text(encoding="utf-8"))["floors"]
    assert floors["the gold completion"] == {"rouge_l": 1.0}
    assert floors["the choice with most words of the prompt"] == {"choice": 1.0}  # its number


def test_floors_are_worked_by_hand():
    pytest.importorskip("rouge_score", reason="needs the extra study")

    def row(title, answer, *choices):
        prompt = f"Title: {title}\n\nResults: nothing of it\n\nWhat do the authors conclude?"
        index = choices.index(answer)
        return {"prompt": prompt, "completion": answer, "choices": choices, "answer_index": index}

    test = [
        row("red lens", "red lens", "blue eye in mice", "red lens"),  # nearest
        row("grey ear", "brown fur in hares", "brown fur in hares", "grey ear"),  # longest
    ]
    assert pubmed.floors([{"prompt": "old text", "completion": "x"}], test) == {
        "the title": {"rouge_l": pytest.approx(1 / 2)},
        "the choice with most words of the prompt": {"choice": 0.5},
        "the longest choice": {"choice": 0.5},
    }
    train = [{"completion": text} for text in ("lens of mice", "lens of", "fur of mice", "ear")]
    assert pubmed.constant(train) == "lens of mice"


def test_rouge_l_is_worked_by_hand():
    pytest.importorskip("rouge_score", reason="needs the extra study")
    row = {"completion": "The lens was cloudy in old mice."}
    # Stemmed: lens was cloudi in | mice; four of its five words are in order among our seven.
    got = pubmed.score("lens was cloudy for mice", row)["rouge_l"]
    assert got == pytest.approx(2 * (4 / 5) * (4 / 7) / (4 / 5 + 4 / 7))
    assert pubmed.score("", row) == {"rouge_l": 0.0}


@pytest.mark.slow
def test_no_article_of_the_real_file_is_in_two_splits(tmp_path):
    pytest.importorskip("rouge_score", reason="needs the extra study")
    try:
        pubmed.path()
    except PretrainedError as error:
        pytest.skip(str(error))
    task.write(task.find("pubmed-conclusion"), tmp_path, 0)
    files = [tmp_path / f"{name}.jsonl" for name in task.SPLITS]
    splits = [[json.loads(line) for line in path.open("rb")] for path in files]
    assert [len(rows) for rows in splits] == [2092, 250, 500]
    for key in ("id", "group", "prompt", "completion"):
        seen = [{row[key] for row in rows} for rows in splits]
        assert not any(one & other for one, other in combinations(seen, 2))
    places = Counter(row["answer_index"] for row in splits[2])
    assert min(places.values()) > 90
    trained = {row["completion"] for row in splits[0]}
    assert all(trained.isdisjoint(row["choices"]) for row in splits[2])
    again = task.find("pubmed-conclusion").build(0)
    for name, path in zip(task.SPLITS, files, strict=True):
        assert task.lines_of(again.splits)[f"{name}.jsonl"].encode() == path.read_bytes()
