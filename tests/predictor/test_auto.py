"""`--budget auto` where it is asked for: in the engine, in generate, in evaluate, through the command."""

import json
import math

import numpy as np
import pytest
import torch

from buddy.builders.model import load_model
from buddy.data.windows import Windows
from buddy.errors import BudgetError
from buddy.evaluation.evaluate import evaluate, evaluate_run, show_scores
from buddy.metrics.perplexity import Executed, Scores
from buddy.run import read_run
from tests.asking import call, refused
from tests.engine.reference import routed_tiny

pytestmark = pytest.mark.slow

PROMPT = "budget depth layer router"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Latencies are measured in earnest, on few tokens; `tests/test_latency.py` looks at how."""
    monkeypatch.setattr("buddy.latency.ROUNDS", 1)
    monkeypatch.setattr("buddy.latency.STEPS", 2)


@pytest.fixture
def routed():
    """A model whose predictor takes 5 layers where the newest token's hidden state begins positive, else 3."""
    routed = routed_tiny()
    routed.chooser = lambda most: lambda context: torch.where(context.hidden[:, 0] > 0, min(5, most), 3)
    return routed


def tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 259, (rows, length), generator=torch.Generator().manual_seed(seed))


# The engine


def test_padding_on_the_left_changes_no_choice(routed):
    ids = tokens(1, 9)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], 1)
    mask = (torch.arange(13) >= 4).long()[None]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    alone, within = routed.context(ids), routed.context(padded, mask, position_ids=positions)
    for name in ("pooled", "newest", "hidden"):
        torch.testing.assert_close(getattr(within, name), getattr(alone, name), atol=1e-5, rtol=1e-5)


def test_generation_holds_what_was_chosen_for_each_row(routed):
    ids = tokens(6, 10)
    wanted = routed.choosing("auto")(routed.context(ids)).tolist()
    assert set(wanted) == {3, 5}
    with routed.at("auto") as record:
        routed.backbone.model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert record.executed[0][:, -1].tolist() == wanted
    for executed, sinks in zip(record.executed, record.sinks, strict=True):
        for row, count in enumerate(wanted):
            assert set(executed[row][~sinks[row]].tolist()) == {count}


def test_a_kept_cache_is_refused(routed):
    ids = tokens(1, 8)
    with routed.at(0.5), torch.no_grad():
        cache = routed.backbone.model(ids[:, :6], use_cache=True).cache
    with routed.at("auto"), pytest.raises(BudgetError, match="auto"):
        routed.backbone.model(ids[:, 6:], cache=cache, use_cache=True)


@pytest.mark.parametrize(
    ("budgets", "named"),
    [(("auto", 0.5), "auto"), (("auto:7layers",), "7layers"), (("auto:2",), "2"), (("auto:much",), "much")],
)
def test_what_the_engine_refuses(routed, budgets, named):
    with pytest.raises(BudgetError, match=named), routed.at(*budgets):
        pass


def test_without_a_predictor_or_tokens_auto_is_refused(routed):
    embedded = routed.backbone.base.embed_tokens(tokens(1, 5))
    with pytest.raises(BudgetError, match="embeddings"), routed.at("auto"), torch.no_grad():
        routed.backbone.model(inputs_embeds=embedded)
    routed.chooser = None
    with pytest.raises(BudgetError, match="predictor"), routed.at("auto"):
        pass


# Evaluation


def test_evaluation_of_auto_is_that_of_the_budgets_it_chose(routed):
    windows = Windows(tokens(6, 24), torch.arange(6))
    auto, three, five = evaluate(routed, windows, ["auto", 0.5, "5layers"], prompt=8, batch_size=4)
    chosen = routed.choosing("auto")(routed.context(windows.input_ids[:, :8])).tolist()
    assert set(chosen) == {3, 5}
    for row, count in enumerate(chosen):
        fixed = three if count == 3 else five
        assert auto.loss[row] == pytest.approx(fixed.loss[row], rel=1e-4)
    assert auto.chosen == {3: chosen.count(3), 5: chosen.count(5)}
    mean = pytest.approx(sum(chosen) / 6)
    assert auto.executed == (3, mean, 5, mean)
    assert three.chosen is None


def test_evaluate_reports_what_was_chosen(predicting, tmp_path):
    evaluate_run(predicting["regress"], budgets=["1.0", "0.5", "auto", "auto:0.75"], json_file=tmp_path / "curve.json")
    entries = json.loads((tmp_path / "curve.json").read_text())["results"]
    assert [entry["budget"] for entry in entries] == [1.0, 0.5, "auto", "auto:0.75"]
    assert sum(entries[2]["chosen"].values()) == 6
    assert max(map(int, entries[3]["chosen"])) <= 4
    assert entries[3]["executed"]["max"] <= 4


def test_a_mixture_is_of_the_layers_that_really_ran(capsys):
    def scored(budget, layers, ran, perplexity, chosen=None) -> Scores:
        tokens = np.full(5, 10.0)
        loss = tokens * math.log(perplexity)
        return Scores(budget, layers, Executed(4, ran, 30, ran), 1, loss, loss, tokens, chosen)

    fixed = [scored(1.0, 30, 30.0, 20.0), scored(0.75, 22, 25.0, 28.00), scored(0.5, 15, 18.0, 60.0)]
    auto = scored("auto", 25, 25.0, 28.00, {22: 5})
    show_scores([*fixed, auto], "title", {each.budget: str(each.budget) for each in (*fixed, auto)})
    assert "perplexity 28.00." in capsys.readouterr().out


# The command


def test_generate_writes_what_the_chosen_budget_writes(predicting):
    words = ["generate", "--run", predicting["regress"], "--max-new-tokens", 3]
    auto = call(*words, "--budget", "auto", PROMPT)
    assert auto.exit_code == 0
    routed = load_model(read_run(predicting["regress"]))
    ids = routed.backbone.tokenizer(PROMPT, return_tensors="pt").input_ids
    count = int(routed.choosing("auto")(routed.context(ids)))
    assert f"{count} of 6 layers" in auto.stderr
    assert auto.stdout == call(*words, "--budget", f"{count}layers", PROMPT).stdout
    capped, fixed = (call(*words, "--budget", budget, PROMPT) for budget in ("auto:3layers", "3layers"))
    assert capped.stdout == fixed.stdout


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["generate", "--budget", "auto", "text"], "predictor"),
        (["generate", "--budget", "auto:0.0001ms", "text"], "predictor"),  # nothing is timed
        (["generate", "--budget", "0.0001ms", "text"], "layers"),
        (["generate", "--budget", "15parsecs", "text"], "15parsecs"),
        (["generate", "--budget=-3ms", "text"], "-3ms"),
        (["evaluate", "--budgets", "0.5,auto"], "predictor"),
        (["bench", "--budgets", "auto"], "auto"),
        (["inspect", "--budgets", "auto"], "auto"),
    ],
)
def test_what_the_command_refuses(finished, words, named):
    before = sorted(path.name for path in (finished / "buddy").iterdir())
    assert named in refused(words[0], "--run", finished / "buddy", *words[1:])
    assert sorted(path.name for path in (finished / "buddy").iterdir()) == before
