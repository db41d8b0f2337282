"""Measured values in memory and on disk: damage, other processes, folders that cannot be written, settings."""

import multiprocessing
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from buddy import measurements
from buddy.calibration.probe import measurement_setting
from buddy.io import cache_folder
from buddy.measurements import Measurements
from tests.calibration.small import WINDOWS, routed

SETTING = {"windows": "abc", "threads": 1}
VALUES = {f"ce {i} 10{i:04b}1": torch.arange(4, dtype=torch.float64) + i / 3 for i in range(16)}


def written(folder: Path, **values: torch.Tensor) -> Measurements:
    measured = Measurements(folder, SETTING)
    for key, value in (values or VALUES).items():
        measured[key] = value
    measured.save()
    return measured


def read(folder: Path, keys=VALUES, **setting) -> dict[str, torch.Tensor]:
    """Those values that a new process finds."""
    measured = Measurements(folder, SETTING | setting)
    missing = measured.missing([*keys, "unknown"])
    assert missing[-1] == "unknown"
    return {key: measured[key] for key in keys if key not in missing}


def equal(stored: dict, expected: dict) -> bool:
    return stored.keys() == expected.keys() and all(
        stored[key].dtype == value.dtype and stored[key].numpy().tobytes() == value.numpy().tobytes()
        for key, value in expected.items()
    )


def test_values_come_back_bit_for_bit(tmp_path):
    odd = {"nan": torch.tensor([0.1, float("inf"), float("nan"), -0.0]), "none": torch.empty(0), "one": torch.tensor(2)}
    written(tmp_path, **VALUES, **odd)
    assert equal(read(tmp_path, VALUES | odd), VALUES | odd)


def test_without_a_folder_values_are_in_memory_only():
    measured = Measurements()
    measured["a"] = value = torch.ones(2)
    measured.save()
    assert measured.missing(["b", "a"]) == ["b"]
    assert measured["a"] is value


def test_another_setting_is_another_file(tmp_path):
    path = written(tmp_path).path
    assert read(tmp_path, threads=2) == {}
    assert Measurements(tmp_path, dict(reversed(SETTING.items()))).path == path


def test_values_are_written_every_two_seconds(tmp_path, monkeypatch):
    now = 0.0
    # Not the clock itself: a server that another test keeps running in this process would sleep for hours.
    monkeypatch.setattr(measurements, "time", SimpleNamespace(monotonic=lambda: now))
    measured = Measurements(tmp_path, SETTING)
    measured["a"] = torch.ones(1)
    now = 1.9
    measured["b"] = torch.ones(1)
    assert read(tmp_path, ["a", "b"]) == {}
    now = 2.0
    measured["c"] = torch.ones(1)
    assert read(tmp_path, ["a", "b", "c"]).keys() == {"a", "b", "c"}


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_damage_is_never_read(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("store")
    path = written(folder).path
    whole = path.read_bytes()
    cut = data.draw(st.booleans(), "cut")
    if cut:
        path.write_bytes(whole[: data.draw(st.integers(1, len(whole) - 1))])
    else:
        at = data.draw(st.integers(0, len(whole) - 1))
        noise = data.draw(st.binary(min_size=1, max_size=64))
        path.write_bytes((whole[:at] + noise + whole[at + len(noise) :])[: len(whole)])
    stored = read(folder)
    assert cut or len(stored) >= len(VALUES) - 2  # the other lines are read
    assert all(torch.equal(stored[key], VALUES[key]) for key in stored)  # right or absent, never wrong
    written(folder)
    assert equal(read(folder), VALUES)


def test_damage_while_it_is_in_use(tmp_path):
    measured = written(tmp_path)
    measured.path.write_bytes(b"garbage " * 1000)
    measured["late"] = torch.ones(1)
    measured.save()
    assert read(tmp_path, ["late"]).keys() == {"late"}


def test_what_another_process_writes_meanwhile_is_found(tmp_path):
    one = Measurements(tmp_path, SETTING)
    assert one.missing(["a", "b"]) == ["a", "b"]
    path = written(tmp_path, a=torch.ones(1), b=torch.ones(2)).path
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])  # its second line is not complete
    assert one.missing(["a", "b"]) == ["b"]
    path.write_bytes(whole)
    assert one.missing(["a", "b"]) == []


