"""Training data as Lightning sees it: one order of batches from one seed, resumed where it stopped."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from buddy.data.documents import read_documents
from buddy.data.module import TextData
from buddy.errors import DataError

# Lightning 2.6 under torch 2.13: of its own making, and nothing that data could do about.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning")
WINDOW = 16
STEPS = 6


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    """120 documents of 20 to 99 words; each counts up from its own number times 40."""
    path = tmp_path_factory.mktemp("text") / "counts.jsonl"
    texts = (" ".join(str(40 * number + i % 40) for i in range(20 + 7 * number % 80)) for number in range(120))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


@pytest.fixture
def make(source, words):
    """A new `TextData` of 4 windows per batch and 6 steps, set up; options override."""

    def make(setup=True, **options):
        sizes = {"window": WINDOW, "batch_size": 4, "steps": STEPS, "test_windows": 20, "calibration_windows": 12}
        data = TextData(options.pop("source", source), words, **{**sizes, "validation_windows": 4, **options})
        if setup:
            data.setup()
        return data

    return make


def write(folder, rows) -> str:
    path = folder / "rows.json"
    path.write_text(json.dumps(rows))
    return str(path)


def numbers(windows) -> set[int]:
    """The documents that tokens come from."""
    return set(((windows - 2) // 40).flatten().tolist())


def test_no_document_is_in_two_splits(make):
    data = make()
    trained = set().union(*(numbers(data.batch(step)) for step in range(100)))
    held = [numbers(windows.input_ids) for windows in (data.test, data.calibration, data.validation)]
    assert [len(data.test), len(data.calibration), len(data.validation)] == [20, 12, 4]
    assert [len(part) for part in held] == [20, 12, 4]
    assert len(trained) > 60
    assert sum(map(len, held)) + len(trained) == len(trained.union(*held))
    assert trained <= set(data.split["train"].tolist())


def held_out_equal(one, other) -> bool:
    names = ("test", "calibration", "validation")
    return all(torch.equal(getattr(one, name).input_ids, getattr(other, name).input_ids) for name in names)


def test_the_split_depends_on_the_seed_and_not_on_steps_or_batches(make):
    assert held_out_equal(make(), make(steps=50, batch_size=7))
    assert not torch.equal(make().test.input_ids, make(seed=1).test.input_ids)


def test_a_batch_depends_on_seed_and_step_alone(make):
    data = make()
    later = data.batch(5)
    assert later.shape == (4, WINDOW)
    assert later.dtype == torch.long
    assert torch.equal(later, make(steps=100).batch(5))
    assert not torch.equal(later, data.batch(4))
    assert not torch.equal(later, make(seed=1).batch(5))


def test_windows_begin_anywhere_and_long_documents_come_oftener(make):
    data = make(batch_size=4000)
    windows = data.batch(0)
    assert ((windows[:, 1:] - windows[:, :-1] - 1) % 40 == 0).all()  # consecutive words
    assert set(((windows[:, 0] - 2) % 40).tolist()) == set(range(40))
    lengths = 20 + 7 * np.arange(120) % 80
    drawn = torch.bincount((windows[:, 0] - 2) // 40, minlength=120).numpy()
    expected = np.zeros(120)
    expected[data.split["train"]] = lengths[data.split["train"]]
    assert np.abs(drawn / drawn.sum() - expected / expected.sum()).max() < 0.01


def test_other_sources_take_turns_and_leave_the_split_alone(make, source, tmp_path):
    path = tmp_path / "more.jsonl"
    path.write_text("".join(json.dumps({"text": " ".join(["7"] * 40)}) + "\n" for _ in range(3)))
    alone, both = make(), make(train_sources=[str(path)])
    assert held_out_equal(alone, both)
    assert both.fingerprint == alone.fingerprint
    assert (alone.train_fingerprint, both.train_fingerprint is None) == (None, False)
    rows = torch.cat([both.batch(step) for step in range(3)])
    assert (rows[1::2] == rows[1, 0]).all(), "every second window is of the other source"
    trained = set(both.split["train"].tolist())
    assert all(numbers(row) <= trained and len(row.unique()) > 1 for row in rows[::2])


def test_the_digest_is_of_every_token(make, source, tmp_path):
    def digest(word: str) -> tuple[str, str, str]:
        path = tmp_path / f"{word}.jsonl"
        path.write_text("".join(json.dumps({"text": " ".join([word] * 40)}) + "\n" for _ in range(3)))
        data = make(train_sources=[str(path)])
        return data.tokens_digest, data.fingerprint, data.train_fingerprint

    seven, eight = digest("7"), digest("8")
    assert seven == digest("7")
    assert (seven[0] != eight[0], seven[1:] == eight[1:]) == (True, True)
    assert make().tokens_digest not in (seven[0], eight[0])


def test_calibration_takes_windows_of_other_sources_in_turn(make, source, tmp_path):
    path = tmp_path / "more.jsonl"
    path.write_text("".join(json.dumps({"text": " ".join([str(4800 + n)] * 40)}) + "\n" for n in range(30)))
    alone, both = make(), make(calibration_sources=[str(path)])
    seen = both.calibration.input_ids
    assert len(seen) == len(alone.calibration) == 12
    assert torch.equal(seen[::2], alone.calibration.input_ids[:6])
    assert len(set(seen[1::2, 0].tolist())) == 6, "a document each"
    assert len(set(both.calibration.documents.tolist())) == 12, "numbered over all sources"
    assert both.fingerprint != alone.fingerprint
    for step in range(3):
        assert torch.equal(alone.batch(step), both.batch(step))


@pytest.mark.parametrize("key", ["train_sources", "calibration_sources"])
def test_a_copy_of_the_source_is_no_other_text(make, source, tmp_path, key):
    rows, more = [json.loads(line) for line in Path(source).read_text().splitlines()], tmp_path / "more.jsonl"
    (tmp_path / "copy.json").write_text(json.dumps(rows[::-1]))
    with pytest.raises(DataError, match="copy"):
        make(**{key: [str(tmp_path / "copy.json")]})
    new = [{"text": " ".join(map(str, range(4000, 4100)))}]
    more.write_text("".join(json.dumps(row) + "\n" for row in rows + new))
    data = make(**{key: [str(more)]})
    assert data.text_digests[1:] == [read_documents(write(tmp_path, new), data.tokenizer, WINDOW).digest]


def test_another_source_without_a_window_is_refused(make, tmp_path):
    path = tmp_path / "few.txt"
    path.write_text("7 7 7")
    with pytest.raises(DataError, match=r"few\.txt"):
        make(train_sources=[str(path)])


class Recorder(LightningModule):
    """Trains one number, and writes down the batch of each step."""

    def __init__(self):
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.ones(())), {}

    def training_step(self, batch, batch_idx):
        self.seen[self.global_step] = batch.tolist()
        return self.weight * batch.float().mean()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def train(data, max_steps=STEPS, ckpt_path=None):
    """{step: batch} of a run, and its trainer."""
    module = Recorder()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", max_steps=max_steps, enable_checkpointing=False, **quiet)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return module.seen, trainer


@pytest.fixture
def uninterrupted(make):
    """{step: batch} of a run of six steps."""
    seen, trainer = train(make(setup=False))
    assert trainer.current_epoch == 1
    return seen


def test_lightning_sees_the_batches_in_order_in_one_epoch(make, uninterrupted):
    data = make()
    assert uninterrupted == {step: data.batch(step).tolist() for step in range(STEPS)}
    assert [batch.tolist() for batch in data.train_dataloader()] == [*uninterrupted.values()]


@pytest.mark.parametrize("steps", [3, STEPS], ids=["after a finished run", "in the middle of an epoch"])
def test_a_resumed_run_sees_what_an_uninterrupted_one_would(make, uninterrupted, tmp_path, steps):
    first, trainer = train(make(steps=steps), max_steps=3)
    trainer.save_checkpoint(tmp_path / "3.ckpt")
    rest, _ = train(make(), ckpt_path=tmp_path / "3.ckpt")
    assert list(rest) == [3, 4, 5]
    assert {**first, **rest} == uninterrupted


def test_a_text_may_be_given_as_a_path_and_not_as_anything_else(make, source):
    assert torch.equal(make(source=Path(source)).test.input_ids, make().test.input_ids)
    with pytest.raises(DataError):
        make(source=[source])


def test_a_text_can_be_printed_before_it_is_read(make):
    assert "window=16" in str(make(setup=False))


@pytest.mark.parametrize("wrong", [{"window": 1}, {"batch_size": 0}, {"calibration_windows": -1}, {"test_windows": 0}])
def test_sizes_below_the_least_are_refused(make, wrong):
    with pytest.raises(DataError, match=next(iter(wrong))):
        make(setup=False, **wrong)


def trainer_at(step: int, **settings: int) -> SimpleNamespace:
    usual = {"global_rank": 0, "world_size": 1, "accumulate_grad_batches": 1, "num_training_batches": 10**6}
    usual["overfit_batches"] = 0.0
    return SimpleNamespace(**usual | settings, global_step=step)


@pytest.mark.parametrize(("step", "numbers"), [(0, range(5)), (1, range(2, 5)), (3, range(5, 10)), (5, range(9, 10))])
def test_an_epoch_that_is_no_multiple_of_the_accumulated_batches(make, step, numbers):
    data = make(steps=5)
    data.trainer = trainer_at(step, accumulate_grad_batches=2)
    found = list(data.train_dataloader())
    assert [each.tolist() for each in found] == [data.batch(number).tolist() for number in numbers]


def test_an_epoch_of_few_batches_to_overfit_is_always_the_same(make):
    data = make(steps=5)
    data.trainer = trainer_at(4, num_training_batches=2, overfit_batches=2)
    assert [each.tolist() for each in data.train_dataloader()] == [data.batch(number).tolist() for number in (0, 1)]


def test_devices_share_each_batch(make):
    data = make()
    whole = list(data.train_dataloader())
    shares = []
    for rank in range(2):
        data.trainer = trainer_at(0, global_rank=rank, world_size=2)
        shares.append(list(data.train_dataloader()))
    for batch, even, odd in zip(whole, *shares, strict=True):
        assert torch.equal(torch.stack([even, odd], dim=1).flatten(0, 1), batch)


def test_a_text_too_short_for_four_documents_names_a_window_that_works(make, tmp_path):
    (tmp_path / "short.txt").write_text("\n".join(["1 2 3 4 5 6 7"] * 36))
    source = str(tmp_path / "short.txt")
    with pytest.raises(DataError, match=r"short\.txt.*data\.window=31"):
        make(source=source, window=100)
    data = make(source=source, window=31)
    assert all(len(windows) for windows in (data.test, data.calibration, data.validation))
    with pytest.raises(DataError, match="300"):
        make(setup=False, source=source, window=300).prepare_data()
