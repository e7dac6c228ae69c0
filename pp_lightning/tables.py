"""Tables of figures: Markdown for people, CSV and JSON for machines."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pp_lightning.records import write_json, write_text


@dataclass(frozen=True)
class Grid:
    """A table as text: the ``words`` columns at the left hold words, the others numbers.

    ``title`` says what the numbers are; it is empty where the headings do.
    """

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1

    def markdown(self) -> str:
        """The table in Markdown, with its title above."""
        rule = ["---:" if number >= self.words else "---" for number in range(len(self.headings))]
        lines = ["| " + " | ".join(cells) + " |" for cells in (self.headings, rule, *self.rows)]
        return "\n".join([f"**{self.title}**\n", *lines] if self.title else lines)


def markdown(grids: Sequence[Grid], caption: str) -> str:
    """The tables in Markdown, with their caption below."""
    return "\n\n".join([*(grid.markdown() for grid in grids), caption]) + "\n"


def comma_separated(lines: Sequence[Mapping[str, object]]) -> str:
    """Figures unrounded, with a column for everything that any line has."""
    text = io.StringIO()
    fields = dict.fromkeys(field for line in lines for field in line)
    writer = csv.DictWriter(text, list(fields), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def write_report(
    place: Path, text: str, record: Mapping[str, Any], lines: Sequence[Mapping[str, object]] | None = None
) -> None:
    """Write the results of a run.

    ``place`` is all files' path without the suffix; without ``lines`` there is no CSV.
    """
    if lines is not None:
        write_text(place.with_suffix(".csv"), comma_separated(lines))
    write_text(place.with_suffix(".md"), text)
    write_json(place.with_suffix(".json"), dict(record))
