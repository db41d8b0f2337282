"""Executors: results, failures, dead workers, interrupts, orphans."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from joblib.externals.loky import ProcessPoolExecutor

from buddy.errors import BuddyError, RunError
from buddy.executors import ATTEMPTS, require_ray, run_in_processes, run_on_ray
from tests.small import Forked, wait_until
from tests.workers import Step, Work, run

ROOT = Path(__file__).parents[1]
NAMES = ["a", "bb", "ccc", "dddd"]


def outcomes(folder: Path, *units: str, run_all=run_in_processes, **options) -> dict[str, object]:
    folder.mkdir(exist_ok=True)
    found = {}
    steps = [Step(folder, words) for words in units]
    run_all(Work(folder), steps, lambda unit, outcome: found.update({unit.name: outcome}), **options)
    return found


@pytest.fixture
def serial(tmp_path) -> dict[str, object]:
    (tmp_path / "serial").mkdir()
    return {name: Work(tmp_path / "serial")(Step(tmp_path / "serial", name)) for name in NAMES}


@pytest.fixture
def light(tmp_path_factory, monkeypatch) -> None:
    """Workers import two lines in the place of torch, two seconds faster."""
    folder = tmp_path_factory.mktemp("light")
    (folder / "torch.py").write_text("def set_num_threads(number): pass\ndef get_num_threads(): return 1\n")
    monkeypatch.syspath_prepend(folder)


@pytest.mark.slow
def test_processes_find_what_one_finds(tmp_path, serial):
    found = outcomes(tmp_path / "loky", "a dies-once", "x dies", *NAMES[1:], "e fails", "o fails-oddly", jobs=2)
    assert isinstance(found.pop("e"), ValueError)
    odd = found.pop("o")
    assert (type(odd), str(odd)) == (BuddyError, "Unpicklable: o failed")
    gone = found.pop("x")
    assert isinstance(gone, RunError)
    assert "died" in str(gone)
    assert found == serial, "a unit whose worker dies is submitted again, and no other is hurt"
    deaths = [len((tmp_path / "loky" / f"{name}.died").read_text()) for name in ("a", "x")]
    assert deaths == [1, ATTEMPTS]
    assert (tmp_path / "loky" / "bb.log").read_text().count("call") == 1
    processes = {(tmp_path / "loky" / name).read_text() for name in NAMES}
    assert 1 <= len(processes) <= 2
    assert str(os.getpid()) not in processes
    logs = {name: (tmp_path / "loky" / f"{name}.log").read_text() for name in [*NAMES, "e"]}
    assert all("1 threads" in text for text in logs.values())
    assert any("call 2 in this process" in text for text in logs.values()), "what a process made is used again"
    assert "ValueError: e failed" in logs["e"]


@pytest.mark.usefixtures("light")
@pytest.mark.slow
def test_the_death_of_a_process_without_work_hurts_no_unit(tmp_path, serial):
    found = outcomes(tmp_path / "loky", "a", "bb kills-a", jobs=2)
    assert found == {name: serial[name] for name in ("a", "bb")}


@pytest.mark.usefixtures("light")
@pytest.mark.slow
def test_a_process_that_dies_between_two_units_hurts_none(tmp_path, serial):
    folder, found = tmp_path / "loky", {}
    folder.mkdir()

    def slow(unit, outcome) -> None:
        found[unit.name] = outcome
        time.sleep(1)

    run_in_processes(Work(folder), [Step(folder, words) for words in ("a dies-later", "bb")], slow, jobs=1)
    assert found == {name: serial[name] for name in ("a", "bb")}


@pytest.mark.usefixtures("light")
@pytest.mark.slow
def test_one_worker_keeps_its_model_and_has_the_plug_ins_and_paths_of_its_caller(tmp_path, monkeypatch):
    (tmp_path / "plugged.py").write_text("NAME = 'mine'")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert outcomes(Path("place"), "a imports", "bb grows", "ccc", jobs=1)["a"] == ("mine", 0.0)
    assert len({(tmp_path / "place" / name).read_text() for name in ("a", "bb", "ccc")}) == 1
    assert (tmp_path / "place" / "a.log").exists()


def begin(folder: Path) -> tuple[Forked, list[int]]:
    """Two units that sleep, begun by a process of its own; and the processes they are in."""
    process = Forked(run, folder, "a sleeps", "b sleeps", "c")
    wait_until(lambda: all((folder / x).exists() and (folder / x).read_text() for x in "ab"), process=process)
    return process, [int((folder / name).read_text()) for name in "ab"]


def assert_gone(processes: list[int]) -> None:
    wait_until(lambda: not any(Path(f"/proc/{process}").exists() for process in processes))


needs_proc = pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks for processes there")


@pytest.mark.usefixtures("light")
@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.soak)])
def test_an_interrupt_reaches_all_and_nothing_new_begins(tmp_path, number):
    process, workers = begin(tmp_path)
    process.send_signal(number)
    out, err = process.communicate(timeout=50)  # the units themselves would sleep a minute
    assert (process.returncode, out, err) == (130, "", "")
    assert {path.name for path in tmp_path.glob("*.stopped")} == {"a.stopped", "b.stopped"}
    assert not (tmp_path / "c").exists()
    assert_gone(workers)


@needs_proc
@pytest.mark.slow
def test_an_interrupt_while_workers_start_waits_for_nothing(tmp_path):
    words = [sys.executable, "-m", "tests.workers", str(tmp_path), "a sleeps", "b sleeps"]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while len(children.read_text().split()) < 2:  # one of them tracks loky's resources
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    try:
        process.communicate(timeout=40)  # PATIENCE is 60 seconds
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 130
    assert not list(tmp_path.glob("*.stopped"))


@pytest.mark.usefixtures("light")
@pytest.mark.slow
@pytest.mark.parametrize(("number", "background"), [(signal.SIGINT, False), (signal.SIGTERM, True)])
def test_an_interrupt_within_a_submission_begins_no_unit(tmp_path, monkeypatch, number, background):
    """A job in the background, where a shell has SIGINT ignored, hears a termination."""
    submit, before = ProcessPoolExecutor.submit, signal.getsignal(signal.SIGINT)

    def interrupted(self, *args):
        future = submit(self, *args)
        signal.raise_signal(number)
        return future

    monkeypatch.setattr(ProcessPoolExecutor, "submit", interrupted)
    signal.signal(signal.SIGINT, signal.SIG_IGN if background else before)
    try:
        with pytest.raises(KeyboardInterrupt):
            outcomes(tmp_path, "a", "bb", jobs=1)
    finally:
        signal.signal(signal.SIGINT, before)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("light")
@needs_proc
@pytest.mark.slow
def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    process, workers = begin(tmp_path)
    process.kill()
    process.communicate(timeout=30)
    assert_gone(workers)


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="Ray is installed")
def test_without_ray_nothing_is_begun():
    with pytest.raises(BuddyError, match="extra `ray`"):
        require_ray()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Ray leaves its daemons unwaited for
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray")
def test_a_ray_cluster_finds_what_one_process_finds(tmp_path, serial):
    units = ("a dies-once", "x dies", "bb", "ccc", "dddd", "e fails")
    found = outcomes(tmp_path / "ray", *units, run_all=run_on_ray)
    assert isinstance(found.pop("e"), ValueError)
    gone = found.pop("x")
    assert isinstance(gone, RunError)
    assert "died" in str(gone)
    assert found == serial
    deaths = [len((tmp_path / "ray" / f"{name}.died").read_text()) for name in ("a", "x")]
    assert deaths == [1, ATTEMPTS]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Ray leaves its daemons unwaited for
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray")
def test_a_cluster_that_is_not_there(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(BuddyError, match="Ray"):
        require_ray()
