"""Files of records: what is read, and what is refused with its file, line and key."""

import codecs
import gzip
import json

import pytest

from bft.encode import DataError
from bft.records import make_record, read_jsonl
from tests.support.batches import chat

ROW = '{"prompt": "a", "completion": "b"}'


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.jsonl"


def refused(path):
    with pytest.raises(DataError) as error:
        read_jsonl(path)
    return str(error.value)


# --- what is read --------------------------------------------------------------------------------


def test_reads_lines_skips_blanks_and_stops_at_the_limit(path):
    rows = [chat("a", str(i), answer="x") for i in range(3)]
    path.write_text("\n\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert [r.messages[1]["content"] for r in read_jsonl(path)] == ["0", "1", "2"]
    assert [r.where for r in read_jsonl(path, limit=2)] == [f"{path}:1", f"{path}:3"]
    assert read_jsonl(path)[0].extra == {"answer": "x"}
    with pytest.raises(ValueError, match="limit: got 0, expected at least 1"):
        read_jsonl(path, limit=0)


@pytest.mark.parametrize(
    "data",
    [
        codecs.BOM_UTF8 + f"{ROW}\n{ROW}\n".encode(),
        codecs.BOM_UTF8 + f"{ROW}\n".encode() + codecs.BOM_UTF8 + ROW.encode(),
        codecs.BOM_UTF8 + f"\r\n{ROW}\r\n \r\n{ROW}\r\n".encode(),
    ],
    ids=["one mark", "joined files", "Windows line ends"],
)
def test_marks_and_line_ends_of_other_systems(path, data):
    path.write_bytes(data)
    assert [record.pair for record in read_jsonl(path)] == [("a", "b")] * 2


def test_a_prompt_beside_messages_is_one_of_the_other_keys():
    record = make_record(chat("What?", "That.", prompt="What?", prompt_id="7"))
    assert [message["content"] for message in record.messages] == ["What?", "That."]
    assert record.extra == {"prompt": "What?", "prompt_id": "7"}
    assert record.pair is None


def test_numbers_that_are_no_json_are_read_where_they_are_ignored(path):
    path.write_text('{"prompt": "a", "completion": "b", "score": NaN, "top": Infinity}\n')
    assert read_jsonl(path)[0].extra["top"] == float("inf")


def test_keys_without_a_value_are_not_there_for_the_template():
    row = chat("a", "b")
    row["messages"][1] |= {"tool_calls": None, "name": None}
    assert make_record(row).messages[1] == {"role": "assistant", "content": "b"}


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (ROW.encode("utf-16"), "1: UTF-16 text; run: iconv -f UTF-16 -t UTF-8"),
        (ROW.encode("utf-32"), "1: UTF-32 text"),
        (ROW.encode("utf-16-le"), "1: holds NUL bytes"),
        (f"{ROW}\n".encode() + bytes(64), "2: holds NUL bytes"),
        (gzip.compress(ROW.encode(), mtime=0), "1: compressed by gzip; run: gunzip"),
        (b"PK\x03\x04 and more", "1: a zip archive"),
        (b"PAR1 and more", "1: a Parquet file"),
        (f"{ROW}\n".encode() + b'{"prompt": "caf\xe9"}', "2: not UTF-8"),
        (b"[\n" + ROW.encode() + b"\n]", "1: not valid JSON (Expecting value, column 2)"),
        (b"{\n" + ROW[1:].encode(), "becomes JSONL by: jq -c '.[]'"),
    ],
)
def test_a_file_that_is_no_jsonl_is_told_what_it_is(path, data, says):
    path.write_bytes(data)
    text = refused(path)
    assert f"{path}:" in text
    assert says in text


