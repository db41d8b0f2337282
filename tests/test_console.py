"""Bars on a terminal, lines where there is none, and tables."""

import io
import re

from rich.console import Console

from buddy import console
from buddy.console import NONE, Bar, print_table, quality_cells, track

LINE = re.compile(
    r"(?P<what>.+): (?P<done>\d+) of (?P<total>\d+), 0:00:0\d elapsed(?P<left>, 0:00:0\d left)?(, (?P<note>.+))?"
)


def lines(capsys) -> list[dict[str, str | None]]:
    out, err = capsys.readouterr()
    assert out == ""
    return [LINE.fullmatch(line).groupdict() for line in err.splitlines()]


def test_without_a_terminal_there_is_one_line_at_the_end(capsys):
    assert list(track(range(3), "Counting [/x]")) == [0, 1, 2]
    assert lines(capsys) == [{"what": "Counting [/x]", "done": "3", "total": "3", "left": None, "note": None}]


def test_a_long_loop_shows_steps_time_left_and_a_note(capsys, monkeypatch):
    monkeypatch.setattr(console, "PLAIN_EVERY", 0.0)
    with Bar("Training", total=10, done=4) as bar:
        for done in (5, 6, 7):
            bar.update(done, "objective 0.5")
    found = lines(capsys)
    assert [(line["done"], line["note"]) for line in found] == [(n, "objective 0.5") for n in "5677"]
    assert found[-1]["left"]


def test_on_a_terminal_it_is_one_line(monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr(console, "stderr", Console(file=terminal, force_terminal=True, width=80, color_system=None))
    with Bar("Training buddy", total=200) as bar:
        bar.update(50, "objective 1.234")
    last = terminal.getvalue().replace("\x1b[2K", "").split("\r")[-1].splitlines()
    (shown,) = {line.rstrip() for line in last if "Training buddy" in line}
    assert "50/200" in shown
    assert shown.endswith("objective 1.234")
    assert len(shown) <= 80


def test_a_bar_that_is_interrupted_prints_how_far_it_came(capsys):
    bar = Bar("Training", total=10).__enter__()
    bar.update(3)
    bar.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert lines(capsys)[0]["done"] == "3"


def test_a_table_into_a_pipe_has_one_line_a_row(capsys):
    print_table(("name", "what"), [("a[b]", "x" * 300), ("long name", "y")])
    head, first, second = capsys.readouterr().out.splitlines()
    assert first.split() == ["a[b]", "x" * 300]
    assert head.index("what") == first.index("x") == second.index("y")


def test_one_document_has_no_interval():
    assert quality_cells(29.6, (29.118, 30.4), -1e-9) == ["29.60", "29.12 – 30.40", "0.0000"]
    assert quality_cells(29.118, (29.118, 29.118), 0.25) == ["29.12", NONE, "0.2500"]
