"""Training that stops, fails and resumes, within one process."""

import itertools
import json
import os
import signal
from functools import cache
from pathlib import Path

import pytest
from torch import Tensor

from buddy.builders import training as training_builders
from buddy.builders.training import build_trainer
from buddy.errors import TrainingError
from buddy.fit import Session
from buddy.metrics.perplexity import measure
from buddy.run import RunSpec
from buddy.run_files import load_router
from buddy.schema import Recipe
from buddy.training.callbacks import LastCheckpoint
from buddy.training.module import RoutingModule
from tests.training.stopping import Killed, assert_same_training, at_step, interrupt, kill, last, same, terminate
from tests.training.test_module import Spoilt

pytestmark = pytest.mark.slow

STEPS = 8


@pytest.fixture(scope="module")
def recipe(small, tmp_path_factory):
    """Makes recipes of eight steps."""
    output = tmp_path_factory.mktemp("none")

    def recipe(*overrides: str) -> Recipe:
        return small(output, f"trainer.max_steps={STEPS}", "optimizer.lr=0.05", "data.test_windows=2", *overrides)

    return recipe


@pytest.fixture(scope="module")
def session(recipe) -> Session:
    return Session.prepare([recipe()])


@pytest.fixture
def train(session, recipe, tmp_path):
    """Makes or resumes a run in a folder; returns the router's state."""

    def train(folder: str, *overrides: str) -> dict[str, Tensor]:
        session.fit(RunSpec("router", recipe(*overrides), "small", tmp_path / folder))
        return load_router(tmp_path / folder)

    return train


@pytest.fixture(scope="module")
def whole(session, recipe, tmp_path_factory):
    """The run of a training that nothing stopped, made once for all tests with its settings; never write into it."""

    @cache
    def whole(*overrides: str) -> Path:
        folder = tmp_path_factory.mktemp("whole") / "run"
        session.fit(RunSpec("router", recipe(*overrides), "small", folder))
        return folder

    return whole


@pytest.mark.parametrize(
    ("setting", "act", "raised", "step"),
    [
        ("objective.estimator=perturbed", interrupt, KeyboardInterrupt, 5),
        ("objective.estimator=straight-through", terminate, KeyboardInterrupt, 5),
        ("router=skipgpt", kill, Killed, 3),
    ],
)
def test_a_stopped_training_resumes_bit_for_bit(
    train, whole, tmp_path, monkeypatch, capsys, setting, act, raised, step
):
    expected = whole(setting)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        at_step(patch, RoutingModule, 5, act)
        with pytest.raises(raised):
            train("parts", setting)
    assert last(tmp_path / "parts")["global_step"] == step
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    train("parts", setting)
    assert_same_training(expected, tmp_path / "parts")
    assert str(tmp_path / "parts" / "checkpoints" / "last.ckpt") in capsys.readouterr().err


def test_no_checkpoint_is_saved_amid_a_step(train, whole, tmp_path, monkeypatch):
    micro = ["trainer.accumulate_grad_batches=2", "checkpoint_every=3"]
    expected = whole(*micro)
    # Amid step 2, which is finished first; after the save of step 3; after one batch of the resumed training.
    for batch, act, raised in ((3, interrupt, KeyboardInterrupt), (4, kill, Killed), (2, kill, Killed)):
        with monkeypatch.context() as patch:
            at_step(patch, RoutingModule, batch, act)
            with pytest.raises(raised):
                train("parts", *micro)
    train("parts", *micro)
    assert_same_training(expected, tmp_path / "parts")


def stopping_early(patience: int) -> list[str]:
    """Validations every two steps, and an end after the first and `patience` more."""
    options = {"monitor": "val/kl", "patience": patience, "min_delta": 1e9, "check_on_train_epoch_end": False}
    path = "lightning.pytorch.callbacks.EarlyStopping"
    return [f"callbacks=[{{class_path: {path}, init_args: {json.dumps(options)}}}]", "trainer.val_check_interval=2"]


@pytest.mark.parametrize(
    ("every", "patience", "act", "raised", "step", "validation"),
    [
        (2, 2, kill, Killed, 5, None),
        (2, 1, kill, Killed, None, 2),
        *(
            (every, patience, interrupt, KeyboardInterrupt, *place)  # 50: no checkpoint but the one of the interrupt
            for every, patience, place in itertools.product((2, 50), (2, 1), ((4, None), (None, 2)))
        ),
    ],
)
def test_a_resumed_training_stops_as_early(
    train, whole, tmp_path, monkeypatch, every, patience, act, raised, step, validation
):
    early = [*stopping_early(patience), f"checkpoint_every={every}"]
    expected = whole(*early)
    with monkeypatch.context() as patch:
        if step:
            at_step(patch, RoutingModule, step, act)
        else:
            at_step(patch, RoutingModule, validation, act, "on_validation_epoch_end")
        with pytest.raises(raised):
            train("parts", *early)
    assert same(train("parts", *early), load_router(expected))
    assert last(tmp_path / "parts")["global_step"] == last(expected)["global_step"] == 2 + 2 * patience


