"""`buddy memory`: what it prints for large models built from configurations, and what it refuses."""

import json
import re

import pytest
from transformers import LlamaConfig
from typer.testing import CliRunner

from buddy.cli import app
from tests.documents import ROOT

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


def call(*words: object):
    return CliRunner().invoke(app, ["memory", *(str(word) for word in words)])


def planned(tmp_path, *words: object) -> dict:
    result = call(*words, "--json", tmp_path / "plan.json")
    assert result.exit_code == 0, result.output
    return json.loads((tmp_path / "plan.json").read_text())


def test_a_model_of_8_billion(models, tmp_path):
    found = planned(tmp_path, "--backbone", models / "8b", "--budgets", "1.0,16layers")
    assert (found["parameters"], found["layers"]) == (8_030_261_248, 32)
    assert found["training"]["weights"] == found["serving"]["weights"] == 2 * 8_030_261_248
    assert found["serving"]["executed"] == {"1.0": 32, "16layers": 16}
    per_token = 2 * 32 * 8 * 128 * 2  # K and V of 8 heads of 128 in 32 layers, 2 bytes each
    assert found["serving"]["cache"]["1.0"]["fill"] == found["serving"]["cache"]["16layers"]["fill"] == 1000 * per_token
    assert found["serving"]["cache"]["16layers"]["hole"] == 500 * per_token + 1000 * 16 * 9
    assert found["training"]["total"] == sum(found["training"][k] for k in ("weights", "router_and_optimizer", "step"))


def test_a_model_of_70_billion_fits_eight_devices_by_fsdp_only(models, tmp_path):
    common = ["--backbone", models / "70b" / "config.json", "--devices", "8", "--batch-size", "8"]
    copied = planned(tmp_path, *common)["training"]
    shared = planned(tmp_path, *common, "--strategy", "fsdp")["training"]
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
        printed = call("--backbone", models / words[0], *words[1:], "--budgets", "1.0,0.75,0.5").stdout
        rows = [line.strip("│ \n").split("│") for line in printed.splitlines() if line.startswith("│")]
        figures = {
            cell.strip() for row in rows for cell in row if re.fullmatch(r"[\d.]+", cell.strip()) and "." in cell
        }
        assert len(figures) > 6
        assert figures <= written | {"1.0", "0.75", "0.5"}


def test_a_step_grows_with_rows_and_windows(models, tmp_path):
    def step(*words: str) -> int:
        return planned(tmp_path, "--backbone", models / "8b", *words)["training"]["step"]

    assert step("--batch-size", "2") < step() < step("--window", "1024")
    assert step("--batch-size", "8", "--devices", "2") == step()
    assert step("--router", "shortgpt") == 0


def test_what_it_prints(models):
    result = call("--backbone", models / "8b", "--devices", "2", "--dtype", "float32")
    assert "8.03 billion parameters, float32" in result.stdout
    assert "each device (2 devices, auto, 4 windows of 256 tokens a step)" in result.stdout
    for words in ("weights, frozen", "router and optimizer", "a step, at most", "together", "29.92", "0.75", "hole"):
        assert words in result.stdout
    assert "are estimates" in result.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--devices", "3"], "A batch of 4 windows cannot be shared by 3 devices; set --batch-size to a multiple of 3"),
        (["--budgets", "1.5"], "not above 0 and at most 1"),
        (["--budgets", "15ms"], "ask for a fraction such as 0.75"),
        (["--budgets", ","], "--budgets is empty"),
        (["--window", "9000"], "reads at most 8192 tokens"),
        (["--router", "budy"], "did you mean 'buddy'"),
        (["--router", "first"], "trained by gradients through the layers"),
        (["--router", "full", "--budgets", "0.5"], "This router runs every layer"),
        (["--json", "/no/such/folder/p.json"], "There is no folder /no/such/folder"),
    ],
)
def test_what_is_refused(models, words, message):
    result = call("--backbone", models / "8b", *words)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr


@pytest.mark.parametrize("words", [["--devices", "0"], ["--window", "3"], ["--strategy", "ddp"], ["--dtype", "int8"]])
def test_usage_errors(models, words):
    assert call("--backbone", models / "8b", *words).exit_code == 2
