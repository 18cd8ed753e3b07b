"""One table of figures, for the console and for the docs."""

from __future__ import annotations

from dataclasses import dataclass, field

from rich.table import Table


@dataclass
class Sheet:
    """A titled table; its first column names the rows."""

    title: str
    columns: list[str]
    note: str = ""
    rows: list[tuple[str, ...]] = field(default_factory=list)

    def row(self, *cells: str) -> None:
        """Add a row."""
        self.rows.append(cells)

    def rich(self) -> Table:
        """Make the console's table."""
        table = Table(title=self.title, caption=self.note, title_justify="left", caption_justify="left")
        for index, column in enumerate(self.columns):
            table.add_column(column, justify="right" if index else "left")
        for cells in self.rows:
            table.add_row(*cells)
        return table

    def markdown(self) -> str:
        """Make the page's section."""
        align = ["---", *(["---:"] * (len(self.columns) - 1))]
        lines = ["| " + " | ".join(cells) + " |" for cells in (self.columns, align, *self.rows)]
        return "\n".join([f"## {self.title}", "", *([self.note, ""] if self.note else []), *lines, ""])
