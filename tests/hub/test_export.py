"""`buddy export`: stock transformers computes with the checkpoint what the engine computes with the plan."""

import json
import shutil
from collections import Counter

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import buddy
from buddy.backbone.load import FAMILIES as ROUTABLE
from buddy.backbone.load import load_backbone
from buddy.builders.data import build_data
from buddy.builders.model import load_model
from buddy.compare import fit
from buddy.data.windows import Windows
from buddy.engine.model import RoutedLM, geometry_of
from buddy.errors import BudgetError, DataError, RunError
from buddy.evaluation.evaluate import evaluate
from buddy.hub.export import OnePlan, export_run, is_mixed, largest_difference, write_checkpoint
from buddy.hub.push_pull import pull, push
from buddy.inspection.routing import most_frequent
from buddy.run import read_run
from tests.asking import ask, refused
from tests.engine.reference import Fickle, FickleGates, reference_logits
from tests.small import rewrite, write_text
from tests.tiny import FAMILIES, tiny_backbone, tiny_folder, tiny_model

pytestmark = pytest.mark.slow

IDS = torch.randint(3, 259, (3, 20), generator=torch.Generator().manual_seed(0))
WINDOWS = Windows(IDS, torch.arange(len(IDS)))
KEPT = (0, 2, 3, 5)


def plan(kept, ids=IDS) -> torch.Tensor:
    runs = torch.zeros(*ids.shape, 6, dtype=torch.bool)
    runs[..., list(kept)] = True
    return runs


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


# The checkpoint


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_transformers_computes_the_plan(family, tmp_path):
    backbone = tiny_backbone(family)
    whole = backbone.model(IDS).logits
    routed = RoutedLM(backbone, Fickle(geometry_of(backbone)))
    write_checkpoint(tmp_path, backbone, KEPT)
    attention = ROUTABLE[backbone.model.config.model_type]
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation=attention)
    assert len(stock.model.layers) == stock.config.num_hidden_layers == 4
    with torch.no_grad():
        close(stock(IDS).logits, reference_logits(tiny_model(family), IDS, plan(KEPT)))
    assert largest_difference(tmp_path, routed, KEPT, IDS) <= 1e-4
    assert torch.equal(backbone.model(IDS).logits, whole)


def test_the_folder_is_in_the_hubs_layout_and_keeps_the_dtype(tmp_path, tiny_llama_folder):
    backbone = load_backbone(str(tiny_llama_folder), "bfloat16")
    routed = RoutedLM(backbone, Fickle(geometry_of(backbone)))
    write_checkpoint(tmp_path, backbone, KEPT)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not {name for name in names if name.endswith((".bin", ".pt", ".pkl", ".py"))}
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1
    assert AutoTokenizer.from_pretrained(tmp_path)("a plan").input_ids == backbone.tokenizer("a plan").input_ids
    assert AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").dtype == torch.bfloat16
    assert largest_difference(tmp_path, routed, KEPT, IDS) <= 1e-4
    with pytest.raises(RunError, match=r"0, 1, 3, 5"):
        largest_difference(tmp_path, routed, [0, 1, 3, 5], IDS)


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_a_scale_that_bfloat16_rounds_is_the_same_on_both_sides(family, tmp_path):
    """Gemma multiplies embeddings by the root of their width, which bfloat16 holds for 64 and not for 96."""
    folder = tiny_folder(tmp_path / "model", family, hidden_size=96)
    backbone = load_backbone(str(folder), "bfloat16")
    routed = RoutedLM(backbone, Fickle(geometry_of(backbone)))
    write_checkpoint(tmp_path, backbone, KEPT)
    assert largest_difference(tmp_path, routed, KEPT, IDS) <= 1e-4


@pytest.mark.parametrize(
    ("family", "kept", "several"),
    [
        ("llama", KEPT, False),
        ("smollm3", KEPT, True),
        ("gemma2", KEPT, True),
        ("gemma2", [0, 2, 4], False),
        ("mistral-sliding", KEPT, False),
    ],
)
def test_layers_of_several_kinds_are_known(family, kept, several):
    assert is_mixed(tiny_model(family).config, kept) is several


# The plan


@pytest.mark.parametrize("settings", [{"sink_tokens": 0}, {"prompt_plan": "shared", "reroute_every": None}])
@pytest.mark.parametrize("router", [Fickle, FickleGates])
def test_the_plan_is_the_one_that_counting_gives(router, settings):
    backbone = tiny_backbone()
    routed = RoutedLM(backbone, router(geometry_of(backbone)), **settings)
    for executed in (3, 4):
        runs = routed(IDS, executed=torch.full((len(IDS),), executed), prompt=9).runs[:, routed.sink_tokens :]
        plans = [tuple(plan.nonzero()[:, 0].tolist()) for plan in runs.flatten(0, 1)]
        counts, (kept, found) = Counter(plans), most_frequent(routed, WINDOWS, executed, prompt=9, batch_size=2)
        assert counts[kept] == max(counts.values())
        assert (found.tokens, found.plans) == (len(plans), len(counts))


def test_one_plan_runs_its_layers_for_every_token():
    backbone = tiny_backbone()
    routed = RoutedLM(backbone, OnePlan(geometry_of(backbone), KEPT), sink_tokens=0)
    assert torch.equal(routed(IDS, executed=torch.full((len(IDS),), 4)).runs, plan(KEPT))


# Whole runs


def exported(folder, out, **options) -> dict:
    export_run(folder, **{"budget": "0.75", "out": out, **options})
    return json.loads((out / "buddy_export.json").read_text())


