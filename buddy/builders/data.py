"""Recipe or run folder → texts and windows."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from buddy.backbone.load import Backbone
from buddy.data.documents import read_documents
from buddy.data.module import TextData
from buddy.data.text import overlap
from buddy.data.windows import Windows, sample
from buddy.errors import DataError, RecipeError, RunError
from buddy.run import Run
from buddy.run_files import read_metrics
from buddy.schema import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def build_data(recipe: Recipe, backbone: Backbone) -> TextData:
    """The recipe's text, before `prepare_data` and `setup`.

    Raises:
        RecipeError: windows longer than the backbone's context, or an additional text that is the recipe's own.
    """
    data = recipe.data
    for key in ("train_sources", "calibration_sources"):
        if any(overlap(each, data.source) for each in getattr(data, key)):
            raise RecipeError(
                f"data.{key} holds text of data.source, {data.source}: its test windows would be trained on. Leave it "
                "out; its own training share is used anyway."
            )
    if data.window > backbone.context_length:
        raise RecipeError(
            f"data.window is {data.window}, but {backbone.name} reads at most {backbone.context_length} tokens; set "
            "data.window to that or less."
        )
    options = asdict(data) | {"seed": recipe.data_seed, "train_seed": recipe.seed}
    del options["prompt"]  # a matter of evaluation
    return TextData(tokenizer=backbone.tokenizer, **options)


def check_unseen(recipe: Recipe, source: str) -> None:
    """Raises DataError where a text holds one that runs of the recipe are fitted to."""
    for key in ("source", "train_sources", "calibration_sources"):
        sources = getattr(recipe.data, key)
        for seen in [sources] if key == "source" else sources:
            if overlap(source, seen):
                raise DataError(f"{source} shares text with {seen}, which data.{key} fits to; name another text.")


def build_held_out(recipe: Recipe, backbone: Backbone, *, calibration: bool = False) -> TextData:
    """The recipe's text, read and split, without the additional training texts.

    Args:
        calibration: read the additional calibration texts.

    Raises:
        BuddyError: see `build_data`, or the text cannot be read.
    """
    data = replace(recipe.data, train_sources=[])
    data = data if calibration else replace(data, calibration_sources=[])
    text = build_data(replace(recipe, data=data), backbone)
    text.setup()
    return text


def held_out(run: Run, backbone: Backbone, *, calibration: bool = False) -> TextData:
    """`build_held_out` for a complete run, whose text must be the one that it was fitted to.

    Raises:
        RunError: the text has changed, so that its held-out windows may have been trained on.
    """
    text = build_held_out(run.recipe, backbone, calibration=calibration)
    if read_metrics(run.folder).get("windows", text.evaluated.fingerprint) != text.evaluated.fingerprint:
        raise RunError(
            f"The text {run.recipe.data.source} has changed since the run was fitted, so its split is another one; "
            "restore it, or name a text that the run was not fitted to with --data."
        )
    return text


def build_windows(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    *,
    count: int,
    window: int | None = None,
    seen: Collection[str] = (),
) -> Windows:
    """Up to `count` windows of another text, with the recipe's seed and by default its length.

    Args:
        seen: digests of texts that runs are fitted to (`TextData.text_digests`), for windows of the recipe's length.

    Raises:
        DataError: the text cannot be read, is too short for one window, or is one of those that were seen.
    """
    data = recipe.data
    length = window or data.window
    documents = read_documents(source, tokenizer, length, data.text_field)
    if seen and documents.digest in seen:
        raise DataError(f"{source} has the same content as a text that routers are fitted to; name another text.")
    return sample(documents, length, count, recipe.data_seed)


def build_unseen(run: Run, tokenizer: PreTrainedTokenizerBase, source: str, *, count: int) -> Windows:
    """`build_windows` of a text that a complete run was not fitted to, wherever its texts lie now.

    Raises:
        DataError: the text cannot be read, is too short for one window, or the run was fitted to it.
    """
    check_unseen(run.recipe, source)
    seen = read_metrics(run.folder).get("texts", ())  # a run of an earlier version has none
    return build_windows(run.recipe, tokenizer, source, count=count, seen=seen)
