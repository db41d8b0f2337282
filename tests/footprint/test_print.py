"""`buddy memory`: what it prints for large models built from configurations, and what it refuses."""

import json
import re

import pytest
from transformers import AutoConfig, LlamaConfig

from buddy.backbone.load import load_backbone
from buddy.errors import BackboneError
from buddy.footprint import empty_backbone
from tests.asking import call, refused
from tests.documents import ROOT

pytestmark = pytest.mark.slow

COMMON = {"vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 8192}
SIZES = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders with nothing but a config.json, of an 8-billion and a 70-billion model."""
    folder = tmp_path_factory.mktemp("configs")
    for name, sizes in SIZES.items():
        LlamaConfig(**COMMON, **sizes).save_pretrained(folder / name)
    return folder


def computed(tmp_path, *words: object) -> dict:
    result = call("memory", *words, "--json", tmp_path / "memory.json")
    assert result.exit_code == 0, result.output
    return json.loads((tmp_path / "memory.json").read_text())


def test_a_model_of_8_billion(models, tmp_path):
    found = computed(tmp_path, "--backbone", models / "8b", "--budgets", "1.0,16layers")
    assert (found["parameters"], found["layers"]) == (8_030_261_248, 32)
    assert found["training"]["weights"] == found["serving"]["weights"] == 2 * 8_030_261_248
    assert found["serving"]["executed"] == {"1.0": 32, "16layers": 16}
    per_token = 2 * 32 * 8 * 128 * 2  # K and V of 8 heads of 128 in 32 layers, 2 bytes each
    assert found["serving"]["cache"]["1.0"]["fill"] == found["serving"]["cache"]["16layers"]["fill"] == 1000 * per_token
    assert found["serving"]["cache"]["16layers"]["hole"] == 500 * per_token + 1000 * 16 * 9
    assert found["training"]["total"] == sum(found["training"][k] for k in ("weights", "router_and_optimizer", "step"))


def test_a_model_of_70_billion_fits_eight_devices_by_fsdp_only(models, tmp_path):
    common = ["--backbone", models / "70b" / "config.json", "--devices", "8", "--batch-size", "8"]
    copied = computed(tmp_path, *common)["training"]
    shared = computed(tmp_path, *common, "--strategy", "fsdp")["training"]
    assert copied["weights"] == 2 * 70_553_706_496
    assert shared["weights"] < 25 * 2**30 < 80 * 2**30 < copied["total"]
    assert {k: shared[k] for k in ("router_and_optimizer", "step")} == {
        k: copied[k] for k in ("router_and_optimizer", "step")
    }


def test_the_documents_figures(models):
    cells = re.findall(r"[^|\n]+", (ROOT / "docs" / "scale.md").read_text("utf-8"))
    written = {cell.strip() for cell in cells}
    eight = ["--devices", "8", "--batch-size", "8"]
    for words in (["8b", "--batch-size", "1"], ["70b", *eight], ["70b", *eight, "--strategy", "fsdp"]):
        printed = call("memory", "--backbone", models / words[0], *words[1:], "--budgets", "1.0,0.75,0.5").stdout
        figures = set(re.findall(r"(?<=  )\d+\.\d+(?=  | *$)", printed, re.M))
        assert len(figures) > 6
        assert figures <= written | {"1.0", "0.75", "0.5"}


def test_a_step_grows_with_rows_and_windows(models, tmp_path):
    def step(*words: str) -> int:
        return computed(tmp_path, "--backbone", models / "8b", *words)["training"]["step"]

    usual = step()
    assert step("--batch-size", "2") < usual < step("--window", "1024")
    assert step("--batch-size", "8", "--devices", "2") == usual
    assert step("--router", "shortgpt") == 0


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ("--batch-size", ["--devices", "3"]),
        ("1.5", ["--budgets", "1.5"]),
        ("15ms", ["--budgets", "15ms"]),
        ("--window", ["--window", "9000"]),
        ("'buddy'", ["--router", "budy"]),
        ("'first'", ["--router", "first"]),
        ("0.5", ["--router", "full", "--budgets", "0.5"]),
        ("/no/such/folder", ["--json", "/no/such/folder/p.json"]),
    ],
)
def test_what_is_refused(models, named, words):
    assert named in refused("memory", "--backbone", models / "8b", *words)


# Configurations


def test_it_is_the_model_without_its_weights(tiny_llama_folder, tmp_path):
    real = load_backbone(str(tiny_llama_folder), "bfloat16").model
    AutoConfig.from_pretrained(tiny_llama_folder).save_pretrained(tmp_path)
    for name in (tiny_llama_folder, tmp_path, tmp_path / "config.json"):
        empty = empty_backbone(str(name), "bfloat16").model
        assert {name: (p.shape, p.dtype) for name, p in empty.named_parameters()} == {
            name: (p.shape, p.dtype) for name, p in real.named_parameters()
        }
        assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[1]",
        "{}",
        '{"model_type": "gpt2"}',
        '{"model_type": "llama", "num_hidden_layers": 2}',
        '{"model_type": "llama", "hidden_size": -5}',
        '{"model_type": "llama", "hidden_size": "many"}',
        '{"model_type": "qwen2", "num_hidden_layers": 4, "layer_types": ["odd"]}',
    ],
)
def test_a_configuration_that_cannot_be_used(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(BackboneError, match=str(tmp_path)):
        empty_backbone(str(tmp_path), "float32")
    with pytest.raises(BackboneError, match=r"no\.json"):
        empty_backbone(str(tmp_path / "no.json"), "float32")


def test_code_of_a_repository_is_not_run(tiny_llama_folder, tmp_path):
    values = json.loads((tiny_llama_folder / "config.json").read_text())
    values["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert empty_backbone(str(tmp_path), "float32").model.config.num_hidden_layers == 6
    assert not (tmp_path / "ran").exists()
