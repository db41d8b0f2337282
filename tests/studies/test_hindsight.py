"""The search in hindsight: what it starts from, that it only gets better, and what it refuses."""

import json

import pytest
import torch
import typer
from typer.testing import CliRunner

from buddy.builders.model import load_model
from buddy.errors import BudgetError, RunError
from buddy.evaluation.evaluate import evaluate, windows_for
from buddy.run import read_run
from studies.hindsight import hindsight, main, search

APP = typer.Typer()
APP.command()(main)


def searched(folder, rounds: int) -> tuple[torch.Tensor, float]:
    """Means KL of two validation windows at 4 layers by round; and what evaluation says of the router."""
    run = read_run(folder)
    routed, prompt = load_model(run), run.recipe.data.prompt
    windows = windows_for(run, routed, None, "validation")
    (scores,) = evaluate(routed, windows, ["4layers"], prompt=prompt)
    how = {"prompt": prompt, "tries": 4, "generator": torch.Generator().manual_seed(0)}
    return search(routed, windows.input_ids, 4, rounds=rounds, **how), scores.mean_kl


@pytest.mark.parametrize("name", ["buddy", "shortgpt"])
def test_it_starts_from_the_router_and_only_gets_better(finished, name):
    found, evaluated = searched(finished / name, rounds=6)
    assert found.shape == (7, 2)
    assert found[0].mean().item() == pytest.approx(evaluated, rel=1e-4)
    assert (found[1:] <= found[:-1]).all()
    assert (found[-1] < found[0]).any(), "24 random plans of 15 find a better one"


def test_the_same_seed_finds_the_same(finished):
    assert torch.equal(searched(finished / "buddy", 2)[0], searched(finished / "buddy", 2)[0])


def test_the_command(finished, tmp_path):
    words = ["--run", str(finished / "buddy"), "--windows", "1", "--rounds", "2", "--json", str(tmp_path / "h.json")]
    outcome = CliRunner().invoke(APP, words)
    assert outcome.exit_code == 0
    report = json.loads((tmp_path / "h.json").read_text())
    assert report["plans"] == 16
    assert [row["layers"] for row in report["results"]] == [4, 3]
    assert all(row["best"] <= row["half"] <= row["router"] for row in report["results"])


def test_what_cannot_be_searched(finished, tmp_path):
    with pytest.raises(BudgetError, match="no budget below full depth"):
        hindsight(finished / "full")
    with pytest.raises(RunError, match="nowhere"):
        hindsight(tmp_path / "nowhere")
    outcome = CliRunner().invoke(APP, ["--run", str(tmp_path / "nowhere")])
    assert outcome.exit_code == 2
