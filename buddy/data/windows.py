"""Documents → windows of one length, and documents → train, calibration, validation and test."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from buddy.data.documents import Documents

FEWEST_DOCUMENTS = 4  # one for each split
SPREAD = 1 / 3  # share of documents outside "train", with one window per document
SPLIT, WINDOWS, TRAIN = 1, 2, 3  # independent streams of random numbers from one seed
MAX_HELD_OUT = 1 / 2  # largest share of documents outside "train", to reach the wanted number of windows


@dataclass(frozen=True, eq=False)
class Windows:
    """Windows of text.

    Attributes:
        input_ids: (N, W) long.
        documents: (N,) long, the index of each window's document.
    """

    input_ids: Tensor
    documents: Tensor

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, rows: slice | Tensor) -> Windows:
        return Windows(self.input_ids[rows], self.documents[rows])

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of the tokens and the documents' indices."""
        digest = hashlib.sha256(repr(tuple(self.input_ids.shape)).encode())
        for part in (self.input_ids, self.documents):
            digest.update(part.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


def sample(documents: Documents, window: int, count: int, seed: int) -> Windows:
    """Up to `count` windows of all documents, from as many of them as possible; equal seeds give equal windows."""
    order = generator(seed, SPLIT).permutation(len(documents))
    return spread(documents, order, window, count, generator(seed, WINDOWS))


def split(documents: Documents, wanted: Mapping[str, int], window: int, seed: int) -> dict[str, np.ndarray]:
    """Disjoint sets of documents for each name in `wanted`; "train" gets the remaining documents.

    Each part gets one document per window while all parts together stay below a third of the documents, or below half
    of them if there are too few windows. If even half is too few, the parts share it in proportion.

    Args:
        wanted: windows of each part.

    Returns:
        (documents,) int64 for each part, in the order in which windows are to be taken from them.
    """
    order = generator(seed, SPLIT).permutation(len(documents))
    windows, total = documents.lengths[order] // window, max(1, sum(wanted.values()))
    parts, start = {}, 0
    for name, count in wanted.items():
        share = len(documents) * count / total
        least, most = int(min(count, max(1, share * SPREAD))), int(min(count, max(1, share * MAX_HELD_OUT)))
        reached = start + 1 + np.searchsorted(windows[start:].cumsum(), count)  # the end if windows alone decided
        end = int(np.clip(reached, start + least, start + most))
        parts[name], start = order[start:end], end
    return {"train": order[start:], **parts}


def spread(
    documents: Documents, chosen: Sequence[int] | np.ndarray, window: int, count: int, random: np.random.Generator
) -> Windows:
    """Up to `count` windows that do not overlap, from the chosen documents in turn.

    Each document gives its first window before any gives its second. The order within a document is random, so that not
    only beginnings are used.
    """
    turns = []
    for position, document in enumerate(chosen[:count]):
        starts = random.permutation(documents.lengths[document] // window)[:count] * window
        turns += [(turn, position, int(document), int(start)) for turn, start in enumerate(starts)]
    taken = sorted(turns)[:count]
    rows = [documents.window(document, start, window) for _, _, document, start in taken]
    ids = np.stack(rows) if rows else np.zeros((0, window), dtype=np.int64)
    return Windows(torch.from_numpy(ids), torch.tensor([document for _, _, document, _ in taken], dtype=torch.long))


def in_turn(texts: Sequence[Windows], count: int) -> Windows:
    """Up to `count` windows of several texts in turn; the indices of documents run over all texts."""
    order = sorted((row, text) for text, windows in enumerate(texts) for row in range(len(windows)))[:count]
    before = np.cumsum([0, *(max(windows.documents.tolist(), default=-1) + 1 for windows in texts)])
    ids = torch.stack([texts[text].input_ids[row] for row, text in order])
    documents = torch.stack([texts[text].documents[row] + int(before[text]) for row, text in order])
    return Windows(ids, documents)


def generator(seed: int, stream: int, step: int = 0) -> np.random.Generator:
    """A generator that depends only on the arguments."""
    return np.random.default_rng((seed, stream, step))
