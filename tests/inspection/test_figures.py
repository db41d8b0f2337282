"""Pictures: what is drawn is what ran, and no label lies on another."""

from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image

from buddy.evaluation.figures import figure_at
from buddy.inspection import figures
from buddy.inspection.figures import ALWAYS, CHOSEN, KINDS, LABELLED, SINK, SKIPPED, draw_shares, draw_tokens

ALWAYS_ON = (1, 1)


@pytest.fixture
def drawn(monkeypatch):
    """The axes of each figure after it was drawn, looked at while it is open by the functions in this list."""
    looks = []

    @contextmanager
    def looked_at(path, **options):
        with figure_at(path, **options) as axes:
            yield axes
            figure = np.ravel(axes)[0].figure
            figure.canvas.draw()
            for look in looks:
                look(figure)

    monkeypatch.setattr(figures, "figure_at", looked_at)
    return looks


def no_overlap(figure):
    """Tick labels of an axis lie beside each other, and all of them inside the picture."""
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            labels = [label for label in axis.get_ticklabels() if label.get_text() and label.get_visible()]
            boxes = [label.get_window_extent() for label in labels]
            low, high = axis.get_view_interval()
            boxes = [b for b, place in zip(boxes, axis.get_ticklocs(), strict=False) if low <= place <= high]
            for number, box in enumerate(boxes):
                assert figure.bbox.padded(1).contains(box.x0, box.y0), "a label is cut"
                assert figure.bbox.padded(1).contains(box.x1, box.y1), "a label is cut"
                if labels[0].get_rotation() in (0, 90):
                    assert not any(box.overlaps(other) for other in boxes[number + 1 :])


def planted(tokens: int, layers: int = 30, sinks: int = 1, seed: int = 0) -> np.ndarray:
    runs = np.random.default_rng(seed).random((tokens, layers)) < 0.6
    runs[:, [0, -1]] = True
    runs[:sinks] = True
    return runs


def cells(axes) -> np.ndarray:
    (mesh,) = axes.collections
    return np.asarray(mesh.get_array()).reshape(len(axes.get_yticks()) and mesh.get_coordinates().shape[0] - 1, -1)


@pytest.mark.parametrize(("tokens", "layers"), [(1, 6), (20, 15), (60, 30), (200, 48), (70, 126)])
def test_tokens_are_drawn_as_they_ran(tmp_path, drawn, tokens, layers):
    runs = planted(tokens, layers)
    grids = []
    drawn += [no_overlap, lambda figure: grids.extend(cells(axes) for axes in figure.axes[1:])]
    words = [f"government{token:4d}" for token in range(tokens)]
    draw_tokens(tmp_path / "tokens.png", runs, words, sinks=1, always=ALWAYS_ON, title="buddy on text")
    assert [grid.shape for grid in grids] == [(layers, min(tokens, LABELLED)), (layers, tokens)][: len(grids)]
    assert len(grids) == (2 if tokens > LABELLED else 1)
    for grid in grids:
        for layer, token in np.ndindex(grid.shape):
            always = ALWAYS if layer in (0, layers - 1) else CHOSEN
            assert grid[layer, token] == (SINK if token == 0 else always if runs[token, layer] else SKIPPED)
    assert (tmp_path / "tokens.png").stat().st_size < 300_000


def test_the_picture_has_all_colours(tmp_path):
    draw_tokens(tmp_path / "t.png", planted(30), ["a"] * 30, sinks=1, always=ALWAYS_ON, title="t")
    image = Image.open(tmp_path / "t.png").convert("RGB")
    colours = {colour for _, colour in image.getcolors(maxcolors=1_000_000)}
    assert {tuple(bytes.fromhex(colour[1:])) for colour, _ in KINDS.values()} <= colours


def test_colours_differ_in_grey_too():
    """By relative luminance (WCAG 2), so that a grey print and any kind of colour vision keep them apart."""

    def luminance(colour: str) -> float:
        parts = [part / 255 for part in bytes.fromhex(colour[1:])]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return float(np.dot([0.2126, 0.7152, 0.0722], linear))

    greys = {kind: luminance(colour) for kind, (colour, _) in KINDS.items()}
    assert greys[CHOSEN] + 0.1 < greys[ALWAYS] < greys[SKIPPED] - 0.3
    assert greys[CHOSEN] + 0.1 < greys[SINK] < greys[SKIPPED] - 0.3


def test_signs_that_have_a_meaning_elsewhere_are_drawn(tmp_path, drawn):
    """A dollar is no formula, and a sign that the font lacks is a box and no warning."""
    found = []
    drawn.append(lambda figure: found.extend(label.get_text() for label in figure.axes[1].get_xticklabels()))
    words = ["$x^$", "_{", "中文", "🙂a", "ïve", "\\frac"]
    draw_tokens(tmp_path / "t.png", planted(6), words, sinks=0, always=ALWAYS_ON, title="$x^$ on 5_%")
    assert found == ["$x^$", "_{", "□□", "□a", "ïve", "\\frac"]


@pytest.mark.parametrize(
    "names", [["1\n(30)", "0.875\n(26)", "0.5\n(15)"], ["sotu"], ["an encyclopaedia", "$a$", "c" * 40]]
)
def test_shares_are_drawn_with_their_numbers(tmp_path, drawn, names):
    shares = np.random.default_rng(0).random((len(names), 12))
    found = []
    drawn += [no_overlap, lambda figure: found.append((figure.axes[0].images[0].get_array(), figure.axes[0].texts))]
    draw_shares(tmp_path / "s.png", dict(zip(names, shares, strict=True)), title="buddy\nbudget 0.5", label="text")
    ((array, texts),) = found
    assert np.array_equal(array, shares.T)
    written = {text.get_position(): text.get_text() for text in texts}
    assert written == {(i, j): f"{100 * shares[i, j]:.0f}" for i, j in np.ndindex(shares.shape)}


def test_a_deep_model_has_no_numbers_and_no_overlap(tmp_path, drawn):
    found = []
    drawn += [no_overlap, lambda figure: found.extend(figure.axes[0].texts)]
    draw_shares(tmp_path / "s.png", {"a": [0.5] * 126}, title="t", label="text")
    assert not found
