"""On a GPU, where there is one: the recipe `gpu` in bfloat16, and several GPUs by NCCL."""

import json

import pytest
import torch

from buddy.compare import fit
from buddy.config import load_recipe
from buddy.run import read_run
from tests.small import start_buddy

COUNT = torch.cuda.device_count() if torch.cuda.is_available() else 0
SMALL = ("data.window=48", "data.prompt=12", "data.batch_size=4", "data.calibration_windows=4", "trainer.max_steps=4")
TINY = (*SMALL, "data.validation_windows=2", "data.test_windows=6", "trainer.log_every_n_steps=1")


def words(small, output) -> list[str]:
    """The recipe `gpu`, on a tiny model and text."""
    return [f"backbone.name={small.model}", f"data.source={small.text}", f"output={output}", *TINY]


@pytest.mark.skipif(COUNT < 1, reason="needs a GPU that torch can use, and there is none here")
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
