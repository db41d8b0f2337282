"""On a GPU, where there is one: what the CPU computes, training, the recipe `gpu` in bfloat16, several GPUs by NCCL.

`test_second_device.py` starts those that need no CUDA on a device that stands in for one.
"""

import json
from collections import Counter

import pytest
import torch

from buddy.compare import fit
from buddy.config import load_recipe
from buddy.engine.decode import Decoder, Row, Sampler
from buddy.engine.model import RoutedLM, geometry_of
from buddy.run import read_run
from tests import second_device
from tests.engine.reference import Fickle, random_bridges
from tests.small import start_buddy
from tests.tiny import FAMILIES, tiny_backbone

pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else second_device.NAME if second_device.registered else None
COUNT = torch.cuda.device_count() if torch.cuda.is_available() else 0
SMALL = ("data.window=48", "data.prompt=12", "data.batch_size=4", "data.calibration_windows=4", "trainer.max_steps=4")
TINY = (*SMALL, "data.validation_windows=2", "data.test_windows=6", "trainer.log_every_n_steps=1")


def words(small, output) -> list[str]:
    """The recipe `gpu`, on a tiny model and text."""
    return [f"backbone.name={small.model}", f"data.source={small.text}", f"output={output}", *TINY]


accelerator = pytest.mark.skipif(DEVICE is None, reason="needs a GPU that torch can use, and there is none here")
one_gpu = pytest.mark.skipif(COUNT < 1, reason="needs a CUDA device that torch can use, and there is none here")
IDS = torch.randint(3, 259, (3, 40), generator=torch.Generator().manual_seed(0))
EXECUTED = torch.tensor([3, 4, 6])


def both(family: str, layers: int = 6, **settings) -> tuple[RoutedLM, RoutedLM]:
    """The same routed model with bridges on the CPU and on the device."""
    models = []
    for device in ("cpu", DEVICE):
        backbone = tiny_backbone(family, num_hidden_layers=layers)
        backbone.model.to(device)
        model = RoutedLM(backbone, Fickle(geometry_of(backbone)), **settings)
        model.bridge(random_bridges(model.geometry, 0))
        models.append(model)
    return models[0], models[1]


@accelerator
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padded", [False, True])
def test_windows_are_those_of_the_cpu(family, padded):
    mask = torch.ones_like(IDS)
    mask[1, : 7 * padded] = 0
    here, there = both(family)
    expected = here(IDS, attention_mask=mask, executed=EXECUTED)
    got = there(IDS.to(DEVICE), attention_mask=mask.to(DEVICE), executed=EXECUTED.to(DEVICE))
    assert torch.equal(got.runs.cpu(), expected.runs)
    assert torch.equal(got.executed.cpu(), expected.executed)
    torch.testing.assert_close(got.logits.cpu()[mask.bool()], expected.logits[mask.bool()], atol=1e-3, rtol=1e-3)


@accelerator
@pytest.mark.parametrize("policy", ["fill", "zero", "hole"])
@pytest.mark.parametrize("batch_plan", ["row", "shared"])
def test_texts_are_those_of_the_cpu(policy, batch_plan):
    texts = []
    for model in both("llama", policy=policy, batch_plan=batch_plan):
        decoder = Decoder(model, chunk=16)
        rows = [Row(IDS[i, : 9 + i].tolist(), 3 + i, Sampler(model.backbone.model, 9 + i), 12) for i in range(3)]
        for row in rows:
            decoder.add(row)
        while len(decoder):
            assert not any(written.error for written in decoder.step())
        texts.append([row.tokens for row in rows])
    assert texts[0] == texts[1]


counting = pytest.mark.skipif(DEVICE != second_device.NAME, reason="only the stand-in for a GPU counts")


@counting
@pytest.mark.parametrize("policy", ["fill", "zero", "hole"])
@pytest.mark.parametrize("lengths", [[9], [9, 10, 11]])
def test_a_step_waits_once_for_scores_and_copies_the_tokens(policy, lengths):
    _, model = both("llama", policy=policy)
    decoder = Decoder(model)
    for number, length in enumerate(lengths):
        decoder.add(Row(IDS[number, :length].tolist(), 4, Sampler(model.backbone.model, 9), 99))
    for _ in range(4):
        decoder.step()
    second_device.waits.clear()
    decoder.step()
    assert second_device.waits == {"tolist": 1, "copy": 1}


@counting
@pytest.mark.parametrize("policy", ["fill", "zero"])
def test_a_batch_of_windows_waits_equally_often_for_any_number_of_layers(policy):
    counts = []
    for layers in (6, 12):
        _, model = both("llama", layers, policy=policy)
        windows = IDS.repeat(1, 2).to(DEVICE)  # long enough that layers run selected tokens
        with model.at(executed=[4, 5, 3]):
            second_device.waits.clear()
            model.backbone.model(windows)
        counts.append(Counter(second_device.waits))
    assert counts[0] == counts[1]


@accelerator
@pytest.mark.parametrize("estimator", ["perturbed", "straight-through", "surrogate"])
def test_a_training_goes_on_where_it_stopped(small, tmp_path, estimator):
    options = ["trainer.accelerator=auto", f"objective.estimator={estimator}", "bridge={rank: 4, windows: 4}"]
    fit(small(tmp_path / "first", *options, "trainer.max_steps=3"), "small")
    last = f"ckpt_path={tmp_path / 'first' / 'small' / 'buddy' / 'seed-0' / 'checkpoints' / 'last.ckpt'}"
    fit(small(tmp_path / "second", *options, "trainer.max_steps=5", last), "small")
    run = read_run(tmp_path / "second" / "small" / "buddy")
    checkpoint = torch.load(run.folder / "checkpoints" / "last.ckpt", map_location="cpu", weights_only=False)
    assert checkpoint["global_step"] == 5


@accelerator
def test_an_adapter_and_bridges_are_trained(small, tmp_path):
    options = ("trainer.accelerator=auto", "adapter.steps=2", "bridge={rank: 4, windows: 4, steps: 2}")
    fit(small(tmp_path, *options), "small")
    results = json.loads((read_run(tmp_path / "small" / "buddy").folder / "metrics.json").read_text())["results"]
    assert [each["executed"]["min"] for each in results] == [each["layers"] for each in results]


@one_gpu
def test_the_recipe_for_a_gpu_runs_on_it_in_bfloat16(small, tmp_path):
    torch.cuda.reset_peak_memory_stats()
    fit(load_recipe("gpu", words(small, tmp_path)), "gpu")
    assert torch.cuda.max_memory_allocated() > 0
    run = read_run(tmp_path / "gpu" / "buddy")
    assert (run.recipe.backbone.dtype, run.recipe.trainer["accelerator"]) == ("bfloat16", "gpu")
    results = json.loads((run.folder / "metrics.json").read_text())["results"]
    assert [each["executed"]["min"] for each in results] == [each["layers"] for each in results]
    assert abs(results[0]["kl"]) < 1e-3  # full depth is the dense model


@pytest.mark.skipif(COUNT < 2, reason=f"needs two GPUs that torch can use, and there are {COUNT} here")
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_gpus_share_a_fit(small, tmp_path, strategy):
    shared = ("trainer.devices=2", f"trainer.strategy={strategy}", "rivals=[shortgpt]")
    process = start_buddy("fit", "--recipe", "gpu", *words(small, tmp_path), *shared, folder=tmp_path)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert out.count("Perplexity on text") == 1
