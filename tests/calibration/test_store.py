"""Measured values on disk: damage, other processes, places that cannot be written."""

import multiprocessing
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from buddy.backbone.embedded import cache_root
from buddy.calibration.store import Store, cache_folder

SETTING = {"windows": "abc", "threads": 1}
VALUES = {f"ce {i} 10{i:04b}1": torch.arange(4, dtype=torch.float64) + i / 3 for i in range(16)}


def written(folder: Path, **values: torch.Tensor) -> Store:
    store = Store(folder, SETTING)
    assert store.write(values or VALUES)
    return store


def equal(found: dict, expected: dict) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[key], value) and found[key].dtype == value.dtype for key, value in expected.items()
    )


def test_values_come_back_as_they_were(tmp_path):
    written(tmp_path)
    assert equal(Store(tmp_path, SETTING).read([*VALUES, "unknown"]), VALUES)


@pytest.mark.parametrize(
    "value",
    [torch.tensor([0.1, float("inf"), -0.0], dtype=torch.float64), torch.rand(3, 3), torch.empty(0), torch.tensor(2)],
)
def test_any_tensor_comes_back_bit_for_bit(tmp_path, value):
    written(tmp_path, x=value)
    found = Store(tmp_path, SETTING).read(["x"])["x"]
    assert found.dtype == value.dtype
    assert found.numpy().tobytes() == value.numpy().tobytes()


def test_another_setting_is_another_file(tmp_path):
    written(tmp_path)
    assert Store(tmp_path, SETTING | {"threads": 2}).read(VALUES) == {}
    assert Store(tmp_path, dict(reversed(SETTING.items()))).read(VALUES)


def test_the_file_says_what_it_was_measured_under(tmp_path):
    with closing(sqlite3.connect(written(tmp_path).path)) as file:
        assert dict(file.execute("SELECT name, value FROM setting")) == {"windows": "abc", "threads": "1"}


def test_reading_makes_no_file(tmp_path):
    assert Store(tmp_path / "none", SETTING).read(VALUES) == {}
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_is_set_aside_and_never_read(tmp_path_factory, capfd, data):
    folder = tmp_path_factory.mktemp("store")
    path = written(folder).path
    whole = path.read_bytes()
    if data.draw(st.booleans(), "cut"):
        path.write_bytes(whole[: data.draw(st.integers(1, len(whole) - 1))])
    else:
        at = data.draw(st.integers(0, len(whole) - 1))
        noise = data.draw(st.binary(min_size=1, max_size=64))
        path.write_bytes((whole[:at] + noise + whole[at + len(noise) :])[: len(whole)])
    store = Store(folder, SETTING)
    found = store.read(VALUES)
    assert all(torch.equal(found[key], VALUES[key]) for key in found)  # right or absent, never wrong
    assert store.write(VALUES)
    assert equal(Store(folder, SETTING).read(VALUES), VALUES)
    said = capfd.readouterr().err
    aside = list(folder.glob("*.damaged"))
    assert len(aside) == said.count("is damaged; it is kept as") == said.count("\n")


def spoil(path: Path) -> None:
    path.write_bytes(b"garbage " * 1000)


def test_garbage_is_said_once_and_begun_anew(tmp_path, capfd):
    spoil(written(tmp_path).path)
    store = Store(tmp_path, SETTING)
    assert store.read(VALUES) == {}
    assert store.write(VALUES)
    assert equal(store.read(VALUES), VALUES)
    said = capfd.readouterr().err
    assert said.startswith(f"The file of measured values {store.path} is damaged; it is kept as {store.path.stem}.dama")
    assert said.count("\n") == 1


def test_damage_while_it_is_in_use(tmp_path, capfd):
    store = written(tmp_path)
    spoil(store.path)
    assert store.read(VALUES) == {}
    spoil(store.path)
    assert store.write(VALUES)
    assert equal(store.read(VALUES), VALUES)
    assert "is damaged" in capfd.readouterr().err


def test_a_file_of_something_else_is_set_aside(tmp_path, capfd):
    path = Store(tmp_path, SETTING).path
    with closing(sqlite3.connect(path)) as file:
        file.execute("CREATE TABLE measured (something TEXT)")
    assert Store(tmp_path, SETTING).read(VALUES) == {}
    assert "is damaged" in capfd.readouterr().err


def test_a_place_that_cannot_be_written_is_said_once(tmp_path, capfd):
    (tmp_path / "file").write_text("")
    store = Store(tmp_path / "file" / "folder", SETTING)
    assert store.write(VALUES)
    assert store.write(VALUES)
    assert store.read(VALUES) == {}
    said = capfd.readouterr().err
    assert "cannot be kept in" in said
    assert "set BUDDY_CALIBRATION_CACHE to a folder that can be written.\n" in said
    assert said.count("\n") == 1


def test_a_busy_file_is_tried_again(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("buddy.calibration.store.PATIENCE", 0.05)
    store = written(tmp_path)
    with closing(sqlite3.connect(store.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        assert not store.write({"late": torch.ones(2)})
        other.execute("COMMIT")
    assert store.write({"late": torch.ones(2)})
    assert torch.equal(store.read(["late"])["late"], torch.ones(2))
    assert capfd.readouterr().err == ""


def _write_and_read(folder: Path, number: int) -> None:
    store = Store(folder, SETTING)
    for i in range(15):
        while not store.write({f"{number} {i}": torch.full((4,), float(i)), "all": torch.zeros(2)}):
            pass
        assert store.read(["all"])


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_many_processes_use_one_file(tmp_path):
    fork = multiprocessing.get_context("fork")  # quick, and a store has no connection that a fork could share
    writers = [fork.Process(target=_write_and_read, args=(tmp_path, number)) for number in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0] * 3
    keys = [f"{number} {i}" for number in range(3) for i in range(15)]
    assert Store(tmp_path, SETTING).read(keys).keys() == set(keys)


def test_where_values_are_kept(monkeypatch, tmp_path):
    monkeypatch.delenv("BUDDY_CALIBRATION_CACHE")
    monkeypatch.setenv("BUDDY_CACHE", str(tmp_path))
    assert cache_folder() == cache_root() / "calibration" == tmp_path / "calibration"
    monkeypatch.setenv("BUDDY_CALIBRATION_CACHE", str(tmp_path / "else"))
    assert cache_folder() == tmp_path / "else"
    monkeypatch.setenv("BUDDY_CALIBRATION_CACHE", "")
    assert cache_folder() is None
