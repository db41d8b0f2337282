"""`buddy fit` with a predictor: what is saved, that it resumes after an interruption, and what is refused."""

import json
import shutil

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from buddy.builders.model import load_model
from buddy.compare import fit
from buddy.errors import BudgetError, RunError
from buddy.io import load_tensors
from buddy.predictor import features
from buddy.predictor.features import measure_targets, prompt_features
from buddy.predictor.train import load_predictor
from buddy.run import read_run

OPTIONS = ["router=shortgpt", "predictor.name=regress", "predictor.windows=10", "rivals=[]"]


@pytest.fixture(scope="module")
def routed(predicting):
    return load_model(read_run(predicting["regress"]))


def tokens(rows: int, length: int) -> torch.Tensor:
    return torch.randint(3, 259, (rows, length), generator=torch.Generator().manual_seed(1))


def tags(folder) -> set[str]:
    return set(EventAccumulator(str(folder)).Reload().Tags()["scalars"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["regress", "grpo"])
def test_the_run_folder_describes_the_predictor(predicting, name):
    folder = predicting[name]
    facts = json.loads((folder / "predictor.json").read_text())
    assert (facts["name"], facts["layers"], facts["windows"]) == (name, [6, 4, 3], 12)  # three whole batches
    assert not list(folder.glob("predictor-targets*"))
    if name == "regress":
        assert [row["layers"] for row in facts["curve"]] == [6, 4, 3]
        assert [row["spread"] > 0 and row["error"] > 0 for row in facts["curve"]] == [False, True, True]
        assert {f"predictor/{tag}" for tag in ("increase", "error", "spread")} <= tags(folder)
    else:
        assert 0 < facts["entropy"] <= facts["entropy_at_random"] == pytest.approx(1.0986, abs=1e-3)
        assert {f"predictor/{tag}" for tag in ("entropy", "entropy_at_random", "reward", "layers")} <= tags(folder)


@pytest.mark.parametrize("name", ["regress", "grpo"])
def test_a_loaded_run_chooses_as_its_predictor_does(predicting, name):
    routed = load_model(read_run(predicting[name]))
    context = routed.context(tokens(5, 12))
    chosen = routed.choosing("auto")(context)
    assert torch.equal(chosen, load_predictor(predicting[name], routed.geometry).chooser(6)(context))
    assert set(chosen.tolist()) <= {6, 4, 3}
    assert routed.choosing("auto:0.6")(context).max() <= 4
    with pytest.raises(BudgetError, match="2 layers"):
        routed.choosing("auto:2layers")
    if name == "regress":
        tensors = load_tensors(predicting[name] / "predictor.safetensors")
        seen = (prompt_features(context) - tensors["mean"]) / tensors["scale"]
        near = (seen @ tensors["slope"].T + tensors["level"]) <= 0.3
        assert chosen.tolist() == [min(k for k, on in zip((6, 4, 3), row, strict=True) if on) for row in near.tolist()]


def test_targets_are_what_a_forward_of_each_window_loses(routed):
    ids = tokens(6, 30)
    targets = measure_targets(routed, [lambda part=part: part for part in ids.split(4)], (4, 3), prompt=10)
    assert targets.counts == (6, 4, 3)
    for row in range(6):
        for index, count in enumerate(targets.counts):
            logits = routed(ids[row : row + 1], executed=torch.tensor([count]), prompt=10).logits[0]
            loss = torch.nn.functional.cross_entropy(logits[9:-1].float(), ids[row, 10:])
            assert targets.losses[row, index].item() == pytest.approx(loss.item(), abs=1e-4)
        context = routed.context(ids[row : row + 1, :10])
        torch.testing.assert_close(targets.features[row], prompt_features(context)[0], atol=1e-5, rtol=1e-5)
    assert torch.equal(targets.increase((3,)), targets.losses[:, 2:] - targets.losses[:, :1])
    later = torch.cat([ids[:4, :10], ids[:4, 10:].flip(1)], 1)
    assert torch.equal(measure_targets(routed, [lambda: later], (3,), prompt=10).features, targets.features[:4])


def test_stored_targets_are_bit_for_bit_and_of_one_router(routed, tmp_path, monkeypatch):
    def measured(key=1):
        return measure_targets(routed, [lambda: tokens(3, 20)], (4,), prompt=8, store=tmp_path, key=key)

    assert " at 0x" not in repr(routed.settings), "a part of the key, which another process must find"
    before = measured()
    with monkeypatch.context() as patch:
        patch.setattr(features, "_losses", lambda *_: pytest.fail("measured again"))
        again = measured()
    assert torch.equal(before.features, again.features)
    assert torch.equal(before.losses, again.losses)
    assert again.features.dtype == torch.float32
    assert len(list(tmp_path.iterdir())) == 1
    measured(key=2)
    routed.router.influence[0] += 1
    measured()
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.slow
def test_an_interrupted_fit_resumes(small, predicting, tmp_path, monkeypatch):
    real, calls = features._losses, []

    def stop_at_third(*given):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*given)

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(features, "_losses", stop_at_third)
    recipe = small(tmp_path, *OPTIONS, "predictor.epsilon=0.3")
    with pytest.raises(KeyboardInterrupt):
        fit(recipe, "small")
    with monkeypatch.context() as patch:
        patch.setattr("buddy.fit.evaluate", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fit(recipe, "small")
    fit(recipe, "small")
    assert len(calls) == 4  # two, the one that was interrupted, and that one again
    (ours,) = tmp_path.rglob("predictor.safetensors")
    whole = load_tensors(predicting["regress"] / "predictor.safetensors")
    assert all(torch.equal(load_tensors(ours)[name], tensor) for name, tensor in whole.items())
    assert not list(tmp_path.rglob("predictor-targets*"))
    events = EventAccumulator(str(ours.parent)).Reload()
    assert [event.step for event in events.Scalars("predictor/error")] == [3, 4, 6]  # once, though fitted twice


@pytest.mark.slow
def test_a_trained_router_s_predictor_is_fitted_after_it_and_keeps_to_the_cap(small, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "buddy.predictor.train.measure_targets",
        lambda routed, *given, **options: seen.append(routed.router) or measure_targets(routed, *given, **options),
    )
    options = ["predictor.name=regress", "predictor.windows=4", "predictor.cap=0.75", "predictor.epsilon=0"]
    fit(small(tmp_path, *options, "trainer.max_steps=1", "rivals=[]"), "small")
    (path,) = tmp_path.rglob("router.safetensors")
    saved = load_tensors(path)
    assert all(torch.equal(saved[name], tensor) for name, tensor in seen[0].state_dict().items())
    assert not any(parameter.requires_grad for parameter in seen[0].parameters())
    assert json.loads((path.parent / "predictor.json").read_text())["layers"] == [4, 3]
    routed = load_model(read_run(path.parent))
    for budget in ("auto", "auto:1.0", "auto:5layers"):
        assert routed.choosing(budget)(routed.context(tokens(8, 12))).max() <= 4


@pytest.mark.parametrize("name", ["predictor.safetensors", "predictor.json"])
def test_a_damaged_or_missing_file_is_named(predicting, routed, tmp_path, name):
    shutil.copytree(predicting["regress"], tmp_path, dirs_exist_ok=True)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-9])
    with pytest.raises(RunError, match=name):
        load_predictor(tmp_path, routed.geometry)
    (tmp_path / name).unlink()
    with pytest.raises(RunError, match=name):
        load_predictor(tmp_path, routed.geometry)


@pytest.mark.parametrize("change", [{"options": {"hidden": 7}}, {"options": {"hidden": -1}}, {"name": "oracle"}])
def test_a_predictor_of_another_model_is_refused(predicting, routed, tmp_path, change):
    shutil.copytree(predicting["grpo"], tmp_path, dirs_exist_ok=True)
    facts = json.loads((tmp_path / "predictor.json").read_text())
    (tmp_path / "predictor.json").write_text(json.dumps(facts | change))
    with pytest.raises(RunError):
        load_predictor(tmp_path, routed.geometry)
