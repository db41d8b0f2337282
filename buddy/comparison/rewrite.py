"""`buddy compare --from`: a comparison that was made, or several as one, shown and written without a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from buddy.comparison.grid import show
from buddy.comparison.join import joined
from buddy.comparison.markdown import render
from buddy.comparison.output import write_markdown
from buddy.comparison.record import read_record
from buddy.comparison.tables import all_grids
from buddy.comparison.view import Comparison
from buddy.errors import RunError
from buddy.io import check_output_path


def rewrite(files: Sequence[Path], markdown: Path | None) -> None:
    """Show what is in the files, and write it as Markdown with the figures beside it.

    Args:
        files: comparison.json, one or more; several are joined.
        markdown: where to write the document; None for nowhere.

    Raises:
        RunError: a file is no comparison, they cannot be joined, or the place cannot be written.
    """
    records = {path: _read(path) for path in dict.fromkeys(files)}
    comparison = Comparison(joined(records))
    if markdown:
        check_output_path(markdown, *files)
        write_markdown(comparison, markdown, f"{markdown.stem}-")
    for grid in all_grids(comparison):
        show(grid)


def _read(path: Path) -> Mapping[str, Any]:
    """A record of which every table can be made."""
    record = read_record(path)
    try:
        list(all_grids(Comparison(record)))
        render(Comparison(record), {})
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:  # wherever it is read
        raise RunError(f"{path} is damaged; make it again with the `buddy compare` that made it.") from error
    return record
