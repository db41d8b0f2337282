"""Training that stops, fails and goes on."""

import os
import signal

import pytest
import torch
from torch import Tensor

from buddy import build
from buddy import fit as training
from buddy.build import build_backbone, build_data, build_model, build_trainer
from buddy.errors import TrainingError
from buddy.schema import Recipe
from buddy.training.callbacks import check_checkpoint
from tests.training.test_module import Spoilt

STEPS = 8


@pytest.fixture(scope="module")
def backbone(small, tmp_path_factory):
    return build_backbone(small(tmp_path_factory.mktemp("none")))


@pytest.fixture
def train(backbone, small, tmp_path):
    """Trains a new router of a recipe in a folder; gives back its state."""

    def train(folder: str, *overrides: str) -> dict[str, Tensor]:
        recipe: Recipe = small(tmp_path, f"trainer.max_steps={STEPS}", "optimizer.lr=0.05", *overrides)
        torch.manual_seed(0)
        routed, data = build_model(recipe, backbone), build_data(recipe, backbone)
        try:
            training.train(recipe, routed, data, tmp_path / folder)
        finally:
            routed.detach()
        return routed.router.state_dict()

    return train


def at_step(monkeypatch, step: int, act) -> None:
    """`act` is called in the middle of a training step, once."""
    calls, make = [], build.build_estimator

    def estimator_of(recipe, router):
        estimator = make(recipe, router)

        def estimate(*args):
            calls.append(None)
            if len(calls) == step:
                act()
            return estimator(*args)

        return estimate

    monkeypatch.setattr(build, "build_estimator", estimator_of)


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


class Killed(Exception):
    pass


def kill() -> None:
    raise Killed


def last(folder) -> dict:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def assert_same_training(one: dict, two: dict) -> None:
    """Weights, and everything that the optimizer and its schedule hold."""
    assert one["global_step"] == two["global_step"] == STEPS
    assert one["lr_schedulers"] == two["lr_schedulers"]
    torch.testing.assert_close(one["state_dict"], two["state_dict"], atol=0, rtol=0)
    torch.testing.assert_close(one["optimizer_states"], two["optimizer_states"], atol=0, rtol=0)


@pytest.mark.parametrize(
    "setting", ["objective.estimator=perturbed", "objective.estimator=straight-through", "router=first"]
)
@pytest.mark.parametrize(
    ("act", "raised", "kept"), [(interrupt, KeyboardInterrupt, 5), (terminate, KeyboardInterrupt, 5), (kill, Killed, 3)]
)
def test_what_was_stopped_goes_on_bit_for_bit(train, tmp_path, monkeypatch, capsys, setting, act, raised, kept):
    expected = train("whole", setting)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        at_step(patch, 5, act)
        with pytest.raises(raised):
            train("parts", setting)
    assert last(tmp_path / "parts")["global_step"] == kept
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    state = train("parts", setting)
    assert all(torch.equal(expected[name], value) for name, value in state.items())
    assert_same_training(last(tmp_path / "whole"), last(tmp_path / "parts"))
    said = capsys.readouterr().err
    assert f"Going on from {tmp_path / 'parts' / 'checkpoints' / 'last.ckpt'}" in said
    if raised is KeyboardInterrupt:
        name = "first" if setting == "router=first" else "buddy"
        assert f"Stopping after this step …\nTraining {name}: 5 of {STEPS}" in said
        assert f"A checkpoint of step 5 of {STEPS} is kept." in said


def test_a_named_checkpoint_is_gone_on_from(train, tmp_path, monkeypatch):
    expected = train("whole")
    with monkeypatch.context() as patch:
        at_step(patch, 3, interrupt)
        with pytest.raises(KeyboardInterrupt):
            train("first")
    state = train("second", f"ckpt_path={tmp_path}/first/checkpoints/last.ckpt")
    assert all(torch.equal(expected[name], value) for name, value in state.items())


def test_a_second_signal_stops_at_once(train, tmp_path, monkeypatch):
    def twice() -> None:
        interrupt()
        interrupt()

    at_step(monkeypatch, 5, twice)
    with pytest.raises(KeyboardInterrupt):
        train("run")
    assert last(tmp_path / "run")["global_step"] == 3
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_finished_training_is_not_done_again(train, tmp_path, monkeypatch):
    expected = train("run")
    at_step(monkeypatch, 1, kill)
    state = train("run")
    assert all(torch.equal(expected[name], value) for name, value in state.items())
    assert last(tmp_path / "run")["global_step"] == STEPS


def test_a_training_can_be_made_longer(train, tmp_path):
    train("run")
    train("run", "trainer.max_steps=11")
    assert last(tmp_path / "run")["global_step"] == 11


def test_a_step_that_is_not_finite_leaves_a_checkpoint_to_go_on_from(train, tmp_path, monkeypatch):
    expected = train("whole")
    with monkeypatch.context() as patch:
        patch.setattr(build, "build_estimator", lambda *_: Spoilt("gradient"))
        with pytest.raises(TrainingError, match="step 3 because the gradient is not finite; lower") as caught:
            train("run")
    kept = tmp_path / "run" / "checkpoints" / "before-failure.ckpt"
    assert str(caught.value).endswith(f"with ckpt_path={kept}.")
    assert torch.load(kept, weights_only=True)["global_step"] == 2
    state = train("again", f"ckpt_path={kept}")
    assert all(torch.equal(expected[name], value) for name, value in state.items())
    assert_same_training(last(tmp_path / "whole"), last(tmp_path / "again"))


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(train, tmp_path, monkeypatch):
    train("run")
    before = (tmp_path / "run" / "checkpoints" / "last.ckpt").read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: kill())
    with pytest.raises(Killed):
        train("run", "trainer.max_steps=12")
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"text", None])
def test_what_is_no_checkpoint_is_refused(tmp_path, content):
    path = tmp_path / "odd.ckpt"
    torch.save({"weight": torch.zeros(3)}, path) if content is None else path.write_bytes(content)
    with pytest.raises(TrainingError, match=r"odd.ckpt is damaged or not one of Buddy's \(.+\); delete it and start"):
        check_checkpoint(path)


def test_a_cut_checkpoint_is_refused_and_a_missing_one(train, tmp_path):
    train("run")
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(TrainingError, match=r"last\.ckpt is damaged or not one of Buddy's"):
        train("run")
    with pytest.raises(TrainingError, match=r"There is no checkpoint nowhere.ckpt; leave ckpt_path out"):
        train("new", "ckpt_path=nowhere.ckpt")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["trainer.strategy=dpp"], "strategy=dpp"),
        (["trainer.accelerator=tpu"], "trainer.accelerator=tpu"),
        (["trainer.strategy=ddp_spawn"], "trainer.strategy=ddp_spawn"),
    ],
)
def test_settings_that_the_trainer_refuses(small, tmp_path, settings, message):
    with pytest.raises(TrainingError, match=message):
        build_trainer(small(tmp_path, *settings))
