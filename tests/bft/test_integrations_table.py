"""docs/integrations.md tells which test shows what, by the marker `cell` of the tests.

python tests/bft/test_integrations_table.py    # writes the tables anew
"""

import importlib
import itertools
from pathlib import Path

import transformers as hf

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "integrations.md"
START, END = (
    "<!-- cells: written by tests/bft/test_integrations_table.py -->\n",
    "<!-- /cells -->\n",
)
RUN = ("loss", "gradient", "accumulation", "packing", "evaluation", "save", "resume")
PROPERTIES = {
    "integration": RUN,
    "recipe": RUN,
    "model": ("loss", "gradient", "packing", "refused"),
}
ALONE = "an image's tokens and its pixels are one row's: not packed here"
# Cells without a test, and why.
WITHOUT = {
    ("OPTForCausalLM", "packing"): "its documents see each other: refused at the first packed call",
    ("Gemma3ForConditionalGeneration", "packing"): ALONE,
    ("LlavaForConditionalGeneration", "packing"): ALONE,
}
LOOP = "it is a loop over steps, to which the rest of a run is the reader's"
OWN = "the trainer's own code, which the recipe does not touch"
PADS = "TRL pads: its trainer has no packing"
for _row, _properties, _why in (
    ("pytorch_loop.py", RUN[3:], LOOP),
    ("accelerate_loop.py", RUN[3:], LOOP + "; `patch_model` above has them"),
    ("multi_token.py", ("accumulation", *RUN[4:]), "it is a function, called in a step"),
    ("head_precision.py", RUN[1:], "it measures the forward"),
    ("lightning_loop.py", RUN[2:], OWN),
    ("torchtune_recipe.py", RUN[2:], OWN),
    ("trl_dpo.py", ("packing",), PADS),
    ("trl_grpo.py", ("packing",), PADS),
):
    WITHOUT |= dict.fromkeys([(_row, name) for name in _properties], _why)


def marks_of(test):
    """The marks of a test function and of its parameters."""
    for mark in getattr(test, "pytestmark", []):
        yield mark
        if mark.name == "parametrize":
            for case in mark.args[1]:
                yield from getattr(case, "marks", ())


def cells():
    """``{row: {property: tests}}``."""
    found = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        if path == Path(__file__) or "mark.cell(" not in path.read_text(encoding="utf-8"):
            continue
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for test, function in vars(importlib.import_module(name)).items():
            for mark in marks_of(function) if test.startswith("test_") else ():
                if mark.name == "cell":
                    row = found.setdefault(mark.args[0], {})
                    for prop in mark.args[1:]:
                        row.setdefault(prop, set()).add(
                            f"{path.relative_to(ROOT / 'tests')}::{test}"
                        )
    return found


def kind_of(row):
    if row.endswith(".py"):
        return "recipe"
    cls = getattr(hf, row, None)
    return (
        "model" if isinstance(cls, type) and issubclass(cls, hf.PreTrainedModel) else "integration"
    )


def lines():
    """The tables, and the list of the tests that they number."""
    found = cells()
    tests = sorted(set().union(*(names for row in found.values() for names in row.values())))
    for kind, properties in PROPERTIES.items():
        yield f"| {kind} | {' | '.join(properties)} |"
        yield "|---" * (1 + len(properties)) + "|"
        for row in sorted((row for row in found if kind_of(row) == kind), key=str.lower):
            assert found[row].keys() <= set(properties), row
            numbers = [
                ", ".join(str(1 + tests.index(test)) for test in sorted(found[row].get(p, ())))
                for p in properties
            ]
            yield f"| `{row}` | {' | '.join(number or '-' for number in numbers)} |"
        yield ""
    for (row, why), group in itertools.groupby(
        WITHOUT.items(), key=lambda item: (item[0][0], item[1])
    ):
        yield f"- `{row}`, {', '.join(prop for (_, prop), _ in group)}: {why}."
    yield ""
    yield from (f"{number}. `{test}`" for number, test in enumerate(tests, start=1))


def test_the_tables_are_those_of_the_markers():
    text = DOCUMENT.read_text(encoding="utf-8")
    assert text.partition(START)[2].partition(END)[0] == "\n".join([*lines(), ""])


def test_each_recipe_has_a_row():
    """All but the head that two of them share."""
    files = {path.name for path in (ROOT / "docs" / "recipes").glob("*.py")} - {"trl_head.py"}
    assert files == {row for row in cells() if kind_of(row) == "recipe"}


def test_a_cell_without_a_test_has_a_reason():
    expected = {
        (row, prop)
        for row, shown in cells().items()
        for prop in PROPERTIES[kind_of(row)]
        if prop not in shown and prop != "refused" and "refused" not in shown
    }
    assert expected == WITHOUT.keys()


if __name__ == "__main__":
    before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(START)
    text = "\n".join([*lines(), ""])
    DOCUMENT.write_text(before + START + text + END + rest.partition(END)[2], encoding="utf-8")
