"""The page in a real browser: figures are there at desk and phone width, values show on hover, nothing is cut off."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from eval.frames import stage_frame
from eval.report import write_report
from eval.runs import read_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium (or chrome) on PATH to open the page in")
QUIET = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]

LOOK = """
<script type="module">
const seen = {}, shown = svg => svg.getBoundingClientRect().width > 0;
const figures = [...document.querySelectorAll("figure svg")];
seen.drawn = figures.length;
seen.shown = figures.filter(shown).length;
seen.wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
seen.paper = getComputedStyle(document.body).backgroundColor;
const svg = figures.find(shown), point = [...svg.querySelectorAll(".value")][1], box = point.getBoundingClientRect();
seen.before = document.getElementById("tip").hidden;
const at = {clientX: (box.left + box.right) / 2 + 3, clientY: (box.top + box.bottom) / 2, bubbles: true};
svg.dispatchEvent(new PointerEvent("pointermove", at));
const tip = document.getElementById("tip"), place = tip.getBoundingClientRect();
seen.tip = tip.hidden ? null : tip.textContent;
seen.inside = place.left >= 0 && place.right <= document.documentElement.clientWidth;
document.body.dispatchEvent(new PointerEvent("pointermove", {clientX: 1, clientY: 1, bubbles: true}));
seen.after = tip.hidden;
parent.postMessage(JSON.stringify(seen), "*");
</script>
"""


@pytest.fixture(scope="module")
def page(runs: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a run, with a script added that looks at it as a reader would."""
    run = runs.build(tmp_path_factory.mktemp("browser") / "run", {5: runs.stages[5]}, steps=20)
    file = write_report(run)
    file.with_name("look.html").write_text(file.read_text().replace("</body>", LOOK + "</body>"))
    return file.with_name("look.html")


def look(page: Path, tmp_path: Path, width: int, scheme: int = 1) -> dict[str, Any]:
    """What the script saw in a window (a frame, for windows have a least width) of `width` pixels."""
    frame = tmp_path / "frame.html"
    frame.write_text(
        "<body style='margin:0'><script>onmessage = event => document.body.append("
        "Object.assign(document.createElement('p'), {textContent: 'SEEN' + event.data}))</script>"
        f'<iframe src="file://{page}" style="border:0;width:{width}px;height:900px"></iframe>'
    )
    flags = [f"--user-data-dir={tmp_path / 'profile'}", f"--blink-settings=preferredColorScheme={scheme}"]
    flags += ["--virtual-time-budget=3000", f"--window-size={max(width, 600)},1000", "--dump-dom"]
    assert CHROMIUM is not None
    done = subprocess.run([CHROMIUM, *QUIET, *flags, f"file://{frame}"], capture_output=True, text=True, timeout=120)
    found = re.search(r"<p>SEEN(.*?)</p>", done.stdout)
    assert found, done.stderr[-2000:]
    return json.loads(unescape(found[1]))


@pytest.mark.parametrize(("width", "scheme"), [(1200, 1), (390, 0)])
def test_figures_are_there_and_a_value_is_read(page: Path, tmp_path: Path, width: int, scheme: int) -> None:
    seen = look(page, tmp_path, width, scheme)
    assert seen["shown"] == seen["drawn"] // 2 == 9, "of each figure the one that fits"
    assert seen["wide"] <= 0, "nothing makes the page wider than the window"
    assert seen["before"] and seen["after"] and seen["inside"]
    ratio = stage_frame(read_run(page.parents[1])).loc[1, "ratio"]
    assert seen["tip"] == (
        f"H1-5/10: 95.5 ± 1.0 % accuracy, {ratio:.2f}\u00d7 the teacher, 11,616 tokens/s, 81.9K training tokens, "
        "on the frontier"
    )
    assert seen["paper"] == ("rgb(255, 255, 255)" if scheme else "rgb(20, 23, 28)")


def test_the_page_prints(page: Path, tmp_path: Path) -> None:
    file = tmp_path / "page.pdf"
    assert CHROMIUM is not None
    flags = [f"--user-data-dir={tmp_path / 'profile'}", f"--print-to-pdf={file}"]
    subprocess.run([CHROMIUM, *QUIET, *flags, f"file://{page}"], check=True, capture_output=True, timeout=120)
    assert file.read_bytes().startswith(b"%PDF") and file.stat().st_size > 20_000
