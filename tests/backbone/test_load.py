"""Loading, freezing, describing and refusing backbones."""

import json
import logging
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils import logging as chatter

from buddy.backbone.load import check_routable, fingerprint, load_backbone, title_of
from buddy.errors import BackboneError
from buddy.testing.subject import VOCABULARY
from tests.tiny import FAMILIES, tiny_backbone, tiny_folder, tiny_model, tiny_tokenizer


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
    assert backbone.model.config._attn_implementation == ("eager" if family == "gemma2" else "sdpa")


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


def test_longrope_holds_up_to_the_positions_of_its_first_training():
    backbone = tiny_backbone("phi3")
    longer = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64}
    backbone.model.config.rope_parameters = longer
    assert backbone.context_length == 64 < backbone.model.config.max_position_embeddings


def test_sizes_and_freezing(tiny_llama_folder):
    backbone = load_backbone(str(tiny_llama_folder), "float32")
    sizes = backbone.num_layers, backbone.hidden_size, backbone.kv_size, backbone.context_length
    assert sizes == (6, 64, 32, 512)
    assert backbone.layers is backbone.model.model.layers
    assert backbone.device == torch.device("cpu")
    assert not backbone.model.training
    assert not any(parameter.requires_grad for parameter in backbone.model.parameters())
    assert backbone.name == title_of(backbone.name) == str(tiny_llama_folder)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes_keep_one_fingerprint(tiny_llama_folder, dtype):
    backbone = load_backbone(str(tiny_llama_folder), dtype)
    assert backbone.dtype == getattr(torch, dtype)
    assert backbone.fingerprint == tiny_backbone("llama").fingerprint


@pytest.mark.parametrize(
    ("capabilities", "dtype"),
    [
        ({"avx512_f": True, "avx512_bf16": False}, torch.float32),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True, "avx512_bf16": False}, torch.bfloat16),
        ({"neon": True, "bf16": True}, torch.bfloat16),
    ],
)
def test_auto_is_bfloat16_where_the_processor_computes_in_it(tiny_llama_folder, monkeypatch, capabilities, dtype):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert load_backbone(str(tiny_llama_folder)).dtype == dtype


def test_fingerprint_tells_weights_and_sizes_apart():
    tuned = tiny_model("llama")  # a light fine-tuning
    weight = tuned.model.layers[3].mlp.down_proj.weight
    weight.add_(0.05 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    others = [tiny_model("llama", 1), tiny_model("llama", num_hidden_layers=5), tiny_model("mistral"), tuned]
    prints = [fingerprint(model) for model in (tiny_model("llama"), *others)]
    assert len(set(prints)) == 5
    assert all(len(digits) == 16 and int(digits, 16) >= 0 for digits in prints)


def test_weights_in_several_files(tmp_path):
    folder = tmp_path / "sharded"
    tiny_model("llama").save_pretrained(folder, max_shard_size="200KB")
    tiny_tokenizer().save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert load_backbone(str(folder), "float32").fingerprint == tiny_backbone("llama").fingerprint
    max(folder.glob("model-*.safetensors")).unlink()
    with pytest.raises(BackboneError, match="model-0000"):
        load_backbone(str(folder), "float32")
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(BackboneError, match="sharded"):
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


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "BertForMaskedLM"),
        ({"model_type": "qwen3_next", "architectures": ["Qwen3NextForCausalLM"]}, "Qwen3NextForCausalLM"),
        ({"model_type": "jamba"}, "jamba"),
        ({}, "None"),
        ({"model_type": ["llama"]}, "llama"),
        ({"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClass"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "causal"),
        ({"model_type": "qwen2", "is_causal": False}, "causal"),
        ({"model_type": "llama", "num_hidden_layers": 2}, "2 layers"),
    ],
)
def test_what_cannot_be_routed_is_refused_by_name(config, named):
    with pytest.raises(BackboneError, match=named):
        check_routable("some/model", config)