def test_the_plan_of_a_run_in_the_mean_has_k_layers(finished, tmp_path):
    folder = rewrite(shutil.copytree(finished / "buddy", tmp_path / "buddy"), "mean_over: 1\n", "mean_over: 8\n")
    record, run = exported(folder, tmp_path / "out", budget="0.5"), read_run(folder)
    assert (len(record["kept"]), record["mean_over"]) == (3, 8)
    routed = load_model(run)
    data = build_data(run.recipe, routed.backbone)
    data.setup()
    (ours,) = evaluate(routed, data.validation, [0.5], prompt=run.recipe.data.prompt)
    assert record["executed_mean"] == ours.executed.mean
    routed.router = OnePlan(routed.geometry, record["kept"])
    with routed.changed(sink_tokens=0, mean_over=1):
        (theirs,) = evaluate(routed, data.validation, [0.5], prompt=run.recipe.data.prompt)
    assert record["perplexity"]["checkpoint"] == pytest.approx(theirs.perplexity, rel=1e-5)


@pytest.mark.parametrize("name", ["shortgpt", "buddy"])
def test_a_run_is_exported(finished, tmp_path, name):
    record = exported(finished / name, tmp_path / "out")
    run = read_run(finished / name)
    routed = load_model(run)
    data = build_data(run.recipe, routed.backbone)
    data.setup()
    prompt = run.recipe.data.prompt
    kept, _ = most_frequent(routed, data.calibration, 4, prompt=prompt)
    assert record["kept"] == list(kept)
    assert (record["layers"], record["router"], record["budget"]) == (6, name, "0.75")
    assert record["largest_logit_difference"] <= 1e-4
    (ours,) = evaluate(routed, data.validation, [0.75], prompt=prompt)
    assert record["perplexity"]["run"] == pytest.approx(ours.perplexity, rel=1e-5)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    routed.router = OnePlan(routed.geometry, kept)
    with torch.no_grad(), routed.changed(sink_tokens=0):
        close(routed(IDS, runs=plan(kept)).logits, stock(IDS).logits)
        (theirs,) = evaluate(routed, data.validation, [4 / 6], prompt=prompt)
    assert record["perplexity"]["checkpoint"] == pytest.approx(theirs.perplexity, rel=1e-5)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "attention sink" in card
    assert 'from_pretrained("out")' in card


def test_full_depth_is_the_backbone_itself(finished, small, tmp_path):
    exported(finished / "full", tmp_path / "out", budget="1.0")
    whole, cut = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (small.model, tmp_path / "out"))
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert "attention sink" not in (tmp_path / "out" / "README.md").read_text()


def test_another_text_can_choose_the_plan(finished, tmp_path):
    text = write_text(tmp_path / "other.jsonl", documents=8, seed=5)
    record = exported(finished / "buddy", tmp_path / "out", data=str(text), check=False)
    assert record["tokens"] > 0
    assert record["largest_logit_difference"] is None


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"budget": "1.5"}, BudgetError, "1.5"),
        ({"budget": "auto"}, BudgetError, "auto"),
        ({"data": " "}, DataError, "--data"),
        ({"data": "/no/such.txt"}, DataError, "/no/such.txt"),
        ({"data": "one.txt"}, DataError, "one window"),
    ],
)
def test_what_is_refused_leaves_nothing(finished, tmp_path, monkeypatch, options, error, named):
    (tmp_path / "one.txt").write_text("budget depth layer router token plan text model order")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=named):
        exported(finished / "buddy", tmp_path / "out", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["one.txt"]


def test_a_wrong_checkpoint_is_not_kept(finished, tmp_path, monkeypatch):
    def write_another(folder, backbone, kept):
        tiny_folder(folder, seed=3, num_hidden_layers=len(kept))

    monkeypatch.setattr("buddy.hub.export.write_checkpoint", write_another)
    with pytest.raises(RunError, match="more than rounding"):
        exported(finished / "shortgpt", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_command(finished, tmp_path):
    words = ["export", "--run", finished / "shortgpt", "--budget", "0.5", "--out", tmp_path / "out", "--no-check"]
    assert ask(*words) is None
    assert str(tmp_path / "out") in refused(*words), "the folder exists now"


def test_adapter_and_predictor_are_exported_and_shared(small, tmp_path):
    adapter = ("adapter.rank=2", "adapter.steps=2", "adapter.lr=0.05")
    predictor = ("predictor.name=regress", "predictor.windows=8")
    fit(small(tmp_path / "runs", "rivals=[]", "trainer.max_steps=2", *adapter, *predictor), "small")
    healed = read_run(tmp_path / "runs" / "small" / "buddy").folder
    kept = exported(healed, tmp_path / "out", budget="0.5")["kept"]
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    routed = load_model(read_run(healed))
    with torch.no_grad(), routed.changed(sink_tokens=0):
        close(stock(IDS).logits, routed(IDS, runs=plan(kept)).logits)
        with routed.adapter.off():
            assert not torch.allclose(stock(IDS).logits, routed(IDS, runs=plan(kept)).logits, atol=1e-2)
    assert not [name for name in stock.state_dict() if "lora" in name]

    push(healed, to=str(tmp_path / "pushed"))
    pull(str(tmp_path / "pushed"), out=tmp_path / "pulled")
    for name in ("adapter/adapter_model.safetensors", "adapter/adapter_config.json", "predictor.safetensors"):
        assert (tmp_path / "pulled" / name).read_bytes() == (healed / name).read_bytes()
    models = [buddy.load(folder) for folder in (healed, tmp_path / "pulled")]
    texts = [model.generate("budget", "auto", max_new_tokens=6) for model in models]
    assert texts[0] == texts[1]
    assert "auto" in models[0].ran
