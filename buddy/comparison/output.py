"""All that a comparison leaves: JSON, CSV, Markdown, figures, TensorBoard, and tables on the screen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from buddy.comparison.figures import draw_all
from buddy.comparison.grid import show
from buddy.comparison.longform import as_csv
from buddy.comparison.markdown import relative, render
from buddy.comparison.record import write_record
from buddy.comparison.tables import all_grids
from buddy.comparison.tensorboard import write_tensorboard
from buddy.comparison.view import Comparison
from buddy.console import results
from buddy.io import write_text

JSON, CSV, MARKDOWN = "comparison.json", "comparison.csv", "results.md"


def write_all(record: dict[str, Any], folder: Path, markdown: Path | None = None) -> None:
    """Everything into the folder, and the tables on the screen."""
    comparison = Comparison(record)
    write_record(folder / JSON, record)
    write_text(folder / CSV, as_csv(comparison))
    figures = write_markdown(comparison, folder / MARKDOWN)
    place = write_tensorboard(comparison, folder, figures)
    for grid in all_grids(comparison):
        show(grid)
    if markdown:
        write_markdown(comparison, markdown, f"{markdown.stem}-")
    lines = {
        "Results": markdown or folder / MARKDOWN,
        "Figures": ", ".join(map(str, figures.values())),
        "Data": f"{folder / JSON}, {folder / CSV}",
        "TensorBoard": f"tensorboard --logdir {place}",
    }
    for name, where in lines.items():
        results.print(f"{name + ':':12} {where}", soft_wrap=True)


def write_markdown(comparison: Comparison, path: Path, prefix: str = "") -> dict[str, Path]:
    """The document with its figures beside it; the figures."""
    figures = draw_all(comparison, path.parent, prefix)
    write_text(path, render(comparison, relative(figures, path)))
    return figures
