"""Reads JSONL files: one record a line, in either form. Other keys are kept and ignored, but one
that seems to mean `weight` is an error, and another misspelt key is told of, once a file.

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    {"prompt": "...", "completion": "..."}

A file is UTF-8, with or without a byte-order mark. An assistant turn may have `tool_calls`, beside
its content or instead of it, and a record of messages `tools`: both go to the chat template, which
has to write them. A record and an assistant turn may have a `weight`, a number or a list of them,
see :class:`bft.encode.Record`. `NaN` and `Infinity`, which are no JSON but what Python writes, are
read in keys that are ignored.
"""

import difflib
import errno
import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bft.encode import DataError, Record, Weight
from bft.loss import MISNAMED
from bft_kernels.values import check_int

logger = logging.getLogger(__name__)

_EXPECTED = "expected UTF-8 text with one JSON object a line"
_LARGEST_WEIGHT = 1e18  # float32 holds the product of two
_ROLES = ("system", "developer", "user", "assistant", "tool")
# Who answers, in other formats. Templates write them as they come, and label nothing of them.
_ALIASES = {"human": "user", "prompter": "user"} | dict.fromkeys(
    ("ai", "bot", "chatbot", "chatgpt", "gpt", "model"), "assistant"
)

# How files begin that are no JSONL, and what turns them into it.
_FOREIGN: dict[tuple[bytes, ...], str] = {
    (b"\xff\xfe\x00\x00", b"\x00\x00\xfe\xff"): "UTF-32 text; run: iconv -f UTF-32 -t UTF-8",
    (b"\xff\xfe", b"\xfe\xff"): "UTF-16 text; run: iconv -f UTF-16 -t UTF-8",
    (b"\x1f\x8b",): "compressed by gzip; run: gunzip",
    (b"\x28\xb5\x2f\xfd",): "compressed by zstd; run: unzstd",
    (b"BZh",): "compressed by bzip2; run: bunzip2",
    (b"\xfd7zXZ",): "compressed by xz; run: unxz",
    (b"PK\x03\x04",): "a zip archive; run: unzip",
    (b"PAR1",): "a Parquet file; write it as JSONL, as with pandas' to_json(orient='records', "
    "lines=True)",
}


def read_jsonl(path: str | Path, *, limit: int | None = None) -> list[Record]:
    """Reads the first `limit` records of a JSONL file (all by default); blank lines are skipped.

    Raises OSError (no such file, a folder), or DataError naming file, line and key.
    """
    if limit is not None:
        check_int("limit", limit, 1)
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "a folder, expected a JSONL file", str(path))
    records: list[Record] = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if len(records) == limit:
                break
            where = f"{path}:{number}"
            text = _decode(line, where)
            try:
                if text.strip():
                    records.append(make_record(_parse(text, where), where))
            except RecursionError as error:
                deep = "brackets nested too deep to be read"
                raise DataError(f"{where}: {deep}; {_EXPECTED}") from error
    if not records:
        raise DataError(f"{path}: no records; expected one JSON object a line")
    _tell_of_misspelt(path, records)
    return records


def _tell_of_misspelt(path: Path, records: list[Record]) -> None:
    """Warns of keys that seem to mean an optional one, which their records have not."""
    found: Counter[tuple[str, str]] = Counter()
    for record in records:
        absent = [key for key in ("answer", "tools") if key not in record.extra]
        names = absent if not record.tools else [key for key in absent if key != "tools"]
        found.update((key, near) for key in record.extra if (near := _near(key, names)))
    for (key, near), count in found.items():
        where = f"{path}: the key {key!r}, in {count} of {len(records)} records,"
        logger.warning("%s is not read; is it %r?", where, near)


