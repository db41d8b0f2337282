"""Figures and lines of signs: what is shown is what ran."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch

from buddy import Geometry
from buddy.data.windows import Windows
from buddy.evaluation.figures import figure_at
from buddy.inspection import figures
from buddy.inspection.figures import LABELLED, draw_shares, draw_tokens
from buddy.inspection.inspect import token_labels, token_lines
from buddy.inspection.routing import ALWAYS, CHOSEN, SINK, SKIPPED, Inspection, TextWindows
from tests.tiny import tiny_tokenizer


@pytest.fixture
def seen(monkeypatch):
    """The axes of the figure that was drawn last, while its file is written."""
    found = []

    @contextmanager
    def look(path, **options):
        with figure_at(path, **options) as axes:
            yield axes
            found[:] = np.ravel(axes)

    monkeypatch.setattr(figures, "figure_at", look)
    return found


def inspection(runs, words, context_layer=1) -> Inspection:
    """One window that ran at K = 4, of which the first token is a sink."""
    tokens, layers = runs.shape
    ids = Windows(torch.zeros(1, tokens, dtype=torch.long), torch.zeros(1, dtype=torch.long))
    sizes = Geometry(layers=layers, context_layer=context_layer, hidden=8, features=4)
    return Inspection(
        "$x^$", sizes, 1, 1, {"0.5": 4}, [TextWindows("5_%", None, ids, 1)], {("5_%", 4): runs[None]}, words
    )


@pytest.mark.parametrize(("tokens", "layers"), [(2, 6), (70, 15)])
def test_tokens_are_drawn_as_they_ran(tmp_path, seen, tokens, layers):
    runs = np.random.default_rng(0).random((tokens, layers)) < 0.6
    runs[:, [0, -1]] = runs[:1] = True
    words = ["$x^$", "中文", *["a"] * tokens][:tokens]
    draw_tokens(tmp_path / "t.png", inspection(runs, words), "0.5")
    assert (tmp_path / "t.png").is_file()
    grids = [np.asarray(axes.collections[0].get_array()).reshape(layers, -1) for axes in seen[1:]]
    assert [grid.shape[1] for grid in grids] == ([LABELLED, tokens] if tokens > LABELLED else [tokens])
    for grid in grids:
        for layer, token in np.ndindex(grid.shape):
            ran = ALWAYS if layer in (0, layers - 1) else CHOSEN
            assert grid[layer, token] == (SINK if token == 0 else ran if runs[token, layer] else SKIPPED)
    labels = [label.get_text() for label in seen[1].get_xticklabels()]
    assert labels[:2] == ["$x^$", "□□"], "no formula, and a box for a character that the font lacks"


@pytest.mark.parametrize("layers", [12, 126])
def test_shares_are_drawn_with_their_numbers(tmp_path, seen, layers):
    shares = np.random.default_rng(0).random((2, layers))
    columns = dict(zip(["an encyclopaedia", "$a$"], shares, strict=True))
    draw_shares(tmp_path / "s.png", columns, title="buddy\nbudget 0.5", label="text")
    assert np.array_equal(seen[0].images[0].get_array(), shares.T)
    written = {text.get_position(): text.get_text() for text in seen[0].texts}
    expected = {(i, j): f"{100 * shares[i, j]:.0f}" for i, j in np.ndindex(shares.shape)}
    assert written == (expected if layers == 12 else {})


def test_a_line_for_each_token():
    runs = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 1, 1], [1, 1, 1, 0, 1, 1], [1, 1, 0, 0, 0, 1]], dtype=bool)
    lines = [line.plain for line in token_lines(inspection(runs, ["The", "中", "of", "$x$"], context_layer=2), 4)]
    signs = ["0    5", "██████  sink", "▒▒█·█▒", "▒▒█·█▒", "▒▒···▒  2 changed"]
    assert lines == [f"{label}  {line}" for label, line in zip(["   ", "The", "中 ", "of ", "$x$"], signs, strict=True)]


def test_every_token_has_a_visible_label():
    tokenizer = tiny_tokenizer()
    assert token_labels(tokenizer, tokenizer("a b\n\x07é").input_ids) == ["a", "␣", "b", "↵", "\\7", "�", "�"]
    assert token_labels(tokenizer, [2]) == ["<eos>"]
