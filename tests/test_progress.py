"""Bars on a terminal and lines where there is none."""

import io
import re

from rich.console import Console
from rich.text import Text

from buddy import console
from buddy.console import Bar, track


def console_line(line) -> str:
    return line.plain if isinstance(line, Text) else ""


def test_without_a_terminal_there_is_one_line_at_the_end(capsys):
    assert list(track(range(3), "Counting [/x]")) == [0, 1, 2]
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "Counting [/x]: 3 of 3, 0:00:00 elapsed\n"


def test_a_long_loop_tells_how_far_it_is_and_what_is_left(capsys, monkeypatch):
    monkeypatch.setattr(console, "PLAIN_EVERY", 0.0)
    with Bar("Training", total=10, done=4) as bar:
        for done in (5, 6, 7):
            bar.update(done, "objective 0.5")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Training: 5 of 10, 0:00:00 elapsed, objective 0.5"
    assert re.fullmatch(r"Training: 7 of 10, 0:00:00 elapsed, 0:00:0\d left, objective 0\.5", lines[2])
    assert lines[3] == lines[2]


def test_the_end_is_told_once(capsys, monkeypatch):
    monkeypatch.setattr(console, "PLAIN_EVERY", 0.0)
    assert list(track(range(2), "Counting")) == [0, 1]
    assert [line.split(",")[0] for line in capsys.readouterr().err.splitlines()] == [
        "Counting: 1 of 2",
        "Counting: 2 of 2",
    ]


def test_on_a_terminal_it_is_one_line(monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr(console, "errors", Console(file=terminal, force_terminal=True, width=80, color_system=None))
    with Bar("Training buddy", total=200) as bar:
        bar.update(50, "objective 1.234")
    last = terminal.getvalue().replace("\x1b[2K", "").split("\r")[-1].splitlines()
    shown = [line for line in last if "Training buddy" in line]
    assert shown[-1].rstrip().endswith("objective 1.234")
    assert "50/200" in shown[-1]
    assert "left" in shown[-1]
    assert len(shown[-1].rstrip()) <= 80


def test_what_is_stopped_is_still_told(capsys):
    bar = Bar("Training", total=10).__enter__()
    bar.update(3)
    bar.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert capsys.readouterr().err.startswith("Training: 3 of 10, 0:00:00 elapsed")