def _decode(line: bytes, where: str) -> str:
    for starts, kind in _FOREIGN.items():
        if line.startswith(starts):
            raise DataError(f"{where}: {kind}; {_EXPECTED}")
    if b"\0" in line:
        seen = "NUL bytes, as UTF-16 text and files half written do"
        raise DataError(f"{where}: holds {seen}; {_EXPECTED}")
    try:
        # Files that were joined may have a mark in front of any line.
        return line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 ({error}); {_EXPECTED}") from error


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text.rstrip(), object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        what = f"{where}: not valid JSON ({error.msg}, column {error.pos + 1})"
        what += "; expected one object a line"
        if text.strip() in ("[", "{"):
            what += "; a file that is one JSON array becomes JSONL by: jq -c '.[]'"
        raise DataError(what) from error
    except ValueError as error:  # a key twice, or Python's limit on the digits of an integer
        raise DataError(f"{where}: {error}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, unless a key comes twice: readers differ in which value they take."""
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} comes twice in one object; expected it once")
    return row


def make_record(row: Any, where: str = "record") -> Record:
    """Checks one decoded JSON object and turns it into a `Record`. Raises DataError."""
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected a JSON object, got {_kind(row)}")
    if "messages" not in row:
        return _pair_record(row, where)
    if "completion" in row:  # a prompt alone is one of the other keys
        either = "either 'messages' or 'prompt' and 'completion'"
        raise DataError(f"{where}: expected {either}, got both")
    check_weight_name(row, where)
    extra = {key: row[key] for key in row if key not in ("messages", "tools", "weight")}
    _check_characters(extra.get("answer"), where, "answer")
    messages, tools = _messages(row["messages"], where), _tools(row.get("tools"), where)
    return Record(messages, where, None, extra, tools, read_weight(row, where, "weight"))


