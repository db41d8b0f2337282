"""Runs in processes of their own: failures, deaths and interrupts."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from buddy.executors import LOADING, side_by_side
from tests.comparison.fakes import FakeStart


def outcomes(folder: Path, runs: list[str], jobs: int, **options) -> dict[str, str | None]:
    found = {}
    heard = options.pop("heard", [])
    start = FakeStart(folder, **options)
    side_by_side(start, runs, jobs, lambda run, reason: found.update({run: reason}), lambda *line: heard.append(line))
    return found


def test_all_runs_are_done_by_few_processes(tmp_path):
    assert outcomes(tmp_path, ["a", "b fails", "c", "d"], 2) == {
        "a": None,
        "b fails": "it failed",
        "c": None,
        "d": None,
    }
    processes = {(tmp_path / name).read_text() for name in "abcd"}
    assert 1 <= len(processes) <= 2
    assert str(os.getpid()) not in processes


def test_what_runs_say_is_passed_on(tmp_path, capfd):
    heard = []
    assert outcomes(tmp_path, ["a tells", "b tells"], 2, heard=heard) == {"a tells": None, "b tells": None}
    for run in ("a tells", "b tells"):
        begun, bar, *words = [line for line in heard if line[0] == run]
        assert begun == (run, LOADING, True)
        assert bar[1].startswith("Counting: 1 of 2, ")
        assert bar[1].endswith(", one")
        assert bar[2]
        assert words == [(run, "A word", False), (run, "and another", False)]
    assert capfd.readouterr() == ("", "")


def test_loading_is_told_where_a_process_begins_for_a_run_and_nowhere_else(tmp_path):
    heard = []
    outcomes(tmp_path, ["a", "b dies", "c", "d"], 1, heard=heard)
    assert [run for run, words, _ in heard if words == LOADING] == ["a", "c"]


def test_another_process_takes_the_place_of_a_dead_one(tmp_path):
    found = outcomes(tmp_path, ["a dies", "b", "c dies", "d"], 1)
    assert found["b"] is found["d"] is None
    for run in ("a dies", "c dies"):
        assert found[run].startswith("Its process ended by itself (exit code 9)")


def test_where_no_process_can_begin_each_run_says_so(tmp_path):
    found = outcomes(tmp_path, ["a", "b"], 2, broken=True)
    assert [reason.partition(":")[0] for reason in found.values()] == ["Its process could not begin (MemoryError"] * 2


def begin(folder: Path) -> tuple[subprocess.Popen, list[int]]:
    """Two runs that sleep, begun by a process of its own; and the processes they are in."""
    words = [sys.executable, "-m", "tests.comparison.fakes", str(folder), "2", "a sleeps", "b sleeps", "c"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(words, cwd=Path(__file__).parents[2], **pipes)
    patience = time.monotonic() + 60
    while not all((folder / name).exists() and (folder / name).read_text() for name in "ab"):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < patience
        time.sleep(0.02)
    return process, [int((folder / name).read_text()) for name in "ab"]


def assert_gone(processes: list[int]) -> None:
    patience = time.monotonic() + 20
    for process in processes:
        while Path(f"/proc/{process}").exists():
            assert time.monotonic() < patience
            time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_reaches_all_and_nothing_new_is_begun(tmp_path, number):
    process, helpers = begin(tmp_path)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "")
    assert out.splitlines() == [f"{run} sleeps {LOADING} True" for run in "ab"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "a.stopped", "b", "b.stopped"]
    assert_gone(helpers)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks for processes there")
def test_helpers_end_with_a_parent_that_is_killed(tmp_path):
    process, helpers = begin(tmp_path)
    process.kill()
    process.communicate(timeout=30)
    assert_gone(helpers)
