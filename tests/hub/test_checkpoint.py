"""Checkpoints of every family: what stock transformers makes of them is what the plan computes."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from buddy.backbone.load import ATTENTION, load_backbone
from buddy.engine.model import RoutedLM, geometry_of
from buddy.errors import RunError
from buddy.hub.export import is_mixed, largest_difference, write_checkpoint
from tests.engine.reference import Fickle, reference_logits
from tests.tiny import FAMILIES, tiny_backbone, tiny_model

IDS = torch.randint(3, 259, (2, 20), generator=torch.Generator().manual_seed(0))
KEPT = [0, 2, 3, 5]


def plan(kept: list[int]) -> torch.Tensor:
    runs = torch.zeros(*IDS.shape, 6, dtype=torch.bool)
    runs[..., kept] = True
    return runs


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_transformers_loads_what_the_engine_computes(family, tmp_path):
    backbone = tiny_backbone(family)
    routed = RoutedLM(backbone, Fickle(geometry_of(backbone)), sink_tokens=1)
    write_checkpoint(tmp_path, backbone, KEPT)
    attention = ATTENTION.get(backbone.model.config.model_type, "sdpa")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation=attention)
    assert len(stock.model.layers) == stock.config.num_hidden_layers == 4
    expected = reference_logits(tiny_model(family), IDS, plan(KEPT))
    with torch.no_grad():
        torch.testing.assert_close(stock(IDS).logits, expected, atol=1e-4, rtol=1e-4)
        with routed.changed(sink_tokens=0):
            ours = routed(IDS, runs=plan(KEPT)).logits
    torch.testing.assert_close(ours, stock(IDS).logits, atol=1e-4, rtol=1e-4)
    assert largest_difference(tmp_path, routed, KEPT, IDS) <= 1e-4


def test_it_generates_as_the_plan_does(tmp_path):
    backbone = tiny_backbone("smollm3")
    write_checkpoint(tmp_path, backbone, KEPT)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    written = stock.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=6, do_sample=False)
    ids, model = IDS, tiny_model("smollm3")
    for _ in range(written.shape[1] - IDS.shape[1]):
        runs = plan(KEPT)[:, :1].expand(-1, ids.shape[1], -1)
        ids = torch.cat([ids, reference_logits(model, ids, runs)[:, -1:].argmax(-1)], 1)
    assert torch.equal(written, ids)


def test_the_folder_is_in_the_hubs_layout_and_the_whole_model_stays(tmp_path):
    backbone = tiny_backbone()
    before = backbone.model(IDS).logits
    write_checkpoint(tmp_path, backbone, KEPT)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not {name for name in names if name.endswith((".bin", ".pt", ".pkl", ".py"))}
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("a plan").input_ids == backbone.tokenizer("a plan").input_ids
    assert torch.equal(backbone.model(IDS).logits, before)
    assert backbone.model.config.num_hidden_layers == 6


def test_weights_keep_their_type_and_the_proof_is_in_float32(tmp_path, tiny_llama_folder):
    backbone = load_backbone(str(tiny_llama_folder), "bfloat16")
    routed = RoutedLM(backbone, Fickle(geometry_of(backbone)))
    write_checkpoint(tmp_path, backbone, KEPT)
    assert AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").dtype == torch.bfloat16
    assert largest_difference(tmp_path, routed, KEPT, IDS) <= 1e-4


def test_another_models_layers_are_found_out(tmp_path):
    backbone = tiny_backbone()
    routed = RoutedLM(backbone, Fickle(geometry_of(backbone)))
    write_checkpoint(tmp_path, backbone, [0, 1, 2, 5])
    with pytest.raises(RunError, match=r"logits are .* from the engine's, which is more than rounding"):
        largest_difference(tmp_path, routed, KEPT, IDS)


@pytest.mark.parametrize(
    ("family", "kept", "several"),
    [
        ("llama", KEPT, False),
        ("qwen3", KEPT, False),
        ("smollm3", KEPT, True),
        ("gemma2", KEPT, True),
        ("smollm3", [0, 1, 2, 5], False),
        ("gemma2", [0, 2, 4], False),
        ("mistral-sliding", KEPT, False),
    ],
)
def test_layers_of_several_kinds_are_known(family, kept, several):
    assert is_mixed(tiny_model(family).config, kept) is several
