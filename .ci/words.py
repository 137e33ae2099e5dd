"""One word for one thing: refuses names and words for which the field has another.

    words.py FILE...    by default all tracked files

Each rule is a regular expression, the word to take instead, and where it holds: prefixes of paths.
It leaves out lines, after their path and a colon, that match what the rule allows.
"""

import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

CODE = ("bft_kernels/", "csrc/")
ALL = (*CODE, "bft/", "benchmarks/", "docs/", "README.md", "CONTRIBUTING.md")
SUFFIXES = {".py", ".pyi", ".h", ".cpp", ".cu", ".cuh", ".md"}


class Rule(NamedTuple):
    """A word that has a better one."""

    pattern: str
    instead: str
    where: tuple[str, ...] = ALL
    allowed: str = r"\b\B"  # matches nothing


RULES = [
    Rule(r"(vendor's|bare) product", "GEMM"),
    Rule(r"\b[Ss]weep(s|_|\b)", "online softmax"),
    Rule(r"\bresidual\b", "saved", CODE),
    Rule(r"\b(gather|scatter)_(hidden|weight)\b", "spmm_hidden, spmm_weight", CODE),
    Rule(r"\bentry_(offsets|columns|values)\b", "csr_offsets, csr_columns, csr_values", CODE),
    Rule(r"\bgathers\(|(MAX_|kMax)G(ATHERED|athered)", "spmm_takes, SPMM_MAX_WIDTH", CODE),
    Rule(
        r"\bfloors?(_ptr)?\b(?!\()",
        "lse_bound or delta",
        CODE,
        # The public argument of `token_weights`.
        r"^bft_kernels/weighting.py:( *floor: (float = DELTA,|the ``delta``)|.*C\+floor\)"
        r'| +check_positive\("floor", floor\)|.*\bdelta=floor\))',
    ),
    Rule(r"\bshare\b ?[=\[]", "token_scale or normalizer", CODE),
    Rule(r"\bwide\b ?[=:)]", "acc_dtype, or what is wide", CODE),
    # `weight` is the matrix. In prose a scheme may have weights.
    Rule(r"\b[Ww]eights\b( [=:&{]|: |\.\w|\[|\()", "weighting", CODE),
]


def wrong_words(name: str, text: str) -> list[str]:
    """A line for each word of a file that has a better one."""
    found = []
    for rule in RULES:
        if not name.startswith(rule.where):
            continue
        for number, line in enumerate(text.splitlines(), start=1):
            match = re.search(rule.pattern, line)
            if match and not re.search(rule.allowed, f"{name}:{line}"):
                found.append(f"{name}:{number}: {match[0]!r}, expected {rule.instead}")
    return found


if __name__ == "__main__":
    listing = subprocess.run(["git", "ls-files", "-z"], capture_output=True, text=True)
    names = sys.argv[1:] or listing.stdout.split("\0")[:-1]
    paths = [Path(name) for name in names if Path(name).suffix in SUFFIXES]
    lines = [line for path in paths for line in wrong_words(path.as_posix(), path.read_text())]
    sys.exit("\n".join(lines) or 0)