def test_refusal_comes_before_the_weights_are_read(folder):
    (folder / "model.safetensors").write_bytes(b"not read")
    edit_config(folder, model_type="mamba", architectures=["MambaForCausalLM"])
    with pytest.raises(BackboneError, match="MambaForCausalLM"):
        load_backbone(str(folder), "float32")


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("no-such-org/no-such-model", "HF_HUB_OFFLINE"),
        ("gpt9000", "'smollm2-135m'"),
        ("smollm2-135", "did you mean 'smollm2-135m'"),
        ("./nowhere", "./nowhere"),
        ("", "empty"),
        ("~nobody-here/model", "~nobody-here"),
        ("a" * 300, "aaa"),
    ],
)
def test_what_cannot_be_found(name, named):
    with pytest.raises(BackboneError, match=named):
        load_backbone(name)


def test_a_dtype_or_revision_that_is_not_there(tiny_llama_folder):
    with pytest.raises(BackboneError, match="float32"):
        load_backbone(str(tiny_llama_folder), "float23")
    with pytest.raises(BackboneError, match="v2"):
        load_backbone(str(tiny_llama_folder), revision="v2")
    with pytest.raises(BackboneError, match=r"config\.json"):
        load_backbone(str(tiny_llama_folder / "config.json"))


def cut_short(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def drop_head(file):
    weights = load_file(file)
    del weights["lm_head.weight"]
    save_file(weights, file, metadata={"format": "pt"})


def changed(**values):
    return lambda file: edit_config(file.parent, **values)


@pytest.mark.parametrize(
    ("file", "damage", "named"),
    [
        ("config.json", lambda file: file.unlink(), r"config\.json"),
        ("config.json", lambda file: file.write_text("{"), "JSON"),
        ("config.json", lambda file: file.write_text("[1]"), r"config\.json"),
        ("config.json", changed(intermediate_size=96), r"model\.layers\.0\.mlp\.down_proj\.weight"),
        ("config.json", changed(hidden_size="many"), "hidden_size"),
        ("config.json", changed(num_attention_heads=7), "attention heads"),
        ("config.json", changed(num_key_value_heads=0), "cannot be loaded"),
        ("config.json", changed(hidden_act="zork"), "zork"),
        ("model.safetensors", lambda file: file.rename(file.with_name("pytorch_model.bin")), "safetensors"),
        ("model.safetensors", cut_short, "cannot be loaded"),
        ("model.safetensors", drop_head, r"lm_head\.weight"),
        ("tokenizer.json", lambda file: file.write_text("{"), "tokenizer"),
        ("tokenizer.json", lambda file: file.unlink(), "tokenizer"),
    ],
)
def test_damaged_folders_and_impossible_configurations(folder, file, damage, named):
    damage(folder / file)
    with pytest.raises(BackboneError, match=named) as caught:
        load_backbone(str(folder), "float32")
    assert "\n" not in str(caught.value)


@pytest.mark.real
def test_the_embedded_model_speaks(smollm2):
    sizes = smollm2.num_layers, smollm2.hidden_size, smollm2.kv_size, smollm2.context_length
    assert sizes == (30, 576, 192, 8192)
    inputs = smollm2.tokenizer("The capital of France is", return_tensors="pt")
    ids = smollm2.model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert smollm2.tokenizer.decode(ids[0]).startswith("The capital of France is Paris")


@pytest.mark.real
def test_the_embedded_model_is_one_in_float32_and_bfloat16(smollm2):
    fast = load_backbone("smollm2-135m-instruct", "bfloat16")
    assert (fast.name, title_of(fast.name)) == ("smollm2-135m", "SmolLM2-135M-Instruct (Q4_1, dequantised)")
    assert fast.fingerprint == smollm2.fingerprint
    assert all(
        torch.equal(a.float(), b) for a, b in zip(fast.model.parameters(), smollm2.model.parameters(), strict=True)
    )
