"""Training, calibration, validation and test windows of a text, as a LightningDataModule."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from buddy.data.documents import Documents, read_documents
from buddy.data.windows import FEWEST_DOCUMENTS, TRAIN, WINDOWS, Windows, generator, in_turn, sample, split, spread
from buddy.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STEPS = 200  # batches in an epoch without `steps` and without a trainer


class TextData(LightningDataModule):
    """Training batches, and calibration, validation and test windows from documents outside the training split.

    A training batch is a tensor (B, W) long. A batch for validation or test is a mapping of "input_ids" (B, W),
    "window" (B,) and "document" (B,), so that results of several processes can be sorted.

    The split depends on the text, the tokenizer, the window, the seed and the three numbers of windows; never on
    the router, `steps`, `batch_size` or `train_seed`. If the text is too short, the numbers of windows shrink in
    proportion.

    Attributes:
        train_seed: of the draws of training windows; it may change between two trainings.
        calibration, validation, test: `Windows`, after `setup`.
        split: document numbers for "train", "calibration", "validation" and "test", after `setup`.
    """

    calibration: Windows

    def __init__(
        self,
        source: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        window: int = 256,
        batch_size: int = 4,
        steps: int | None = None,
        seed: int = 0,
        calibration_windows: int = 64,
        validation_windows: int = 16,
        test_windows: int = 64,
        evaluate_on: Literal["test", "validation"] = "test",
        text_field: str = "text",
        train_seed: int | None = None,
        train_sources: Sequence[str] = (),
        calibration_sources: Sequence[str] = (),
    ) -> None:
        """Describe the data; `prepare_data` and `setup` read it.

        Args:
            source: an embedded text, a file, a folder or a hub name, see `buddy.data.text.load_texts`.
            window: tokens in a window.
            batch_size: windows in a batch over all devices together.
            steps: batches in an epoch; by default all batches of the trainer's `max_steps`, or 200 without a trainer.
            evaluate_on: the windows that `evaluated` gives.
            text_field: the field of the source that holds the text.
            train_seed: of the draws of training windows; `seed` by default.
            train_sources: additional training texts; training windows come from `source` and from these in turn. All
                their documents are used for training, but for rows that `source` has, too.
            calibration_sources: additional calibration texts, in turn with `source`; the number of windows is the same.
        """
        super().__init__()
        numbers = {"window": (window, 2), "batch_size": (batch_size, 1), "test_windows": (test_windows, 1)}
        numbers |= {"calibration_windows": (calibration_windows, 1), "validation_windows": (validation_windows, 1)}
        numbers |= {} if steps is None else {"steps": (steps, 1)}
        for name, (value, least) in numbers.items():
            if value < least:
                raise DataError(f"{name} is {value}; give {least} or more.")
        self.tokenizer, self.source, self.text_field = tokenizer, source, text_field
        self.evaluate_on = evaluate_on
        self.window, self.batch_size, self.steps, self.seed = window, batch_size, steps, seed
        self.train_seed = seed if train_seed is None else train_seed
        self.train_sources, self.calibration_sources = tuple(train_sources), tuple(calibration_sources)
        self._wanted = {"test": test_windows, "calibration": calibration_windows, "validation": validation_windows}
        self._texts: list[Documents] = []  # the first is the source's

    def __str__(self) -> str:
        """Lightning's own asks for loaders, which there are only after `setup`."""
        return f"TextData({self.source!r}, window={self.window}, batch_size={self.batch_size})"

    def prepare_data(self) -> None:
        """Tokenise the texts once, in one process; the cache of `datasets` stores the tokens."""
        if not self._texts:
            own = self._read(self.source)
            for source in (*self.train_sources, *self.calibration_sources):
                self._read(source, own)

    def setup(self, stage: str | None = None) -> None:
        """Read the tokenised text and split it, once.

        Raises:
            DataError: the text cannot be read, or gives fewer than four documents of a window or more.
        """
        if self._texts:
            return
        documents = self._read(self.source)
        self.split = split(documents, self._wanted, self.window, self.seed)
        random = generator(self.seed, WINDOWS)
        for name, count in self._wanted.items():
            setattr(self, name, spread(documents, self.split[name], self.window, count, random))
        others = [self._read(source, documents) for source in self.train_sources]
        self._pools = [Pool(documents, self.split["train"]), *(Pool(each, np.arange(len(each))) for each in others)]
        calibrated = [self._read(source, documents) for source in self.calibration_sources]
        share = -(-self._wanted["calibration"] // (1 + len(calibrated)))
        more = [sample(each, self.window, share, self.seed) for each in calibrated]
        self.calibration = in_turn([self.calibration, *more], len(self.calibration))
        self._texts = [documents, *others, *calibrated]

    @property
    def evaluated(self) -> Windows:
        """The windows that results are for: test windows, or validation windows where settings are being chosen."""
        return self.validation if self.evaluate_on == "validation" else self.test

    @property
    def shortfall(self) -> dict[str, tuple[int, int]]:
        """The windows of each part that has fewer than were asked for, and how many were."""
        counts = {name: (len(getattr(self, name)), wanted) for name, wanted in self._wanted.items()}
        return {name: (found, wanted) for name, (found, wanted) in counts.items() if found < wanted}

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of the windows, the split, and the lengths of all documents."""
        digest = hashlib.sha256(self._texts[0].lengths.tobytes())
        for name in ("train", *self._wanted):
            digest.update(np.asarray(self.split[name]).tobytes())
        for name in self._wanted:
            digest.update(getattr(self, name).fingerprint.encode())
        return digest.hexdigest()[:16]

    @property
    def train_fingerprint(self) -> str | None:
        """16 hexadecimal digits of the lengths of all documents of `train_sources`; None without any."""
        if not self.train_sources:
            return None
        lengths = b"".join(pool.documents.lengths.tobytes() + b"|" for pool in self._pools[1:])
        return hashlib.sha256(lengths).hexdigest()[:16]

    @property
    def tokens_digest(self) -> str:
        """16 hexadecimal digits of all tokens of `source` and of `train_sources`."""
        return hashlib.sha256("".join(pool.documents.digest for pool in self._pools).encode()).hexdigest()[:16]

    @property
    def text_digests(self) -> list[str]:
        """16 hexadecimal digits of all tokens of each text: the source, those to train on and those to calibrate on."""
        return list(dict.fromkeys(each.digest for each in self._texts))

    def train_dataloader(self) -> Batches:
        """The remaining batches of the epoch.

        Raises:
            DataError: the devices cannot share a batch equally.
        """
        self.check_shares(self.trainer.world_size if self.trainer else 1)
        return Batches(self)

    def val_dataloader(self) -> WindowBatches:
        """The validation windows."""
        return WindowBatches(self.validation, self.batch_size)

    def test_dataloader(self) -> WindowBatches:
        """The test windows."""
        return WindowBatches(self.test, self.batch_size)

    @property
    def epoch(self) -> int:
        """Batches in an epoch."""
        if self.steps is not None:
            return self.steps
        taken = self.trainer.max_steps * self.trainer.accumulate_grad_batches if self.trainer else 0
        return taken if taken > 0 else STEPS

    def check_shares(self, devices: int) -> None:
        """Raises DataError if so many devices cannot share a batch equally."""
        if self.batch_size % devices:
            raise DataError(
                f"{devices} devices cannot share a batch of {self.batch_size} windows equally; set data.batch_size to "
                f"a multiple of {devices}."
            )

    def batch(self, step: int) -> Tensor:
        """(batch_size, W) long, the windows of a step; they depend only on the split, `train_seed` and the step.

        Windows come from the sources in turn. Documents are drawn in proportion to their lengths, and a window may
        begin at any token of its document.
        """
        random = generator(self.train_seed, TRAIN, step)
        first = step * self.batch_size
        pools = [self._pools[(first + row) % len(self._pools)] for row in range(self.batch_size)]
        return torch.from_numpy(np.stack([pool.draw(self.window, random) for pool in pools]))

    def _read(self, source: str, own: Documents | None = None) -> Documents:
        """The documents of a text; of an additional one without the rows of `own`, the source's, which are split."""
        fewest = FEWEST_DOCUMENTS if own is None else 1
        return read_documents(source, self.tokenizer, self.window, self.text_field, fewest=fewest, other=own)


class Pool:
    """Draws training windows from some documents of one source.

    Args:
        documents: all documents of the source.
        chosen: indices of the documents to draw from.
    """

    def __init__(self, documents: Documents, chosen: np.ndarray) -> None:
        self.documents, self._chosen = documents, chosen
        self._ends = documents.lengths[chosen].cumsum()

    def draw(self, window: int, random: np.random.Generator) -> np.ndarray:
        """(window,) int64."""
        document = self._chosen[np.searchsorted(self._ends, random.integers(self._ends[-1]), side="right")]
        start = random.integers(self.documents.lengths[document] - window, endpoint=True)
        return self.documents.window(document, start, window)


class WindowBatches:
    """Batches of validation or test windows; each process iterates over its share of them.

    Batches are never split, so that no result depends on the number of processes. All processes run equally many, since
    sharded weights need all processes in each forward; batches added for this have the window number −1.

    Args:
        windows: in order.
        batch_size: windows in a batch.
    """

    def __init__(self, windows: Windows, batch_size: int) -> None:
        self._windows, self._batches = windows, torch.arange(len(windows)).split(batch_size)

    def __len__(self) -> int:
        return -(-len(self._batches) // _share()[1])

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        rank, processes = _share()
        for number in range(rank, len(self) * processes, processes):
            rows = self._batches[number % len(self._batches)]
            window = rows if number < len(self._batches) else torch.full_like(rows, -1)
            ids, document = self._windows.input_ids[rows], self._windows.documents[rows]
            yield {"input_ids": ids, "window": window, "document": document}


class Batches:
    """The batches from the trainer's step to the end of the epoch.

    This is no torch `DataLoader`, since a batch takes only a few reads from a mapped file.
    """

    def __init__(self, data: TextData) -> None:
        self._data = data

    def __len__(self) -> int:
        return self._data.epoch

    def __iter__(self) -> Iterator[Tensor]:
        """(batch_size / devices, W) long for each step; each device takes every devices-th window of the batch."""
        trainer = self._data.trainer
        rank, devices = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        # Of an epoch Lightning takes so many batches, in whole steps and a last one that may have fewer.
        each = trainer.accumulate_grad_batches if trainer else 1
        length = int(min(len(self), trainer.num_training_batches)) if trainer else len(self)
        epoch, steps = divmod(trainer.global_step if trainer else 0, -(-length // each))
        first = 0 if trainer and trainer.overfit_batches else epoch * length  # the same batches in every epoch
        for number in range(first + steps * each, first + length):
            yield self._data.batch(number)[rank::devices]

    # These two make the loader resumable for Lightning. The trainer's step is the only state, so that an interrupted
    # step is repeated and not skipped.
    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


def _share() -> tuple[int, int]:
    """Rank of this process and number of processes, also under a `Trainer` of the user's own."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1
