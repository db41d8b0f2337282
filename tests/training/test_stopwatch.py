"""Seconds add up over the beginnings of a run."""

import json
import time

import pytest

from buddy.training import stopwatch
from buddy.training.stopwatch import Stopwatch


def test_what_was_spent_before_is_added(tmp_path):
    path = tmp_path / "seconds.json"
    first = Stopwatch(path)
    time.sleep(0.02)
    first.save()
    saved = json.loads(path.read_text())["seconds"]
    second = Stopwatch(path)
    assert saved >= 0.02
    assert saved <= second.seconds < saved + 5


@pytest.mark.parametrize("content", ["", "{", "{}", '{"seconds": "x"}', '{"seconds": null}'])
def test_a_damaged_file_counts_for_nothing(tmp_path, content):
    path = tmp_path / "seconds.json"
    path.write_text(content)
    assert 0 <= Stopwatch(path).seconds < 5


def test_it_is_saved_now_and_then(tmp_path, monkeypatch):
    watch = Stopwatch(tmp_path / "seconds.json")
    watch.tick()
    assert not (tmp_path / "seconds.json").exists()
    monkeypatch.setattr(stopwatch, "EVERY", 0.0)
    watch.tick()
    assert (tmp_path / "seconds.json").exists()
