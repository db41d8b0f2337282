"""`buddy fit` with a predictor: what is saved, that it goes on where it was stopped, and what is refused."""

import json
import shutil

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from buddy.build import load_model
from buddy.errors import BudgetError, RecipeError, RunError
from buddy.fit import _rival, fit
from buddy.io import load_tensors
from buddy.predictor import features as measuring
from buddy.predictor import fit as fitting
from buddy.predictor.features import features_of, measure
from buddy.run import read_run

OPTIONS = ["router=shortgpt", "predictor.name=regress", "predictor.windows=10"]


@pytest.fixture(scope="module", autouse=True)
def no_pictures(predicting):
    """Fits draw none here, once the runs are there that all tests share: others look at pictures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("buddy.evaluation.report.draw", lambda *_: None)
        yield


def tags(folder) -> set[str]:
    return set(EventAccumulator(str(folder)).Reload().Tags()["scalars"])


@pytest.mark.parametrize("name", ["regress", "grpo"])
def test_what_lies_in_the_run_folder(predicting, name):
    folder = predicting[name]
    facts = json.loads((folder / "predictor.json").read_text())
    assert (facts["name"], facts["layers"], facts["windows"]) == (name, [6, 4, 3], 12)  # three whole batches
    sums = json.loads((folder / "run.json").read_text())["checksums"]
    assert {"predictor.safetensors", "predictor.json"} <= sums.keys()
    assert not list(folder.glob("predictor-targets*"))
    shown = {"regress": {"increase", "error", "spread"}, "grpo": {"entropy", "entropy_at_random", "reward", "layers"}}
    assert {f"predictor/{tag}" for tag in shown[name]} <= tags(folder)


def test_the_regression_says_how_good_it_is(predicting):
    curve = json.loads((predicting["regress"] / "predictor.json").read_text())["curve"]
    assert [row["layers"] for row in curve] == [6, 4, 3]
    assert curve[0] == {"layers": 6, "increase": 0.0, "spread": 0.0, "error": 0.0}
    assert all(row["spread"] > 0 and row["error"] > 0 for row in curve[1:])


def test_entropy_is_told_beside_that_of_a_policy_at_random(predicting):
    facts = json.loads((predicting["grpo"] / "predictor.json").read_text())
    assert 0 < facts["entropy"] <= facts["entropy_at_random"] == pytest.approx(1.0986, abs=1e-3)


@pytest.mark.parametrize("name", ["regress", "grpo"])
def test_a_loaded_run_chooses_as_its_predictor_does(predicting, name):
    routed = load_model(read_run(predicting[name]))
    ids = torch.randint(3, 259, (5, 12), generator=torch.Generator().manual_seed(0))
    chosen = routed.choosing("auto")(routed.context(ids))
    assert set(chosen.tolist()) <= {6, 4, 3}
    assert routed.choosing("auto:0.6")(routed.context(ids)).max() <= 4
    with pytest.raises(BudgetError, match="leaves 2 layers, but this run's predictor chooses from 3 on"):
        routed.choosing("auto:2layers")
    tensors = load_tensors(predicting[name] / "predictor.safetensors")
    if name == "regress":
        features = (features_of(routed.context(ids)) - tensors["mean"]) / tensors["scale"]
        near = (features @ tensors["slope"].T + tensors["level"]) <= 0.3
        assert chosen.tolist() == [min(k for k, on in zip((6, 4, 3), row, strict=True) if on) for row in near.tolist()]


def test_targets_are_what_evaluation_measures(predicting):
    """Against a forward of each window alone."""
    from torch.nn.functional import cross_entropy

    routed = load_model(read_run(predicting["regress"]))
    ids = torch.randint(3, 259, (6, 30), generator=torch.Generator().manual_seed(1))
    found = measure(routed, [lambda part=part: part for part in ids.split(4)], (4, 3), prompt=10)
    assert found.counts == (6, 4, 3)
    for row in range(6):
        for place, count in enumerate(found.counts):
            logits = routed(ids[row : row + 1], executed=torch.tensor([count]), prompt=10).logits[0]
            loss = cross_entropy(logits[9:-1].float(), ids[row, 10:])
            assert found.losses[row, place].item() == pytest.approx(loss.item(), abs=1e-4)
        context = routed.context(ids[row : row + 1, :10])
        torch.testing.assert_close(found.features[row], features_of(context)[0], atol=1e-5, rtol=1e-5)
    assert torch.equal(found.increase((3,)), found.losses[:, 2:] - found.losses[:, :1])


def test_later_tokens_do_not_enter(predicting):
    routed = load_model(read_run(predicting["regress"]))
    ids = torch.randint(3, 259, (4, 30), generator=torch.Generator().manual_seed(1))
    other = torch.cat([ids[:, :10], ids[:, 10:].flip(1)], 1)
    one, two = (measure(routed, [lambda each=each: each], (3,), prompt=10).features for each in (ids, other))
    assert torch.equal(one, two)


def test_what_was_measured_before_a_stop_is_not_measured_again(small, predicting, tmp_path, monkeypatch):
    monkeypatch.setattr(measuring, "SAVE_EVERY", 0.0)
    real, counted = measuring._losses, []

    def stop_at_third(*given):
        counted.append(1)
        if len(counted) == 3:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(measuring, "_losses", stop_at_third)
    options = [*OPTIONS, "predictor.epsilon=0.3"]
    with pytest.raises(KeyboardInterrupt):
        fit(small(tmp_path, *options), "small")
    assert not (tmp_path / "small" / "shortgpt" / "seed-0").exists()
    fit(small(tmp_path, *options), "small")
    assert len(counted) == 4  # two, the one that was stopped, and that one again
    ours, whole = (
        load_tensors(folder / "predictor.safetensors")
        for folder in (tmp_path / "small/shortgpt/seed-0", predicting["regress"])
    )
    assert all(torch.equal(ours[name], tensor) for name, tensor in whole.items())


def test_a_kill_in_the_evaluation_costs_no_measuring(small, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("buddy.fit.evaluate", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fit(small(tmp_path, *OPTIONS), "small")
    with monkeypatch.context() as patch:
        patch.setattr(measuring, "_losses", lambda *_: pytest.fail("measured again"))
        fit(small(tmp_path, *OPTIONS), "small")
    assert not list((tmp_path / "small/shortgpt/seed-0").glob("predictor-targets*"))


def test_what_was_measured_is_of_a_router_and_of_all_that_windows_depend_on(predicting):
    routed = load_model(read_run(predicting["regress"]))
    before = measuring.digest_of(routed, 1)
    assert before == measuring.digest_of(routed, 1) != measuring.digest_of(routed, 2)
    routed.router.register_buffer("number", torch.tensor(1.0))  # of no dimension
    assert measuring.digest_of(routed, 1) != before


def test_an_earlier_beginning_s_predictor_does_not_stay(small, predicting, tmp_path):
    """A named checkpoint keeps an unfinished folder, whatever else of the recipe changed."""
    for name in ("predictor.json", "predictor.safetensors"):
        shutil.copy(predicting["regress"] / name, tmp_path)
    fitting.fit_predictor(small(tmp_path), None, None, tmp_path)  # a recipe without a predictor needs no model
    assert not list(tmp_path.iterdir())


def test_rivals_have_none(small, tmp_path):
    recipe = small(tmp_path, *OPTIONS, "rivals=[uniform]")
    rival = _rival(recipe, "uniform")
    assert (rival.router.name, rival.predictor.name, recipe.predictor.name) == ("uniform", None, "regress")


def test_the_cap_of_a_recipe_is_never_passed(small, tmp_path):
    fit(small(tmp_path, *OPTIONS, "predictor.cap=0.75", "predictor.epsilon=0"), "small")
    folder = tmp_path / "small" / "shortgpt" / "seed-0"
    assert json.loads((folder / "predictor.json").read_text())["layers"] == [4, 3]
    routed = load_model(read_run(folder))
    ids = torch.randint(3, 259, (8, 12), generator=torch.Generator().manual_seed(0))
    for budget in ("auto", "auto:1.0", "auto:5layers"):
        assert routed.choosing(budget)(routed.context(ids)).max() <= 4


def test_a_trained_router_s_predictor_is_fitted_after_it(small, tmp_path, monkeypatch):
    seen = []
    real = fitting.measure
    monkeypatch.setattr(
        fitting,
        "measure",
        lambda routed, *given, **options: seen.append(routed.router) or real(routed, *given, **options),
    )
    fit(small(tmp_path, "predictor.name=regress", "predictor.windows=4", "trainer.max_steps=1"), "small")
    saved = load_tensors(tmp_path / "small/buddy/seed-0/router.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in seen[0].state_dict().items())
    assert not any(parameter.requires_grad for parameter in seen[0].parameters())


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["predictor.epsilon=-0.1"], RecipeError, r"predictor\.epsilon is -0\.1, but must be at least 0"),
        (["predictor.name=regres"], RecipeError, r"predictor\.name cannot be 'regres' .* did you mean 'regress'"),
        (["predictor.cap=1.5"], RecipeError, r"predictor\.cap is 1\.5, but must be at most 1"),
        (["predictor.cap=0.4"], RecipeError, r"predictor\.cap is 0\.4, below the smallest budget, which is 0\.5"),
        (["predictor.name=grpo", "predictor.cost=0", "predictor.quality=0"], RecipeError, "are both 0, which rewards"),
        (["budgets=[0.5]"], BudgetError, "A budget predictor chooses between budgets, and here are 1 for it"),
        (
            ["predictor.cap=0.55"],
            BudgetError,
            r"here are 1 for it .* raise predictor\.cap, or set predictor\.name=null",
        ),
        (["router=full"], BudgetError, "here are 1 for it"),
    ],
)
def test_what_is_refused(small, tmp_path, overrides, error, message):
    with pytest.raises(error, match=message):
        fit(small(tmp_path, *OPTIONS, *overrides), "small")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["predictor.safetensors", "predictor.json"])
def test_a_damaged_predictor(predicting, tmp_path, name):
    shutil.copytree(predicting["regress"], tmp_path / "run")
    path = tmp_path / "run" / name
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(RunError, match=f"{name} is damaged"):
        load_model(read_run(tmp_path / "run"))
    path.unlink()
    with pytest.raises(RunError, match=f"{name} is damaged"):
        load_model(read_run(tmp_path / "run"))


def test_a_predictor_of_another_model(predicting, tmp_path):
    shutil.copytree(predicting["grpo"], tmp_path / "run")
    facts = json.loads((tmp_path / "run/predictor.json").read_text())
    facts["options"]["hidden"] = 7
    (tmp_path / "run/predictor.json").write_text(json.dumps(facts))
    run = json.loads((tmp_path / "run/run.json").read_text())
    del run["checksums"]
    (tmp_path / "run/run.json").write_text(json.dumps(run))
    with pytest.raises(RunError, match=r"The budget predictor saved in .* does not fit this model"):
        load_model(read_run(tmp_path / "run"))
    (tmp_path / "run/predictor.json").write_text(json.dumps(facts | {"name": "oracle"}))
    with pytest.raises(RunError, match="it does not describe a predictor"):
        load_model(read_run(tmp_path / "run"))
