"""``python -m benchmarks`` without a command."""

import pkgutil
import sys

import pytest

from benchmarks import __main__ as command
from benchmarks import run


@pytest.mark.parametrize(
    ("arguments", "asked"), [(["--help"], True), (["-h"], True), (["nope"], False), ([], False)]
)
def test_it_lists_its_commands(arguments, asked, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == (0 if asked else 2)
    printed = capsys.readouterr()
    text = printed.out if asked else printed.err
    for module in pkgutil.iter_modules(run.__path__):
        (line,) = [x for x in text.splitlines() if x.startswith(f"  {module.name} ")]
        assert len(line.split()) > 4
    assert ("got 'nope', expected a command" in text) == (arguments == ["nope"])
