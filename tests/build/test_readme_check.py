"""The README check passes what works, and fails on whatever a reader would stumble over."""

import pytest

from tests.readme_check import main


@pytest.fixture
def check(tmp_path, capfd):
    """Status and output for a document."""

    def run(text):
        document = tmp_path / "README.md"
        document.write_text(text)
        return main([str(document)]), capfd.readouterr().out

    return run


def test_passes_blocks_in_order_and_in_one_folder(check):
    text = """
```python
open("made_here", "w").write("x")
```
1. In a list:
   ```console
   $ python -c 'print(open("made_here").read())' | \\
     python -c 'print(input())'
   x
   ```
```bash
# a comment
NAME=value make test
```
```text
$ anything
```
"""
    status, out = check(text)
    assert status == 0, out
    assert out.endswith("readme: 3 passed, 0 failed, 0 skipped\n")


def test_skips_a_block_with_a_reason_and_says_it(check):
    out = "README.md:3: skipped: needs two GPUs\nreadme: 0 passed, 0 failed, 1 skipped\n"
    assert check("<!-- no-run: needs two GPUs -->\n\n```bash\ntorchrun x\n```\n") == (0, out)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("```python\nraise KeyError('gone')\n```", "KeyError: 'gone'"),
        ("```python\nimport sys; sys.exit(3)\n```", "exit status 3"),
        ("```bash\npython -c 'import no_such_module'\npython -V\n```", "no_such_module"),
        ("```bash\npython -c 'exit(1)' | python -V\n```", "exit status 1"),
        ("```bash\nmake no-such-target\n```", "no-such-target"),
        ("```console\n$ rm -rf x\n```", "rm -rf x\nonly accelerate, bft, python and make are run"),
        ("```bash\npython -V && curl x\n```", "only accelerate, bft, python and make are run"),
        ("```bash\npython $(curl x)\n```", "only accelerate, bft, python and make are run"),
        ("```bash\npython -c 'unclosed\n```", "No closing quotation"),
        ("<!-- no-run: -->\n```python\n```", "no-run gives no reason"),
        ("<!-- no-run: why -->\ntext", "expected a block"),
        ("<!-- run-with: -->\n```bash\npython -V\n```", "run-with gives no flags"),
        ("<!-- run-with: -x -->\ntext", "expected a block after the run-with comment"),
        ("```python\nprint()", "not closed"),
    ],
)
def test_fails(check, text, message):
    status, out = check(text)
    assert status == 1, out
    assert message in out
    assert "1 failed" in out


def test_what_a_comment_says_is_of_one_block_and_each_of_its_commands(check):
    text = "<!-- no-run: why -->\n```python\n1 / 0\n```\n```python\n1 / 0\n```\n"
    assert "0 passed, 1 failed, 1 skipped" in check(text)[1]
    echo = 'python -c \'import sys; sys.exit(sys.argv[1:] != ["--steps", "1"])\''
    text = f"<!-- run-with: --steps 1 -->\n```bash\n{echo}\n{echo}\n```\n```bash\n{echo}\n```\n"
    assert "1 passed, 1 failed, 0 skipped" in check(text)[1]
