"""The report page in a real browser: its scripts run, its curves can be seen by day and by night, and it asks for nothing."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

from browser import dump_dom, find_browser, screenshot

from lmscale.cli.main import main
from tests.report.runs import plain_records, write_run

pytestmark = pytest.mark.skipif(find_browser() is None, reason="no Chromium: apt-get install chromium")

SIZE = (1400, 1200)
LEAST_BLUE = 2000
"""Pixels: there are nine lines of some 300 each, and most are wider than one."""
PAPER = {False: (255, 255, 255), True: (0x0D, 0x11, 0x17)}
HOVER = """<script>
const chart = document.querySelector("#loss-by-steps svg"), box = chart.getBoundingClientRect();
const middle = {clientX: box.left + box.width / 2, clientY: box.top + box.height / 2, bubbles: true};
chart.dispatchEvent(new PointerEvent("pointermove", middle));
const lines = [...document.querySelectorAll("[id^=curve-] path")].map((path) => path.getBBox());
document.body.dataset.drawn = lines.filter((box) => box.width > 50).length;
document.body.dataset.requests = performance.getEntriesByType("resource").length;
</script></body>"""
"""Points at the middle of the first chart, measures the lines, and counts what the page has asked a server for."""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = write_run(tmp_path_factory.mktemp("page") / "run", plain_records(range(1, 41)))
    assert main(["report", str(run)]) == 0
    return run / "report.html"


def output_of(dom: str, chart: str) -> str:
    found = re.search(rf'<figure class="chart" id="{chart}">.*?<output>(.*?)</output>', dom, re.DOTALL)
    assert found is not None
    return found[1]


def test_the_browser_finds_the_curves_and_their_values(page: Path) -> None:
    dom = dump_dom(page.as_uri())
    assert output_of(dom, "loss-by-steps") == "5.6 at 40 (step)"
    assert output_of(dom, "loss-by-tokens") == "5.6 at 10240 (tokens consumed)"
    assert output_of(dom, "valid-lm_loss") == "5.8 at 40 (step)"
    assert output_of(dom, "memory-peak_bytes") == "1 at 40 (step)"


def test_the_pointer_shows_the_value_below_it(page: Path) -> None:
    pointed = page.with_name("pointed.html")
    pointed.write_text(page.read_text().replace("</body>", HOVER))
    dom = dump_dom(pointed.as_uri())
    found = re.fullmatch(r"([0-9.]+) at (\d+) \(step\).*", output_of(dom, "loss-by-steps"))
    assert found is not None
    step = int(found[2])
    assert 15 <= step <= 25
    assert float(found[1]) == pytest.approx(6.0 - 0.01 * step)
    drawn = re.search(r'data-drawn="(\d+)"', dom)
    assert drawn is not None
    assert int(drawn[1]) == dom.count('<figure class="chart"') > 8
    assert 'data-requests="0"' in dom


@pytest.mark.parametrize("is_dark", [False, True], ids=["light", "dark"])
def test_the_curves_are_seen_on_either_paper(page: Path, tmp_path: Path, is_dark: bool) -> None:
    from PIL import Image

    picture = tmp_path / "page.png"
    screenshot(page.as_uri(), picture, SIZE, is_dark=is_dark)
    with Image.open(picture) as image:
        pixels = image.convert("RGB").getcolors(maxcolors=2**24)
    counts = {colour: number for number, colour in pixels}
    assert max(counts, key=counts.__getitem__) in (PAPER[is_dark], (0xF6, 0xF8, 0xFA), (0x15, 0x1B, 0x23))
    assert PAPER[not is_dark] not in counts or counts[PAPER[not is_dark]] < 100
    # The lines alone are blue; smoothed at their edges, they are so in many shades.
    blue = sum(number for (red, _, blue), number in counts.items() if blue - red > 60)
    assert blue > LEAST_BLUE
