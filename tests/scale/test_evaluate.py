"""`evaluate` by several processes gives the numbers of one, to the bit, and says them once."""

import pytest
import torch

from buddy.data.windows import Windows
from buddy.evaluation.evaluate import evaluate
from tests.asking import call
from tests.scale.forked import side_by_side
from tests.training.test_estimator import IDS, tiny


def measured(batch_size: int) -> list:
    windows = Windows(IDS, torch.tensor([5, 5, 2, 7]))
    scores = evaluate(tiny(), windows, [1.0, 0.75, 0.5], prompt=8, batch_size=batch_size)
    return [(s.budget, s.layers, s.executed, s.sinks, *(x.tolist() for x in (s.loss, s.kl, s.tokens))) for s in scores]


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_shared_windows_give_the_same_numbers_to_the_bit(batch_size):
    expected = measured(batch_size)
    assert side_by_side(measured, batch_size) == [expected, expected]


@pytest.mark.slow
def test_a_run_is_evaluated_by_two(finished, tmp_path, capfd):
    words = ["--run", str(finished / "buddy"), "--budgets", "1.0,0.5,4layers", "--json"]
    alone = call("evaluate", *words, str(tmp_path / "one.json"))
    capfd.readouterr()
    side_by_side(evaluated, [*words, str(tmp_path / "two.json")])
    out, err = capfd.readouterr()
    assert (tmp_path / "two.json").read_text() == (tmp_path / "one.json").read_text()
    assert out.splitlines()[1:] == alone.stdout.splitlines()[1:]  # without the name of the JSON file
    assert err.count("Evaluating buddy: 1 of 1") == 1  # of two batches, each has one


def evaluated(words: list[str]) -> None:
    from buddy.cli import app

    app(["evaluate", *words], standalone_mode=False)
