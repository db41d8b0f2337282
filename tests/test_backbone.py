"""Loading, freezing, describing and refusing backbones."""

import json
import logging
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils import logging as chatter

from buddy.backbone.load import ROUTABLE, check_routable, fingerprint, load_backbone
from buddy.errors import BackboneError
from tests.tiny import FAMILIES, VOCABULARY, tiny_backbone, tiny_folder, tiny_model, tiny_tokenizer


@pytest.fixture
def folder(tiny_llama_folder, tmp_path):
    """A copy of the tiny Llama that a test may break."""
    return shutil.copytree(tiny_llama_folder, tmp_path / "model")


def edit_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_round_trips_through_a_folder(family, tmp_path):
    backbone = load_backbone(str(tiny_folder(tmp_path / "model", family)), "float32")
    ids = torch.arange(3, 43).view(2, 20)
    expected = tiny_model(family)(input_ids=ids).logits
    assert torch.equal(backbone.model(input_ids=ids).logits, expected)
    assert backbone.fingerprint == tiny_backbone(family).fingerprint


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_of_a_tiny_model_matters(family):
    backbone = tiny_backbone(family)
    ids = torch.arange(3, 43).view(2, 20)
    full = backbone.model(input_ids=ids, use_cache=False).logits
    for layer in backbone.layers:
        layer.forward = lambda hidden_states, *args, **kwargs: hidden_states
        skipped = backbone.model(input_ids=ids, use_cache=False).logits
        del layer.forward
        assert (skipped - full).abs().max() > 0.05


def test_sizes_and_freezing(tiny_llama_folder):
    backbone = load_backbone(str(tiny_llama_folder), "float32")
    assert (backbone.num_layers, backbone.hidden_size, backbone.kv_size, backbone.context_length) == (
        6,
        64,
        32,
        512,
    )
    assert backbone.layers is backbone.model.model.layers
    assert backbone.device == torch.device("cpu")
    assert not backbone.model.training
    assert not any(parameter.requires_grad for parameter in backbone.model.parameters())
    assert backbone.name == str(tiny_llama_folder)


def test_attention_is_exact_for_the_family(tmp_path):
    for family, expected in (("llama", "sdpa"), ("gemma2", "eager")):
        backbone = load_backbone(str(tiny_folder(tmp_path / family, family)), "float32")
        assert backbone.model.config._attn_implementation == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes_keep_one_fingerprint(tiny_llama_folder, dtype):
    backbone = load_backbone(str(tiny_llama_folder), dtype)
    assert backbone.dtype == getattr(torch, dtype)
    assert backbone.fingerprint == tiny_backbone("llama").fingerprint


def test_fingerprint_tells_weights_and_sizes_apart():
    prints = [fingerprint(tiny_model("llama", seed)) for seed in range(3)]
    prints += [fingerprint(tiny_model("llama", num_hidden_layers=5)), fingerprint(tiny_model("mistral"))]
    assert len(set(prints)) == 5
    assert all(len(digits) == 16 and int(digits, 16) >= 0 for digits in prints)


def test_fingerprint_sees_a_light_fine_tuning():
    tuned = tiny_model("llama")
    weight = tuned.model.layers[3].mlp.down_proj.weight
    weight.add_(0.05 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    assert fingerprint(tuned) != fingerprint(tiny_model("llama"))


def test_weights_in_several_files(tmp_path):
    folder = tmp_path / "sharded"
    tiny_model("llama").save_pretrained(folder, max_shard_size="200KB")
    tiny_tokenizer().save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert load_backbone(str(folder), "float32").fingerprint == tiny_backbone("llama").fingerprint
    max(folder.glob("model-*.safetensors")).unlink()
    with pytest.raises(BackboneError, match=r"cannot be loaded .*model-0000\d-of-"):
        load_backbone(str(folder), "float32")
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(BackboneError, match=r"cannot be loaded .*download the model again"):
        load_backbone(str(folder), "float32")


def test_tokenizer_survives_and_pads(folder):
    tokenizer = load_backbone(str(folder), "float32").tokenizer
    text = "Fellow citizens: 2024 – “naïve” 日本"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len(tokenizer) == VOCABULARY
    assert tokenizer.pad_token == "<pad>"
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text())
    del config["pad_token"]
    file.write_text(json.dumps(config))
    assert load_backbone(str(folder), "float32").tokenizer.pad_token == "<eos>"


def test_loading_is_silent_and_leaves_logging_as_it_was(tiny_llama_folder, capfd):
    chatter.set_verbosity(logging.INFO)
    before = chatter.get_verbosity(), chatter.is_progress_bar_enabled(), list(warnings.filters)
    try:
        load_backbone(str(tiny_llama_folder), "float32")
        assert (chatter.get_verbosity(), chatter.is_progress_bar_enabled(), list(warnings.filters)) == before
    finally:
        chatter.set_verbosity_warning()
    assert capfd.readouterr() == ("", "")


