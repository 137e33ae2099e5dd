"""Runs what README.md and docs/*.md tell a reader to run.

    python tests/readme_check.py [FILE.md ...]

The blocks of one document run from top to bottom in one temporary folder, each in a fresh process.
A ```python block passes if it exits with 0. In a ```bash, ```sh or ```console block every command
runs (in a console block what follows `$ `, the rest is output) if it is of `bft` or `python`; of a
`make` target only that it exists is checked; any other command fails the check. A block that cannot
run here has its reason on the line above:

    <!-- no-run: needs two GPUs -->

and one that takes too long here, the flags that make it short, for each of its commands:

    <!-- run-with: --steps 1 -->
"""

import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_S = 300
LANGUAGES = ("python", "bash", "sh", "console")
PROGRAMS = ("accelerate", "bft", "python")
COMMENT = re.compile(r"<!--\s*(no-run|run-with):?\s*(.*?)\s*-->")
FENCE = re.compile(r"^(?P<indent> *)(?P<fence>`{3,}|~{3,}) *(?P<language>[\w+-]*)")


class SnippetError(Exception):
    """A snippet did not do what the document promises."""


@dataclass(frozen=True)
class Block:
    """A fenced block, and what the comment above it says of it."""

    line: int
    language: str
    text: str
    no_run: str | None  # why it is not to be run
    flags: str  # for each of its commands


def blocks(document: Path) -> Iterator[Block]:
    """The fenced blocks in a language that runs, in order.

    Raises:
        SnippetError: a no-run comment without a reason or a block, or a fence that is not closed.
    """
    lines = enumerate(document.read_text(encoding="utf-8").splitlines(), start=1)
    said: dict[str, str] = {}
    for number, line in lines:
        fence = FENCE.match(line)
        comment = COMMENT.search(line)
        if comment:
            if not comment[2]:
                what = "reason" if comment[1] == "no-run" else "flags"
                raise SnippetError(f"line {number}: {comment[1]} gives no {what}")
            said[comment[1]] = comment[2]
        elif fence:
            body = []
            for _, inner in lines:
                if inner.strip() == fence["fence"]:
                    break
                body.append(inner)
            else:
                raise SnippetError(f"line {number}: the fence is not closed")
            language = fence["language"].lower()
            if language in LANGUAGES:
                text = dedent("\n".join(body))
                yield Block(number, language, text, said.get("no-run"), said.get("run-with", ""))
            said = {}
        elif line.strip() and said:
            raise SnippetError(f"line {number}: expected a block after {', '.join(said)}")


def commands(block: Block) -> list[str]:
    """The command lines of a shell block, with continued lines joined."""
    lines = block.text.replace("\\\n", " ").splitlines()
    if block.language == "console":
        lines = [line[2:] for line in lines if line.startswith("$ ")]
    return [line for line in map(str.strip, lines) if line and not line.startswith("#")]


def programs(command: str) -> list[list[str]]:
    """The words of each program in a command line: of both sides of a pipe, say.

    Leading assignments are left out.
    """
    lexer = shlex.shlex(command, posix=True, punctuation_chars="();&|")
    lexer.whitespace_split = True
    found: list[list[str]] = [[]]
    for word in lexer:
        if set(word) <= set("();&|"):
            found.append([])
        elif found[-1] or not re.match(r"\w+=", word):
            found[-1].append(word)
    return [words for words in found if words]


def run(arguments: list[str], folder: Path) -> None:
    """Run in ``folder``, with this interpreter's programs first on PATH."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    subprocess.run(
        arguments,
        cwd=folder,
        env={**os.environ, "PATH": path, "MPLBACKEND": "Agg"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_S,
        check=True,
    )


def run_command(command: str, folder: Path) -> None:
    """Run one command line, or refuse it."""
    called = programs(command)
    if [words[0] for words in called] == ["make"]:
        run(["make", "-n", *called[0][1:]], ROOT)
    elif {words[0] for words in called} <= set(PROGRAMS) and not re.search(r"[$]\(|`", command):
        run(["bash", "-euo", "pipefail", "-c", command], folder)
    else:
        raise SnippetError(f"only {', '.join(PROGRAMS)} and make are run: give a no-run reason")


def outcome(block: Block, folder: Path) -> str:
    """Run one block's program or commands; say how it went."""
    if block.no_run is not None:
        return f"skipped: {block.no_run}"
    lines = commands(block)
    if block.language == "python":
        lines = [f"python line_{block.line}.py"]
        (folder / f"line_{block.line}.py").write_text(block.text, encoding="utf-8")
    for command in lines:
        command = f"{command} {block.flags}".rstrip()
        try:
            run_command(command, folder)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            return f"failed: {command}\n{error}\n{error.stdout}"
        except (SnippetError, ValueError) as error:
            return f"failed: {command}\n{error}"
    return "passed"


def check(document: Path) -> Iterator[tuple[str, str]]:
    """Run a document's blocks; say of each where it is and how it went."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            for block in blocks(document):
                yield f"{document.name}:{block.line}", outcome(block, Path(folder))
        except SnippetError as error:
            yield document.name, f"failed: {error}"


def main(arguments: list[str]) -> int:
    """Check the documents named, or the project's; return the exit status."""
    documents = [Path(argument) for argument in arguments]
    outcomes: Counter[str] = Counter()
    for document in documents or [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]:
        for where, went in check(document):
            print(f"{where}: {went}", flush=True)
            outcomes[went.partition(":")[0]] += 1
    counts = (f"{outcomes[went]} {went}" for went in ("passed", "failed", "skipped"))
    print("readme:", ", ".join(counts))
    return 1 if outcomes["failed"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