def _pair_record(row: dict[str, Any], where: str) -> Record:
    missing = [key for key in ("prompt", "completion") if key not in row]
    if missing:
        meant = ((key, _near(key, ("messages", *missing))) for key in sorted(row))
        hint = "".join(f"; is {key!r} meant as {near!r}?" for key, near in meant if near)
        raise DataError(
            f"{where}: expected 'messages', or 'prompt' and 'completion'; "
            f"{missing[0]!r} is missing among the keys {sorted(row)}{hint}"
        )
    for key in ("prompt", "completion"):
        if not isinstance(row[key], str):
            turns = isinstance(row[key], list)
            hint = "; turns of a chat go into one list, under 'messages'" if turns else ""
            raise DataError(f"{where}: {key!r}: expected a string, got {_kind(row[key])}{hint}")
    if not row["completion"].strip():
        raise DataError(f"{where}: 'completion': expected text to learn, got an empty string")
    for key in ("prompt", "completion", "answer"):
        _check_characters(row.get(key), where, key)
    pair = (row["prompt"], row["completion"])
    chat = ({"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]})
    check_weight_name(row, where)
    extra = {key: row[key] for key in row if key not in ("prompt", "completion", "weight")}
    return Record(chat, where, pair, extra, weight=read_weight(row, where, "weight"))


def _messages(value: Any, where: str) -> tuple[Mapping[str, Any], ...]:
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: 'messages': expected a non-empty list, got {_kind(value)}")
    messages = tuple(_message(row, where, f"messages[{i}]") for i, row in enumerate(value))
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise DataError(f"{where}: 'messages': expected an 'assistant' turn, got the roles {roles}")
    if roles[0] == "assistant":
        raise DataError(
            f"{where}: 'messages[0].role': expected 'system' or 'user', got 'assistant': "
            "there is nothing before it to answer"
        )
    return messages


def _message(message: Any, where: str, name: str) -> Mapping[str, Any]:
    if not isinstance(message, dict):
        raise DataError(
            f"{where}: '{name}': expected an object with 'role' and 'content', got {_kind(message)}"
        )
    role, content, calls = (message.get(key) for key in ("role", "content", "tool_calls"))
    if not isinstance(role, str):
        raise DataError(f"{where}: '{name}.role': expected a string, got {_kind(role)}")
    # A template may know other roles; one of these misspelt would be an answer without labels.
    meant = _ALIASES.get(role.strip().lower(), role.strip().lower())
    if role not in _ROLES and meant in _ROLES:
        raise DataError(f"{where}: '{name}.role': expected {meant!r}, got {role!r}")
    if calls and not (isinstance(calls, list) and role == "assistant"):
        raise DataError(
            f"{where}: '{name}.tool_calls': expected a list in an 'assistant' turn, "
            f"got {_kind(calls)} in a {role!r} turn"
        )
    if not isinstance(content, str) and not (calls and content is None):
        hint = "; join the parts into one text" if isinstance(content, list) else ""
        raise DataError(f"{where}: '{name}.content': expected a string, got {_kind(content)}{hint}")
    if role == "assistant" and not calls and not str(content).strip():
        raise DataError(f"{where}: '{name}.content': expected text to learn, got an empty string")
    _check_characters(message, where, name)
    check_weight_name(message, f"{where}: '{name}'")
    turn_weight(message, where, name)
    # Tables of rows hold null for a key that other rows have; templates ask whether a key is there.
    return {k: v for k, v in message.items() if v is not None or k == "content"}


def _near(key: str, names: Iterable[str]) -> str | None:
    """Which of the names a key seems to mean."""
    key = key.strip().lower()
    names = [name for name in names if name[0] == key[:1]]
    return next(iter(difflib.get_close_matches(key, names, n=1, cutoff=0.82)), None)


def meant_as_weight(keys: Iterable[str], known: tuple[str, ...] = ("weight",)) -> str | None:
    """The first key that seems to mean a weight, where none is one of the ``known`` names."""
    keys, names = list(keys), ("token_weight", *MISNAMED)
    if any(key in known for key in keys):
        return None
    return next((key for key in keys if key in names or _near(key, ["weight"])), None)


def check_weight_name(row: Mapping[str, Any], where: str) -> None:
    """Raises DataError for a key of a record or a turn that seems to mean its weight.

    Without the weight it would be trained in another way.
    """
    if (key := meant_as_weight(row)) is not None:
        raise DataError(f"{where}: got the key {key!r}, expected 'weight', or another name")


def turn_weight(message: Mapping[str, Any], where: str, name: str) -> Weight | None:
    """A turn's own weight, if it has one. Raises DataError if the turn carries no labels."""
    weight, role = read_weight(message, where, f"{name}.weight"), message.get("role")
    if weight is not None and role != "assistant":
        only = "expected it in 'assistant' turns, which alone carry labels"
        raise DataError(f"{where}: '{name}.weight': got one in a {role!r} turn; {only}")
    return weight


def read_weight(row: Mapping[str, Any], where: str, name: str) -> Weight | None:
    """The weight of a record or a turn, if it has one. Raises DataError unless it is numbers."""
    value: Weight | None = row.get("weight")
    for number in value if isinstance(value, list) else [] if value is None else [value]:
        known = isinstance(number, int | float) and not isinstance(number, bool)
        if not (known and abs(number) <= _LARGEST_WEIGHT):
            raise DataError(
                f"{where}: '{name}': expected a number between -1e18 and 1e18, or a list of such, "
                f"got {_kind(number)}"
            )
    return value


def _tools(value: Any, where: str) -> tuple[Mapping[str, Any], ...]:
    if not value:
        return ()
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise DataError(f"{where}: 'tools': expected a list of objects, got {_kind(value)}")
    _check_characters(value, where, "tools")
    return tuple(value)


def _check_characters(value: Any, where: str, name: str) -> None:
    """Raises DataError for a lone surrogate, which JSON can write and no tokenizer can read."""
    if isinstance(value, dict):
        for key, item in value.items():
            _check_characters(key, where, name)
            _check_characters(item, where, f"{name}.{key}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _check_characters(item, where, f"{name}[{index}]")
    elif isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                f"{where}: {name!r}: character {error.start + 1} is {value[error.start]!r}, half "
                "of a surrogate pair; expected both halves, or U+FFFD in its place"
            ) from error


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"{type(value).__name__} {str(value)[:60]!r}"
