"""The page holds all results, fetches nothing and fits a phone."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.results.schema import append

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="session")
def page_file(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("page") / "new" / "report.html"
    report.main(report.Config((folder,), output))
    return output


def test_the_page_has_everything_and_fetches_nothing(page_file: Path) -> None:
    text = page_file.read_text(encoding="utf-8")
    for told in (
        "a &lt;processor&gt;",
        "trl 1.2.3",
        "needs a &lt;GPU&gt;",
        "takes no weights",
        "odd &lt;b&gt;&amp;&#34;$x$, loss",
        "Growth with tokens and vocabulary",
        "Largest batch that fits",
        'name="viewport"',
        "prefers-color-scheme: dark",
        "@media print",
    ):
        assert told in text, told
    assert text.count("<svg ") == text.count('role="img" aria-label=') == 14
    assert "<processor>" not in text
    assert not re.search(r"""(?:src|href)=["'](?!#|data:)""", text)
    assert not re.search(r"@import|url\((?!#)", text)
    names = re.findall(r'\sid="([^"]+)"', text)
    assert len(names) == len(set(names)) > 100
    used = re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', text)
    assert {first or second for first, second in used} <= set(names)


def test_columns_that_nothing_fills_are_left_out(page_file: Path) -> None:
    text = page_file.read_text(encoding="utf-8")
    assert '<th scope="col">error of dH</th>' in text
    assert "error of dW" not in text
    line = re.search(r'<th scope="row">eager</th>(.*?)</tr>', text, re.DOTALL)
    assert line is not None
    cells = re.findall(r"<td>(.*?)</td>", line[1])
    assert cells == ["5.00", "2.50", "2.0%", "26", "1,024", "1.0e-07"]


def test_results_of_a_gpu_have_notes(tmp_path: Path) -> None:
    problem = {"tokens": 8, "width": 16, "vocabulary": 64, "dtype": "bfloat16", "spread": ""}
    timed = {"seconds": 0.1, "times_g": 1.5, "extra_bytes": 1}
    append(
        tmp_path / "loss.csv",
        [
            {"provider": "eager", "status": "ok", "reason": "", **problem, **timed},
            {"provider": "own", "status": "wrong", "reason": "off by 9", **problem, **timed},
            {"provider": "trl", "status": "cut", "reason": "slow", **problem}
            | dict.fromkeys(timed, ""),
        ],
    )
    text = report.page([tmp_path])
    assert "wrong: off by 9" in text
    assert "cut: slow" in text
    assert "everywhere" in text


@pytest.mark.slow
def test_the_page_fits_a_phone_and_a_desk(page_file: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        own = Path(driver.chromium.executable_path)
        found = next(filter(None, map(shutil.which, BROWSERS)), str(own) if own.exists() else None)
        if found is None:
            pytest.skip(f"no browser: none of {', '.join(BROWSERS)} on PATH, nor playwright's own")
        # Chromium's sandbox refuses to work for root.
        sandbox = hasattr(os, "geteuid") and os.geteuid() != 0
        browser = driver.chromium.launch(executable_path=found, chromium_sandbox=sandbox)
        for width, scheme in ((360, "light"), (360, "dark"), (1200, "light")):
            page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
            said: list[str] = []
            page.on("console", lambda message, said=said: said.append(message.text))
            page.on("pageerror", lambda error, said=said: said.append(str(error)))
            page.on("request", lambda request, said=said: said.append(request.url))
            page.goto(page_file.as_uri())
            page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            sizes = page.evaluate(
                "[...document.querySelectorAll('svg, img')].map(e => e.getBoundingClientRect())"
                ".map(r => [r.width, r.height])"
            )
            assert len(sizes) == 14
            assert all(w > 250 and h > 100 for w, h in sizes)
            # Letters of figures are not scaled below what can be read.
            heights = page.evaluate(
                "[...document.querySelectorAll('svg text')].map(t => [t, t.getScreenCTM()])"
                ".map(([t, m]) => parseFloat(getComputedStyle(t).fontSize) * Math.hypot(m.c, m.d))"
            )
            assert min(heights) > 7
            colours = page.evaluate(
                "(({color, backgroundColor}) => [color, backgroundColor])"
                "(getComputedStyle(document.body))"
            )
            assert (colours[1] == "rgb(255, 255, 255)") == (scheme == "light")
            assert said == [page_file.as_uri()]
        browser.close()
