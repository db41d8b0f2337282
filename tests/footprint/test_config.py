"""Shapes from configurations: every size of the real model, and no data."""

import json

import pytest
import torch
from transformers import AutoConfig

from buddy.backbone.load import load_backbone
from buddy.errors import BackboneError
from buddy.footprint import hollow_model


def test_it_is_the_model_without_its_weights(tiny_llama_folder):
    hollow = hollow_model(str(tiny_llama_folder), "bfloat16")
    real = load_backbone(str(tiny_llama_folder), "bfloat16").model
    assert {name: (p.shape, p.dtype) for name, p in hollow.named_parameters()} == {
        name: (p.shape, p.dtype) for name, p in real.named_parameters()
    }
    assert {parameter.device.type for parameter in hollow.parameters()} == {"meta"}


def test_a_config_alone_is_enough(tiny_llama_folder, tmp_path):
    AutoConfig.from_pretrained(tiny_llama_folder).save_pretrained(tmp_path)
    names = [str(tmp_path), str(tmp_path / "config.json")]
    shapes = [[p.shape for p in hollow_model(name, "float32").parameters()] for name in names]
    assert shapes[0] == shapes[1] == [p.shape for p in hollow_model(str(tiny_llama_folder), "float32").parameters()]
    assert hollow_model(names[0], "float16").dtype == torch.float16


def write(path, text: str) -> str:
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "The configuration of .* cannot be used .*; mend it, or name another"),
        ("[1]", "it is not a mapping"),
        ('{"model_type": "gpt2"}', "is of the kind gpt2, which Buddy cannot route"),
        ("{}", "which Buddy cannot route"),
        ('{"model_type": "llama", "num_hidden_layers": 2}', "has 2 layers; choose a model of at least 3"),
        ('{"model_type": "llama", "hidden_size": -5}', "The configuration of .* cannot be used"),
        ('{"model_type": "llama", "hidden_size": "many"}', "The configuration of .* cannot be used"),
        ('{"model_type": "qwen2", "num_hidden_layers": 4, "layer_types": ["odd"]}', "cannot be used"),
    ],
)
def test_what_cannot_be_used(text, message, tmp_path):
    with pytest.raises(BackboneError, match=message):
        hollow_model(write(tmp_path / "config.json", text), "float32")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "There is no configuration at ''"),
        ("/no/such", "There is no configuration at '/no/such'; give a folder with config.json"),
        ("./no.json", "There is no configuration at './no.json'"),
        ("smollm2-135n", "No model is named 'smollm2-135n'; did you mean 'smollm2-135m'"),
        ("nowhere", "No model is named 'nowhere'; give a folder with config.json, such a file, owner/name on the hub"),
        ("owner/never-seen", r"No model 'owner/never-seen' was found \("),
    ],
)
def test_what_is_not_there(name, message):
    with pytest.raises(BackboneError, match=message):
        hollow_model(name, "float32")


def test_a_folder_without_a_config(tmp_path):
    with pytest.raises(BackboneError, match=r"has no config\.json; name a folder with config\.json, such a file"):
        hollow_model(str(tmp_path), "float32")


def test_nothing_of_a_repositorys_code_is_run(tiny_llama_folder, tmp_path):
    values = json.loads((tiny_llama_folder / "config.json").read_text())
    values["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    write(tmp_path / "config.json", json.dumps(values))
    assert hollow_model(str(tmp_path), "float32").config.num_hidden_layers == 6
    assert not (tmp_path / "ran").exists()
