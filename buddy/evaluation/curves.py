"""A run for TensorBoard: curves over executed layers, settings and results for the tab HPARAMS, texts, pictures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from buddy.io import on_disk

Scalar = bool | int | float | str
TABLE = "hparams"  # prefix of the tags that are columns of the table and points of no curve


def write_run(
    folder: Path,
    curves: Mapping[str, Sequence[tuple[int, float]]],
    settings: Mapping[str, Scalar],
    metrics: Mapping[str, float],
    texts: Mapping[str, str],
    columns: Iterable[str] = (),
) -> None:
    """Add one run's events to a folder, which TensorBoard shows as one run.

    torch's `add_hparams` would make another run below it; the same summaries are written into this one instead.

    Args:
        folder: made where it is missing.
        curves: points (step, value) by tag.
        settings: columns of the table of hyper-parameters; the same keys in all runs that are looked at together,
            since the table takes its columns from one of them.
        metrics: results in that table.
        texts: Markdown by tag.
        columns: results that other runs may have and this one lacks.

    Raises:
        RunError: the folder cannot be written.
    """
    from torch.utils.tensorboard import SummaryWriter
    from torch.utils.tensorboard.summary import hparams

    values = {f"{TABLE}/{name}": value for name, value in metrics.items()}
    tags = {f"{TABLE}/{name}": 0.0 for name in (*metrics, *columns)}  # only the names of these are written
    with on_disk(folder), SummaryWriter(str(folder)) as writer:
        for tag, points in curves.items():
            for step, value in points:
                writer.add_scalar(tag, value, step)
        for tag, value in values.items():
            writer.add_scalar(tag, value, 0)
        for summary in hparams(dict(settings), tags):
            writer.file_writer.add_summary(summary)
        for tag, text in texts.items():
            writer.add_text(tag, text)


def write_pictures(folder: Path, pictures: Mapping[str, Path]) -> None:
    """Add PNG files to a folder's events as images.

    Args:
        folder: made where it is missing.
        pictures: files by tag.

    Raises:
        RunError: the folder cannot be written.
    """
    from matplotlib.image import imread
    from torch.utils.tensorboard import SummaryWriter

    with on_disk(folder), SummaryWriter(str(folder)) as writer:
        for tag, path in pictures.items():
            writer.add_image(tag, imread(path)[..., :3], dataformats="HWC")
