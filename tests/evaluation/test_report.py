"""The results of one run: table, figure, metrics and TensorBoard's curves."""

import math

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from buddy.config import flatten
from buddy.evaluation.figures import settings_of
from buddy.evaluation.report import write_run_results
from buddy.evaluation.tables import show_scores, show_tasks
from buddy.metrics.perplexity import Scores, as_json
from tests.hparams import row_of_table


def made(budget: float, layers: int, mean: float, spread: float = 1.0) -> Scores:
    loss = 10 * mean + spread * np.arange(-2.0, 3.0)
    executed = (layers, float(layers), layers)
    return Scores(budget, layers, executed, 1, loss, loss / 100, np.full(5, 10.0))


OURS = [made(0.5, 3, 4.0), made(1.0, 6, 3.0), made(0.75, 4, 3.5)]
ONLY = [made(1.0, 6, 3.0)]
REST = {"fit": {"seconds": 1.5, "parameters": 7}, "windows": "0123456789abcdef"}


def line(out: str, start: str) -> list[str]:
    return next(each for each in out.splitlines() if each.split()[:1] == [start]).split()


def test_the_table_of_one_run(capsys):
    show_scores(OURS, "buddy on /data/[/odd].txt")
    out = capsys.readouterr().out
    low, high = OURS[0].interval()
    assert "buddy on /data/[/odd].txt" in out
    expected = ["0.5", "3", "3", "/", "3.00", "/", "3", "54.60", f"{low:.2f}", "–", f"{high:.2f}", "0.0400"]
    assert line(out, "0.5") == expected
    assert "50 scored tokens in 5 documents" in out


def test_what_a_run_leaves(small, tmp_path):
    recipe = small(tmp_path, "router.options.hidden=3", "router.options.prior=none")
    metrics = write_run_results(tmp_path, recipe, OURS, **REST)
    assert {key: metrics[key] for key in REST} == REST
    assert metrics["results"] == as_json(OURS)["results"]
    assert [(sums["budget"], sums["loss"]) for sums in metrics["documents"]] == [
        (s.budget, s.loss.tolist()) for s in OURS
    ]
    with Image.open(tmp_path / "loss.png") as figure:
        assert figure.format == "PNG"
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == [], "and in no run of its own for TensorBoard"
    events = EventAccumulator(str(tmp_path)).Reload()
    curve = [(event.step, event.value) for event in events.Scalars("test/perplexity_by_layers")]
    assert curve == [(k, pytest.approx(math.exp(mean), rel=1e-6)) for k, mean in ((3, 4.0), (4, 3.5), (6, 3.0))]
    text = events.Tensors("recipe/text_summary")[0].tensor_proto.string_val[0].decode()
    assert all(f"{key}: {value}" in text for key, value in flatten(recipe).items())
    settings, columns = row_of_table(events)
    assert settings == settings_of(recipe)
    assert settings["router.options"] == "hidden=3, prior=none"
    assert events.Scalars("hparams/fit_seconds")[0].value == 1.5
    (tmp_path / "full").mkdir()
    write_run_results(tmp_path / "full", recipe, ONLY, **REST)
    assert set(row_of_table(EventAccumulator(str(tmp_path / "full")).Reload())[1]) == set(columns)
    assert settings_of(recipe).keys() == settings_of(small(tmp_path, "router=uniform")).keys()


def test_a_task_of_one_item_and_one_without_right_answers(capsys):
    entry = {"budget": 0.5, "layers": 3, "executed": {"min": 3, "mean": 3.0, "max": 3}, "items": 1, "stderr": None}
    right = {"task": "piqa", "metric": "acc", "value": 1.0, "correct": [1], **entry}
    text = {"task": "text", "metric": "word_perplexity", "value": 12.3456, "correct": None, **entry}
    show_tasks([right, text], "buddy", 0)
    out = capsys.readouterr().out
    assert line(out, "piqa")[-1] == "100.0"
    assert line(out, "text")[-1] == "12.35"
    assert "average" not in out
