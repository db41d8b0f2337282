"""What training logged and left, to be compared between runs."""

import json
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from buddy.io import load_tensors
from buddy.run_files import ADAPTER


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values of everything that was logged in training, by tag, over all beginnings of a run."""
    found: dict[str, list[tuple[int, float]]] = {}
    for path in folder.glob("events.*"):  # one by one: two that began in the same second have no order
        events = EventAccumulator(str(path)).Reload()
        for tag in events.Tags()["scalars"]:
            if tag.startswith(("train/", "heal/")):
                found.setdefault(tag, []).extend((point.step, point.value) for point in events.Scalars(tag))
    return {tag: sorted(points) for tag, points in found.items()}


def assert_alike(one: Path, other: Path) -> None:
    """The same curves within 1e-4, weights within rounding, and results."""
    ours, theirs = curves(one), curves(other)
    assert ours.keys() == theirs.keys()
    for tag, points in ours.items():
        assert [step for step, _ in points] == [step for step, _ in theirs[tag]], tag
        assert [value for _, value in points] == pytest.approx([value for _, value in theirs[tag]], abs=1e-4), tag
    for file in ("router.safetensors", f"{ADAPTER}/adapter_model.safetensors"):
        assert (one / file).exists() == (other / file).exists()
        if (one / file).exists():
            left, right = load_tensors(one / file), load_tensors(other / file)
            assert left.keys() == right.keys()
            for name, tensor in left.items():
                torch.testing.assert_close(tensor, right[name], atol=1e-4, rtol=1e-3)
    results, theirs = (json.loads((folder / "metrics.json").read_text()) for folder in (one, other))
    for left, right in zip(results["documents"], theirs["documents"], strict=True):
        for name in ("budget", "loss", "kl", "tokens"):
            assert left[name] == pytest.approx(right[name], rel=1e-4, abs=1e-4), name
    assert [each["executed"] for each in results["results"]] == [each["executed"] for each in theirs["results"]]