@pytest.mark.parametrize(("act", "raised"), [(kill, Killed), (interrupt, KeyboardInterrupt)])
@pytest.mark.parametrize("where", ["training_step", "on_validation_epoch_end"])
@pytest.mark.parametrize(
    "setting",
    [
        ["trainer.accumulate_grad_batches=2", "trainer.val_check_interval=3"],
        ["trainer.limit_train_batches=4", "trainer.check_val_every_n_epoch=1"],
    ],
    ids=["amid a step", "at the end of an epoch"],
)
def test_validations_at_other_places_resume_too(train, whole, tmp_path, monkeypatch, setting, where, act, raised):
    early = [each.replace("false", "true") if "epoch" in setting[1] else each for each in stopping_early(5)[:1]]
    every = [*early, *setting, "checkpoint_every=2"]
    expected = whole(*every)
    with monkeypatch.context() as patch:
        at_step(patch, RoutingModule, 6 if where == "training_step" else 1, act, where)
        with pytest.raises(raised):
            train("parts", *every)
    train("parts", *every)
    assert_same_training(expected, tmp_path / "parts")


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_training_that_ended_early_does_not_go_on_after_a_kill(train, whole, tmp_path, monkeypatch):
    early = [*stopping_early(1), "checkpoint_every=2"]
    expected = whole(*early)
    steps = last(expected)["global_step"]
    assert steps < STEPS
    for owner, name in ((LastCheckpoint, "on_train_end"), (Session, "_test")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, lambda *_: kill())
            with pytest.raises(Killed):
                train(name, *early)
        assert same(train(name, *early), load_router(expected))
        assert last(tmp_path / name)["global_step"] == steps
    go_on = f"ckpt_path={tmp_path / '_test' / 'checkpoints' / 'last.ckpt'}"
    train("more", go_on)
    assert last(tmp_path / "more")["global_step"] == STEPS


def test_a_training_that_ended_goes_on_where_its_own_checkpoint_is_named(train, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Session, "_test", lambda *_: kill())
        with pytest.raises(Killed):
            train("run", "trainer.max_steps=2")
    own = tmp_path / "run" / "checkpoints" / "last.ckpt"
    train("run", "trainer.max_steps=6", f"ckpt_path={own}")
    assert last(tmp_path / "run")["global_step"] == 6


def test_a_second_signal_stops_at_once(train, tmp_path, monkeypatch):
    def twice() -> None:
        interrupt()
        interrupt()

    at_step(monkeypatch, RoutingModule, 5, twice)
    with pytest.raises(KeyboardInterrupt):
        train("run")
    assert last(tmp_path / "run")["global_step"] == 3
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_step_that_is_not_finite_ends_the_training(train, monkeypatch):
    monkeypatch.setattr(training_builders, "build_estimator", lambda *_: Spoilt("gradient"))
    with pytest.raises(TrainingError, match=r"step 3.*optimizer\.lr"):
        train("run")
    at_step(monkeypatch, RoutingModule, 3, interrupt)
    with pytest.raises(KeyboardInterrupt):  # a comparison must not go on with its next run
        train("interrupted")


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(train, tmp_path, monkeypatch):
    replace = os.replace

    def killed(source, target) -> None:
        if str(target).endswith(".ckpt") and os.path.exists(target):
            kill()
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(Killed):
        train("run")
    assert last(tmp_path / "run")["global_step"] == 3


@pytest.mark.parametrize(("steps", "interval"), [(350, 87), (100, 25), (60, 30), (40, 40), (8, 8), (0, 1)])
def test_validations_are_four_or_fewer_in_a_short_training(recipe, steps, interval):
    assert build_trainer(recipe(f"trainer.max_steps={steps}")).val_check_interval == interval


@pytest.mark.parametrize(("interval", "epochs"), [("50", None), ("0.5", 1)])
def test_validation_after_more_steps_than_there_are(recipe, interval, epochs):
    assert build_trainer(recipe(f"trainer.val_check_interval={interval}")).check_val_every_n_epoch == epochs


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_an_evaluation(train, tmp_path, monkeypatch, number):
    def measured(*args, **options):
        os.kill(os.getpid(), number)
        return measure(*args, **options)

    monkeypatch.setattr("buddy.training.module.measure", measured)
    with pytest.raises(KeyboardInterrupt):
        train("run", "router=uniform", "bridge=null")
    assert not (tmp_path / "run" / "metrics.json").exists()