def test_a_folder_that_cannot_be_written_is_reported_once(tmp_path, capfd):
    (tmp_path / "file").write_text("")
    measured = written(tmp_path / "file" / "folder")
    measured["late"] = torch.ones(1)
    measured.save()
    assert measured.missing([*VALUES, "late"]) == []
    said = capfd.readouterr().err
    assert "BUDDY_CALIBRATION_CACHE" in said
    assert said.count("\n") == 1


def _write_and_read(folder: Path, number: int) -> None:
    for i in range(15):
        written(folder, **{f"{number} {i}": torch.full((4,), float(i)), "all": torch.zeros(2)})
        assert read(folder, ["all"])


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_many_processes_use_one_file(tmp_path):
    fork = multiprocessing.get_context("fork")  # quick
    writers = [fork.Process(target=_write_and_read, args=(tmp_path, number)) for number in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0] * 3
    keys = {f"{number} {i}" for number in range(3) for i in range(15)}
    assert read(tmp_path, keys).keys() == keys


def test_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("BUDDY_CALIBRATION_CACHE")
    monkeypatch.setenv("BUDDY_CACHE", str(tmp_path))
    assert cache_folder("calibration") == tmp_path / "calibration"
    monkeypatch.setenv("BUDDY_CALIBRATION_CACHE", str(tmp_path / "else"))
    assert cache_folder("calibration") == tmp_path / "else"
    monkeypatch.setenv("BUDDY_CALIBRATION_CACHE", "")
    assert cache_folder("calibration") is None


# The setting


def test_what_changes_the_values_changes_the_setting(monkeypatch):
    before = measurement_setting(routed(), WINDOWS, 2)

    def differing(model=None, windows=WINDOWS, batch_size=2) -> set[str]:
        after = measurement_setting(model or routed(), windows, batch_size)
        return {name for name in before if after[name] != before[name]}

    assert differing(windows=WINDOWS.clone()) == set()
    assert differing(routed(seed=1)) == {"backbone", "weights"}
    assert differing(routed(sinks=2)) == {"sink_tokens"}
    assert differing(routed(context_layer=2)) == {"context_layer"}
    assert differing(windows=WINDOWS.flip(0)) == {"windows"}
    assert differing(windows=WINDOWS.view(10, 10)) == {"shape"}
    assert differing(batch_size=3) == {"batch_size"}
    tuned, rounded = routed(), routed()
    tuned.backbone.layers[3].mlp.down_proj.weight.data.mul_(1.001)  # no sign changes: the fingerprint stays
    assert differing(tuned) == {"weights"}
    rounded.backbone.model.bfloat16()
    assert differing(rounded) == {"dtype", "weights"}
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    assert differing() == {"threads"}


@pytest.mark.filterwarnings("ignore:.*peft_config:UserWarning", "ignore:.*is_gradient_checkpointing:FutureWarning")
def test_another_adapter_of_the_users_own_is_another_setting():
    model, config = routed(), LoraConfig(r=4, target_modules=["down_proj"], init_lora_weights=False)
    adapted = get_peft_model(model.backbone.model, config, "first")
    adapted.add_adapter("second", config)
    settings = [measurement_setting(model, WINDOWS, 2)]
    adapted.set_adapter("second")
    settings.append(measurement_setting(model, WINDOWS, 2))
    with adapted.disable_adapter():
        settings.append(measurement_setting(model, WINDOWS, 2))
    assert settings[0] != settings[1] != settings[2] != settings[0]


def test_another_configuration_is_another_setting():
    one, two = routed(), routed()
    two.backbone.model.config.rope_parameters["rope_theta"] = 5e5
    assert measurement_setting(one, WINDOWS, 2) != measurement_setting(two, WINDOWS, 2)