CALL = '{"role": "assistant", "content": null, "tool_calls": '


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "not valid JSON"),
        (ROW + ",", "not valid JSON (Extra data, column 35)"),
        ("[1]", "expected a JSON object, got list"),
        (f"[{ROW}]", "expected a JSON object, got list"),
        ("NaN", "expected a JSON object, got float 'nan'"),
        ('{"id": ' + "7" * 5000 + "}", "Exceeds the limit (4300 digits)"),
        ('{"x": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deep"),
        ('{"prompt": "a", "completion": "b", "prompt": "c"}', "the key 'prompt' comes twice"),
        ('{"prompt": "a", "completion": "b", "x": {"y": 1, "y": 1}}', "the key 'y' comes twice"),
        ('{"text": "a"}', "'prompt' is missing among the keys ['text']"),
        ('{"prompt": "a"}', "'completion' is missing"),
        ('{"prompt": 3, "completion": "b"}', "'prompt': expected a string, got int '3'"),
        ('{"prompt": [], "completion": []}', "'prompt': expected a string, got list '[]'; turns"),
        ('{"prompt": "a", "completion": " "}', "'completion': expected text to learn"),
        ('{"prompt": "a", "completion": "b", "messages": []}', "got both"),
        ('{"prompt": "a\\ud800", "completion": "b"}', "'prompt': character 2 is '\\ud800', half"),
        ('{"prompt": "a", "completion": "b\\udc00."}', "'completion': character 2"),
        ('{"prompt": "a", "completion": "b", "answer": "\\ud83d"}', "'answer': character 1"),
        ('{"messages": []}', "'messages': expected a non-empty list"),
        ('{"messages": ["a"]}', "'messages[0]': expected an object"),
        ('{"messages": [{"role": 1, "content": "a"}]}', "'messages[0].role': expected a string"),
        ('{"messages": [{"role": "user"}]}', "'messages[0].content': expected a string, got noth"),
        ('{"messages": [{"role": "user", "content": ["a"]}]}', "join the parts into one text"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "expected an 'assistant' turn"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "nothing before it"),
        ('{"messages": [{"role": "Assistant", "content": "a"}]}', "expected 'assistant', got 'Ass"),
        ('{"messages": [{"role": "human", "content": "a"}]}', "expected 'user', got 'human'"),
        ('{"messages": [{"role": "GPT", "content": "a"}]}', "expected 'assistant', got 'GPT'"),
        ('{"messages": [{"role": "assistant", "content": " "}]}', "[0].content': expected text to"),
        ('{"messages": [{"role": "assistant", "content": null}]}', "expected a string, got nothin"),
        ('{"messages": [' + CALL + "[]}]}", "[0].content': expected a string, got nothing"),
        ('{"messages": [' + CALL + '"f()"}]}', "[0].tool_calls': expected a list in an 'assist"),
        ('{"messages": [' + CALL + '[{"a": "\\ud800"}]}]}', "'messages[0].tool_calls[0].a': char"),
        ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "'messages[0].content': char"),
        (json.dumps(chat("a", "b", tools="[]")), "'tools': expected a list of objects, got str"),
        (json.dumps(chat("a", "b", weight="1")), "'weight': expected a number between -1e18 and"),
        (json.dumps(chat("a", "b", weight=True)), "'weight': expected a number between -1e18 and"),
        (json.dumps(chat("a", "b", weight=[1, None])), "or a list of such, got nothing"),
        (ROW[:-1] + ', "weight": NaN}', "'weight': expected a number between -1e18 and 1e18"),
        (ROW[:-1] + ', "weight": -1e39}', "'weight': expected a number between -1e18 and 1e18"),
        (ROW[:-1] + f', "weight": 1{"0" * 400}}}', "'weight': expected a number between -1e18"),
        (
            '{"messages": [{"role": "user", "content": "a", "weight": 0}]}',
            "got one in a 'user' turn",
        ),
        (
            '{"messages": [' + CALL + '[{}], "weight": "0"}]}',
            "'messages[0].weight': expected a num",
        ),
    ],
)
def test_a_bad_line_is_named(path, line, says):
    path.write_text(f"{ROW}\n{line}\n", encoding="utf-8")
    text = refused(path)
    assert text.startswith(f"{path}:2: ")
    assert says in text


@pytest.mark.parametrize("key", ["wieght", "weights", "Weight", "token_weight", "loss_scale"])
def test_a_misspelt_weight_is_refused_and_other_words_are_not(key):
    with pytest.raises(DataError, match=f"^record: got the key '{key}', expected 'weight'"):
        make_record(json.loads(ROW) | {key: 0.5})
    turns = chat("a", "b")
    turns["messages"][1][key] = 0.5
    with pytest.raises(DataError, match=rf"'messages\[1\]': got the key '{key}'"):
        make_record(turns)
    for other in ("height", "weight_kg", "width"):
        assert make_record(json.loads(ROW) | {other: 0.5}).weight is None


def test_another_misspelt_key_is_told_of_once_a_file(path, caplog):
    row, turns = json.loads(ROW), chat("a", "b")
    lines = [row | {"anwser": "b"}, row | {"answer": "b", "answers": ["b"]}, row | {"Anwser": "b"}]
    lines += [turns | {"tool": []}, turns | {"tool": [], "tools": [{"name": "beat"}]}, lines[0]]
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    assert read_jsonl(path)[0].extra == {"anwser": "b"}
    found = [("anwser", 2, "answer"), ("Anwser", 1, "answer"), ("tool", 1, "tools")]
    assert caplog.messages == [
        f"{path}: the key {key!r}, in {count} of 6 records, is not read; is it {near!r}?"
        for key, count, near in found
    ]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"Messages": []}, "the keys ['Messages']; is 'Messages' meant as 'messages'?"),
        ({"Prompt": "a", "completion": "b"}, "is 'Prompt' meant as 'prompt'?"),
        ({"prompt": "a", "completions": "b"}, "is 'completions' meant as 'completion'?"),
    ],
)
def test_a_misspelt_key_that_has_to_be_there_is_named(row, says):
    with pytest.raises(DataError) as caught:
        make_record(row)
    assert str(caught.value).endswith(says)


def test_a_file_without_records_and_a_folder_are_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_bytes(codecs.BOM_UTF8 + b"\n")
    assert "no records" in refused(tmp_path / "empty.jsonl")
    with pytest.raises(IsADirectoryError, match="a folder, expected a JSONL file"):
        read_jsonl(tmp_path)
