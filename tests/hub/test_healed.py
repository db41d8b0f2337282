"""A healed run with a budget predictor: all of it is exported and shared."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import buddy
from buddy.build import load_model
from buddy.fit import fit
from buddy.hub.export import export_run
from buddy.hub.push_pull import pull, push
from buddy.run import read_run

IDS = torch.randint(3, 259, (2, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def healed(small, tmp_path_factory):
    """A run with an adapter and a budget predictor; read it, never write into it."""
    output = tmp_path_factory.mktemp("healed")
    adapter = ("adapter.rank=2", "adapter.steps=2", "adapter.lr=0.05")
    predictor = ("predictor.name=regress", "predictor.windows=8")
    fit(small(output, "rivals=[]", "trainer.max_steps=2", *adapter, *predictor), "small")
    return output / "small" / "buddy" / "seed-0"


def test_the_adapter_is_in_the_checkpoint(healed, small, tmp_path):
    export_run(healed, budget="0.5", out=tmp_path / "out")
    kept = json.loads((tmp_path / "out" / "buddy_export.json").read_text())["kept"]
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    routed = load_model(read_run(healed))
    runs = torch.zeros(*IDS.shape, 6, dtype=torch.bool)
    runs[..., kept] = True
    with torch.no_grad(), routed.changed(sink_tokens=0):
        ours = routed(IDS, runs=runs).logits
        with routed.adapter.off():
            without = routed(IDS, runs=runs).logits
        theirs = stock(IDS).logits
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(theirs, without, atol=1e-2)
    assert "its adapter is merged into these weights" in (tmp_path / "out" / "README.md").read_text()
    assert not [name for name in stock.state_dict() if "lora" in name]


def test_adapter_and_predictor_come_back(healed, tmp_path):
    push(healed, to=str(tmp_path / "pushed"))
    pull(str(tmp_path / "pushed"), out=tmp_path / "pulled")
    for name in ("adapter/adapter_model.safetensors", "adapter/adapter_config.json", "predictor.safetensors"):
        assert (tmp_path / "pulled" / name).read_bytes() == (healed / name).read_bytes()
    card = (tmp_path / "pulled" / "README.md").read_text()
    assert "An adapter in `adapter/`" in card
    assert "A budget predictor chooses" in card
    texts = [
        buddy.load(folder).generate("budget", "auto", max_new_tokens=6) for folder in (healed, tmp_path / "pulled")
    ]
    assert texts[0] == texts[1]
    model = buddy.load(tmp_path / "pulled")
    model.generate("budget", "auto", max_new_tokens=3)
    assert model.ran.startswith("The budget auto chose ")
