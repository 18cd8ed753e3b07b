"""One HTML page out of sections: its style and its script are in it, and it asks for nothing from a network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources
from pathlib import Path

from lmscale.errors import OutputError
from lmscale.monitor.atomic import replaced


def page(title: str, lead: str, sections: Iterable[tuple[str, str]]) -> str:
    """Put a page together.

    Args:
        title: of the page.
        lead: HTML under it.
        sections: (heading, HTML).
    """
    files = resources.files("lmscale.report")
    style, script = (files.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    body = "".join(f"<section><h2>{escape(heading)}</h2>{html}</section>" for heading, html in sections)
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # Whatever a run's files say, the page loads nothing and runs no script but its own.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        "script-src 'unsafe-inline'\">"
        f"<title>{escape(title)}</title><style>{style}</style></head>"
        f"<body><h1>{escape(title)}</h1>{lead}{body}<script>{script}</script></body></html>\n"
    )


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """Render a table.

    Args:
        columns: names, as text.
        rows: cells, as text.
        numbers: places of the columns that are aligned at the right.
    """

    def cells(kind: str, texts: Sequence[str]) -> str:
        sides = (' class="number"' if place in numbers else "" for place in range(len(texts)))
        return "".join(f"<{kind}{side}>{escape(text)}</{kind}>" for side, text in zip(sides, texts, strict=True))

    lines = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table><thead><tr>{cells("th", columns)}</tr></thead><tbody>{lines}</tbody></table></div>'
    )


def paragraph(text: str, kind: str = "") -> str:
    """Render a paragraph of text."""
    return f"<p{f' class={kind!r}' if kind else ''}>{escape(text)}</p>"


def write_page(path: Path, html: str) -> None:
    """Write a page, atomically.

    Raises:
        OutputError: if it cannot be written.
    """
    try:
        with replaced(path) as file:
            file.write(html.encode())
    except OSError as error:
        raise OutputError(f"cannot be written: {error.strerror}", field="--output", value=str(path)) from None
