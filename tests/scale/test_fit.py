"""`fit` by several processes, forked: the curves, weights and results of one with the same batch."""

import pytest

from buddy import distributed
from buddy.compare import fit
from buddy.config import load_recipe
from buddy.fit import Session
from buddy.training.callbacks import LastCheckpoint
from tests.scale.curves import assert_alike, curves
from tests.scale.forked import side_by_side

HEALED = ("adapter.steps=4", "adapter.rank=2", "trainer.max_steps=3")


def words(small, output, *overrides: str) -> list[str]:
    return [str(small.file), f"output={output}", "trainer.log_every_n_steps=1", *overrides]


def fitted(given: list[str]) -> None:
    fit(load_recipe(given[0], given[1:]), "small")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "strategy"), [((), "fsdp"), (("adapter.joint=true",), "ddp")], ids=["healed", "together"]
)
def test_healing_follows_the_curve_of_one_process(small, tmp_path, settings, strategy):
    fitted(words(small, tmp_path / "one", *HEALED, *settings))
    side_by_side(fitted, words(small, tmp_path / "two", *HEALED, *settings, f"trainer.strategy={strategy}"))
    one, two = (tmp_path / folder / "small" / "buddy" / "seed-0" for folder in ("one", "two"))
    assert_alike(one, two)
    assert [step for step, _ in curves(two)["heal/objective"]] == [*range(4)]


def stopped(given: list[str]) -> str:
    """A fit whose first process is asked to stop at the third step."""
    follow_up = LastCheckpoint.on_train_batch_end

    def on_train_batch_end(self, trainer, *rest) -> None:
        self.requested = self.requested or (distributed.is_global_zero() and trainer.global_step == 3)
        follow_up(self, trainer, *rest)

    LastCheckpoint.on_train_batch_end = on_train_batch_end
    try:
        fitted(given)
    except (KeyboardInterrupt, SystemExit) as error:
        return type(error).__name__
    return "nothing stopped it"


@pytest.mark.slow
def test_what_two_processes_began_one_goes_on_with(small, tmp_path):
    fitted(words(small, tmp_path / "one"))
    assert side_by_side(stopped, words(small, tmp_path / "two")) == ["KeyboardInterrupt", "SystemExit"]
    assert not (tmp_path / "two" / "small" / "buddy" / "seed-0" / "metrics.json").exists()
    fitted(words(small, tmp_path / "two"))
    assert_alike(*(tmp_path / folder / "small" / "buddy" / "seed-0" for folder in ("one", "two")))


def validation_batches(given: list[str]) -> int:
    return len(Session.prepare([load_recipe(given[0], given[1:])]).data.val_dataloader())


def test_half_of_the_validation_batches_of_each_process_is_one(small, tmp_path):
    half = ("trainer.limit_val_batches=0.5", "data.batch_size=2", "data.validation_windows=8")
    assert side_by_side(validation_batches, words(small, tmp_path, *half)) == [2, 2]
