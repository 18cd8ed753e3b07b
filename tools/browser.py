"""Headless Chromium: what a page is after its scripts have run, and how it looks. Debian's package: chromium."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
TIMEOUT_S = 120.0
# No sandbox, because CI runs as root in a container; no network of its own; a profile that is thrown away.
_OPTIONS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--hide-scrollbars",
    "--force-device-scale-factor=1",
)


def find_browser() -> str | None:
    """Return the path of a Chromium, None where none is installed."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


def dump_dom(url: str, *options: str) -> str:
    """Load a page, let its scripts run, and return its elements as HTML."""
    return _run([*options, "--dump-dom", url])


def screenshot(
    url: str, path: Path, size: tuple[int, int], *, is_dark: bool = False, wait_ms: int = 0, options: Sequence[str] = ()
) -> None:
    """Load a page and write how it looks.

    Args:
        url: of the page.
        path: a .png.
        size: of the window, in pixels.
        is_dark: the reader prefers dark colours.
        wait_ms: time that the page's own clock runs for, before the picture is taken.
        options: more, for the browser.
    """
    theme = [f"--blink-settings=preferredColorScheme={0 if is_dark else 1}"]
    wait = [f"--virtual-time-budget={wait_ms}"] if wait_ms else []
    window = f"--window-size={size[0]},{size[1]}"
    _run([*theme, *wait, *options, window, f"--screenshot={path.resolve()}", url])
    if not path.is_file():
        raise RuntimeError(f"the browser wrote no picture of {url}")


def _run(arguments: Sequence[str]) -> str:
    browser = find_browser()
    if browser is None:
        raise RuntimeError(f"no browser: install one of {', '.join(NAMES)}")
    with tempfile.TemporaryDirectory(prefix="browser-") as home:
        done = subprocess.run(
            [browser, *_OPTIONS, f"--user-data-dir={home}", *arguments],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=True,
            # What it writes beside its profile goes there too.
            env={**os.environ, "HOME": home, "XDG_CONFIG_HOME": home, "XDG_CACHE_HOME": home},
        )
    return done.stdout
