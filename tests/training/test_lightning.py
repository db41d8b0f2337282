"""Lightning's own features through `buddy fit`, and Buddy's classes in a script with a `Trainer` of its own."""

import csv
import json
import re
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from buddy.compare import fit
from buddy.errors import BuddyError
from buddy.losses import Objective
from buddy.run_files import load_router
from buddy.training.estimators import Perturbed
from tests.training.stopping import same

pytestmark = pytest.mark.slow

DOCUMENT = Path(__file__).parents[2] / "docs" / "lightning.md"
CALLBACKS = "lightning.pytorch.callbacks"
OFTEN = ("trainer.val_check_interval=2", "trainer.check_val_every_n_epoch=null")


@pytest.fixture
def fitted(small, tmp_path):
    """Fits a recipe of eight steps; gives back the run folder."""

    def fitted(*overrides: str) -> Path:
        fit(small(tmp_path, *overrides), "small")
        return tmp_path / "small" / "buddy" / "seed-0"

    return fitted


@pytest.fixture(scope="module")
def plain(small, tmp_path_factory):
    """The run folder of the recipe as it is, but for more validations."""
    output = tmp_path_factory.mktemp("plain")
    fit(small(output, *OFTEN), "small")
    return output / "small" / "buddy" / "seed-0"


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def checkpoints(folder: Path) -> dict[str, dict]:
    files = (folder / "checkpoints").glob("*.ckpt")
    return {file.stem: torch.load(file, weights_only=True) for file in files}


def callback(name: str, **arguments) -> str:
    return f"callbacks={json.dumps([{'class_path': f'{CALLBACKS}.{name}', 'init_args': arguments}])}"


def test_validation_is_in_tensorboard_while_training_goes_on(plain):
    logged = curves(plain)
    for name in ("val/kl", "val/loss", "val/kl/0.75", "val/loss/0.5", "val/perplexity/0.75", "val/perplexity/1.0"):
        assert [step for step, _ in logged[name]] == [1, 3, 5, 7], name
    pairs = zip(logged["val/kl/0.75"], logged["val/kl/0.5"], strict=True)
    means = [(one + other) / 2 for (_, one), (_, other) in pairs]
    assert [value for _, value in logged["val/kl"]] == pytest.approx(means)


def test_model_checkpoint_keeps_the_best(fitted):
    folder = fitted("optimizer.lr=0.3", *OFTEN, callback("ModelCheckpoint", monitor="val/kl", filename="best"))
    values = dict(curves(folder)["val/kl"])
    kept = checkpoints(folder)
    assert kept.keys() == {"best", "last"}
    assert kept["last"]["global_step"] == 8
    assert kept["best"]["global_step"] - 1 == min(values, key=values.__getitem__)


def test_a_callback_acts_where_what_it_monitors_is_logged(fitted):
    stopping = callback("EarlyStopping", monitor="train/objective", patience=1, min_delta=100.0)
    folder = fitted(stopping, *OFTEN, "bridge.rank=8", "bridge.steps=3", "trainer.log_every_n_steps=1")
    assert checkpoints(folder)["last"]["global_step"] == 4, "the second validation is no better"
    assert [step for step, _ in curves(folder)["heal/objective"]] == [0, 1, 2]


def test_accumulated_gradients(fitted, plain):
    folder = fitted("trainer.accumulate_grad_batches=2")
    assert checkpoints(folder)["last"]["global_step"] == 8
    assert not same(*(load_router(each) for each in (folder, plain)))
    assert [step for step, _ in curves(folder)["val/kl"]] == [7], "after whole steps"


class Recorded(Perturbed):
    """An estimator that no distribution announces; it notes the options that it was made with."""

    made: ClassVar[list[int]] = []

    def __init__(self, objective: Objective, plans: int = 4) -> None:
        super().__init__(objective, plans=plans)
        self.made.append(plans)


def test_an_estimator_of_ones_own_is_one_class(fitted):
    fitted(f"objective.estimator={__name__}:Recorded", "objective.plans=2")
    assert {*Recorded.made} == {2}
    with pytest.raises(BuddyError, match="purturbed"):
        fitted("objective.estimator=purturbed")


def test_callbacks_logger_and_profiler_are_those_of_the_recipe(fitted, tmp_path, caplog):
    arguments = {"save_dir": str(tmp_path), "name": "csv"}
    logger = f"logger={json.dumps({'class_path': 'lightning.pytorch.loggers.CSVLogger', 'init_args': arguments})}"
    fitted(logger, *OFTEN, callback("LearningRateMonitor"), "trainer.profiler=simple")
    assert "run_training_batch" in caplog.text, "the profiler's report"
    (path,) = (tmp_path / "csv").rglob("metrics.csv")
    rows = [*csv.DictReader(path.read_text().splitlines())]
    assert [float(row["val/kl"]) > 0 for row in rows if row["val/kl"]] == [True] * 4
    assert any(name.startswith("lr-AdamW") for name in rows[0])


@pytest.mark.filterwarnings("ignore")  # Lightning's, about devices, workers and its own dependencies
def test_the_script_of_the_document(small, tmp_path, monkeypatch, capsys):
    script = re.search(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)[1]
    tiny = {
        '"smollm2-135m"': f'"{small.model}", dtype="float32"',
        "context_layer=3": "context_layer=1",
        '"sotu", model.tokenizer': f'"{small.text}", model.tokenizer, window=48',
        "max_steps=100": 'max_steps=4, accelerator="cpu", val_check_interval=2, check_val_every_n_epoch=None',
    }
    for words, others in tiny.items():
        assert words in script
        script = script.replace(words, others)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(script, names)
    assert names["trainer"].checkpoint_callback.best_model_path.endswith(".ckpt")
    assert names["module"].calibrated
    assert capsys.readouterr().out.strip()
    names["trainer"].test(names["module"], names["data"], verbose=False)
    assert [score.layers for score in names["module"].scores] == [6, 4, 3]
