"""The public API is what public_api.txt lists: names, signatures and defaults, commands and flags.

    python tests/api/test_public_api.py    # writes the list anew

CONTRIBUTING.md says what may change, and how.
"""

import dataclasses
import difflib
import importlib
import inspect
import re
import typing
from pathlib import Path

import pytest

from bft import HeadLoss
from bft_kernels import settings

ROOT = Path(__file__).parents[2]
SNAPSHOT = Path(__file__).with_name("public_api.txt")
PACKAGES = ("bft_kernels", "bft")
IMPORT = re.compile(r"^from (bft\w*(?:\.\w+)*) import \(?([\w,\s]+?)\)?$", re.MULTILINE)
MODULE = re.compile(r"\b(typing|pathlib)\.(_\w+\.)?")
DOTTED = re.compile(r"`(bft_kernels(?:\.\w+)+|bft\.(?!py\b)\w+(?:\.\w+)*)\(")


def signature(function):
    """Parameters and what is returned, each parameter with its kind and default."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(inspect.signature(function)))


def describe(name, thing):
    """One line a function; of a class its constructor, its fields and its public methods."""
    if not inspect.isclass(thing):
        yield f"{name}{signature(thing)}" if callable(thing) else f"{name}: {type(thing).__name__}"
        return
    fields = getattr(thing, "_fields", ())
    yield f"class {name}({', '.join(fields)})" if fields else f"class {name}{signature(thing)}"
    for method, function in inspect.getmembers(thing):
        own = any(
            method in vars(base) and base.__module__.partition(".")[0] in PACKAGES
            for base in thing.__mro__
        )
        public = method == "__call__" or not method.startswith("_")
        if own and public and method not in fields and callable(function):
            yield f"class {name}.{method}{signature(function)}"


def imported_by_docs():
    """Module and name of each import, and of each call by its full name, in the documents."""
    found = set()
    for document in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = document.read_text(encoding="utf-8")
        for module, names in IMPORT.findall(text):
            found |= {(module, name.strip()) for name in names.split(",") if name.strip()}
        for dotted in DOTTED.findall(text):
            module, _, name = dotted.rpartition(".")
            found.add((module, name))
    return found


def commands():
    """Each command of ``bft`` with its flags, their types and defaults."""
    from bft.cli import COMMANDS
    from bft.usage import flags_of

    for command, (config, _) in COMMANDS.items():
        yield f"bft {command}"
        types = typing.get_type_hints(flags_of(config))
        for field in dataclasses.fields(config):
            needed = field.default is dataclasses.MISSING
            default = "required" if needed else f"= {str(field.default)!r}"
            kind = types[field.name]
            kind = kind.__name__ if isinstance(kind, type) else MODULE.sub("", str(kind))
            yield f"bft {command} --{field.name.replace('_', '-')}: {kind} {default}"


def lines():
    """The public API of today's code."""
    public = [(p, name) for p in PACKAGES for name in sorted(importlib.import_module(p).__all__)]
    documented = imported_by_docs() | {("bft_kernels.weighting", "token_weights")}
    found = []
    for place, name in [*public, *sorted(documented - set(public))]:
        found += describe(f"{place}.{name}", getattr(importlib.import_module(place), name))
    return [*found, *commands()]


def test_the_public_api_is_what_the_snapshot_lists():
    expected = SNAPSHOT.read_text(encoding="utf-8").splitlines()
    changed = "\n".join(
        difflib.unified_diff(expected, lines(), "listed", "today", lineterm="", n=0)
    )
    assert not changed, f"{changed}\n\nSee CONTRIBUTING.md, then run `python {__file__}`."


def test_what_documents_import_is_there():
    assert ("bft_kernels", "linear_nll") in imported_by_docs()
    assert ("bft", "patch_model") in imported_by_docs()


@pytest.mark.parametrize("package", PACKAGES)
def test_what_is_public_is_imported_by_its_name(package):
    """And `dir` of the package tells it, which completion asks."""
    module = importlib.import_module(package)
    assert set(module.__all__) <= set(dir(module))


def test_the_options_of_bft_are_settings_of_the_loss():
    """Each flag and each field of HeadLoss is the very field of the one list."""
    from bft.config import LossOptions

    chosen = dataclasses.fields(settings.TrainingSettings)
    for ours, own in ((LossOptions, {"max_buffer_mib"}), (HeadLoss, {"max_buffer_bytes", "seed"})):
        inherited = [field for field in dataclasses.fields(ours) if field.name not in own]
        assert [field.metadata for field in inherited] == [field.metadata for field in chosen]
        assert own | {field.name for field in chosen} == set(ours.__dataclass_fields__)
    assert HeadLoss.max_buffer_bytes is LossOptions.max_buffer_mib is None


def test_the_table_of_options_is_that_of_the_settings():
    page = (ROOT / "docs/loss.md").read_text()
    assert settings.table() in page


if __name__ == "__main__":
    SNAPSHOT.write_text("\n".join(lines()) + "\n", encoding="utf-8")
