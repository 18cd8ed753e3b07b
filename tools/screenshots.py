"""Write the pictures of docs/watching.md: the report page by day and by night, and TensorBoard, of a run that has trained.

    python tools/screenshots.py quickstart/run

Needs Chromium (Debian's package: chromium). Everything stays on this machine.
"""

from __future__ import annotations

import argparse
import contextlib
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from browser import screenshot
from PIL import Image

from lmscale.report.page import write_page
from lmscale.report.run_files import read_run
from lmscale.report.run_report import run_report

DOCS = Path(__file__).resolve().parent.parent / "docs"
PICTURES = ("report.png", "report-dark.png", "tensorboard.png")
REPORT_SIZE, TENSORBOARD_SIZE = (1400, 1300), (1400, 1000)
LARGEST_BYTES = 300_000
COLOURS = 256
"""Of a picture: few, and enough for lines and text."""
START_TIMEOUT_S, LOAD_MS = 120.0, 20_000


def main() -> int:
    """Write the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="the run's directory")
    parser.add_argument("--output", type=Path, default=DOCS, help="where the pictures go")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        page = Path(scratch) / "report.html"
        write_page(page, run_report(read_run(options.run)))
        for name, is_dark in zip(PICTURES, (False, True), strict=False):
            screenshot(page.as_uri(), options.output / name, REPORT_SIZE, is_dark=is_dark)
    with tensorboard(options.run / "tensorboard") as url:
        screenshot(f"{url}/#custom_scalars", options.output / PICTURES[-1], TENSORBOARD_SIZE, wait_ms=LOAD_MS)
    for path in (options.output / name for name in PICTURES):
        shrink(path)
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")
    return 0


@contextlib.contextmanager
def tensorboard(directory: Path) -> Iterator[str]:
    """Serve a directory of events on this machine alone, and yield the address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(directory), "--port", str(port)]
    with subprocess.Popen([*command, "--host", "127.0.0.1"], stderr=subprocess.DEVNULL) as process:
        url = f"http://127.0.0.1:{port}"
        try:
            _wait(f"{url}/data/runs", process)
            yield url
        finally:
            process.terminate()


def _wait(url: str, process: subprocess.Popen[bytes]) -> None:
    """Wait until a server knows of a run."""
    end = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=10) as answer:
            if answer.read().strip() != b"[]":
                return
        time.sleep(0.5)
    raise RuntimeError(f"no run at {url}")


def shrink(path: Path) -> None:
    """Write a picture in few colours, and check that it is small enough for a repository."""
    with Image.open(path) as image:
        reduced = image.convert("RGB").quantize(COLOURS, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    reduced.save(path, optimize=True)
    if path.stat().st_size > LARGEST_BYTES:
        raise RuntimeError(f"{path} has {path.stat().st_size:,} bytes, more than {LARGEST_BYTES:,}")


if __name__ == "__main__":
    sys.exit(main())