def test_routable_families_are_causal_language_models_of_transformers():
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as known

    assert {kind: known[kind] for kind in ROUTABLE} == ROUTABLE


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"model_type": "bert", "architectures": ["BertForMaskedLM"]},
            "is BertForMaskedLM, which Buddy cannot route",
        ),
        (
            {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]},
            "is T5ForConditionalGeneration, which",
        ),
        (
            {"model_type": "mamba", "architectures": ["MambaForCausalLM"]},
            "is MambaForCausalLM, which Buddy cannot",
        ),
        ({"model_type": "jamba"}, "is of the kind jamba, which Buddy cannot route; choose one of llama, qwen2"),
        (
            {"model_type": "qwen3_next", "architectures": ["Qwen3NextForCausalLM"]},
            "is Qwen3NextForCausalLM, which",
        ),
        ({}, "is of the kind None, which"),
        ({"model_type": ["llama"]}, "cannot route"),
        ({"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}, "predicts no next token"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "attends to later tokens"),
        ({"model_type": "qwen2", "is_causal": False}, "attends to later tokens"),
        ({"model_type": "llama", "num_hidden_layers": 2}, "has 2 layers; choose a model of at least 3"),
    ],
)
def test_what_cannot_be_routed_is_refused_by_name(config, message):
    with pytest.raises(BackboneError, match=message):
        check_routable("some/model", config)


def test_refusal_comes_before_the_weights_are_read(folder):
    (folder / "model.safetensors").write_bytes(b"not read")
    edit_config(folder, model_type="mamba", architectures=["MambaForCausalLM"])
    with pytest.raises(BackboneError, match="is MambaForCausalLM, which Buddy cannot route"):
        load_backbone(str(folder), "float32")


def test_three_layers_are_enough(tmp_path):
    assert load_backbone(str(tiny_folder(tmp_path / "m", num_hidden_layers=3)), "float32").num_layers == 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no-such-org/no-such-model", "HF_HUB_OFFLINE is set and the hub's cache lacks it.*'smollm2-135m'"),
        ("gpt9000", "No model is named 'gpt9000'; give a folder in the hub's layout, owner/name on the hub"),
        ("not a name", "No model is named 'not a name'; give"),
        ("smollm2-135", "No model is named 'smollm2-135'; did you mean 'smollm2-135m'"),
        ("./nowhere", "There is no folder './nowhere'; check the path"),
        ("", "name is empty"),
        ("~nobody-here/model", "There is no folder"),
        ("a" * 300, "No model is named 'aaa"),
    ],
)
def test_what_cannot_be_found(name, message):
    with pytest.raises(BackboneError, match=message):
        load_backbone(name)


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        ("float23", "'float23', which is not known; did you mean 'float32'"),
        ("int8", "choose one of float32, bfloat16"),
    ],
)
def test_unknown_dtype(dtype, message, tiny_llama_folder):
    with pytest.raises(BackboneError, match=message):
        load_backbone(str(tiny_llama_folder), dtype)


def test_a_folder_has_no_revision(tiny_llama_folder):
    with pytest.raises(BackboneError, match="is not on the hub and has no revisions; leave out revision 'v2'"):
        load_backbone(str(tiny_llama_folder), revision="v2")


def cut_short(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def drop_head(file):
    weights = load_file(file)
    del weights["lm_head.weight"]
    save_file(weights, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("config.json", lambda file: file.unlink(), "has no config.json; name a folder made by save_pretrained"),
        ("config.json", lambda file: file.write_text("{"), "not a valid JSON file.*download the model again"),
        ("config.json", lambda file: file.write_text("[1]"), "config.json holds no mapping"),
        (
            "model.safetensors",
            lambda file: file.rename(file.with_name("pytorch_model.bin")),
            "has no weights in safetensors format",
        ),
        ("model.safetensors", cut_short, "cannot be loaded .*mend that, or download"),
        ("model.safetensors", drop_head, "lack lm_head.weight in the size .*download the model again"),
        ("tokenizer.json", lambda file: file.write_text("{"), "tokenizer of .* cannot be loaded"),
        (
            "tokenizer.json",
            lambda file: file.unlink(),
            "tokenizer of .* cannot be loaded .*download the model again",
        ),
    ],
)
def test_damaged_folders(folder, file, damage, message):
    damage(folder / file)
    with pytest.raises(BackboneError, match=message) as caught:
        load_backbone(str(folder), "float32")
    assert "\n" not in str(caught.value)


def test_sizes_that_contradict_the_weights(folder):
    edit_config(folder, intermediate_size=96)
    with pytest.raises(BackboneError, match=r"lack model.layers.0.mlp.down_proj.weight in the size that config.json"):
        load_backbone(str(folder), "float32")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": "many"}, "Field 'hidden_size' expected int, got str"),
        ({"num_attention_heads": 7}, "not a multiple of the number of attention heads"),
        ({"num_key_value_heads": 0}, "cannot be loaded"),
        ({"hidden_act": "zork"}, "cannot be loaded .'zork'"),
    ],
)
def test_impossible_configurations(folder, changes, message):
    edit_config(folder, **changes)
    with pytest.raises(BackboneError, match=message):
        load_backbone(str(folder), "float32")


def test_a_file_is_not_a_folder(tiny_llama_folder):
    with pytest.raises(BackboneError, match="is a file; name the folder"):
        load_backbone(str(tiny_llama_folder / "config.json"))


@pytest.mark.real
def test_the_embedded_model_speaks(smollm2):
    assert (smollm2.num_layers, smollm2.hidden_size, smollm2.kv_size, smollm2.context_length) == (
        30,
        576,
        192,
        8192,
    )
    inputs = smollm2.tokenizer("The capital of France is", return_tensors="pt")
    ids = smollm2.model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert smollm2.tokenizer.decode(ids[0]).startswith("The capital of France is Paris")


@pytest.mark.real
def test_the_embedded_model_is_one_in_float32_and_bfloat16(smollm2):
    fast = load_backbone("smollm2-135m", "bfloat16")
    assert fast.fingerprint == smollm2.fingerprint
    assert all(
        torch.equal(a.float(), b) for a, b in zip(fast.model.parameters(), smollm2.model.parameters(), strict=True)
    )
