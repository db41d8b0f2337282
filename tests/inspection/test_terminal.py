"""Lines of signs: what a person reads in a terminal."""

import numpy as np
import pytest

from buddy.inspection.inspect import LONGEST, labels_of, legend, share_line, token_lines
from tests.tiny import tiny_tokenizer


def test_a_line_for_each_token():
    runs = np.array([[1, 1, 1, 1, 1, 1], [1, 0, 1, 0, 1, 1], [1, 0, 1, 0, 1, 1], [1, 1, 0, 0, 1, 1]], dtype=bool)
    lines = [line.plain for line in token_lines(runs, ["The", "中", "of", "$x$"], sinks=1, always=(2, 1))]
    assert lines == [
        "     0    5",
        "The  ▒▒███▒  sink",
        "中   ▒·█·█▒",
        "of   ▒·█·█▒",
        "$x$  ▒▒··█▒  2 changed",
    ]


def test_the_ruler_numbers_every_fifth_layer():
    head = next(iter(token_lines(np.ones((1, 30), dtype=bool), ["a"], sinks=0, always=(1, 1)))).plain
    for layer in range(0, 30, 5):
        assert head[3 + layer :].startswith(str(layer))


def test_the_legend_names_the_signs():
    assert legend(30) == "Layers 0 to 29 from left to right: █ ran, chosen  ▒ always runs  · skipped"


def test_a_share_is_as_high_as_it_is_large():
    assert share_line([0, 0.001, 0.13, 0.5, 0.87, 0.88, 1]).plain == "·▁▂▅▇██"


@pytest.mark.parametrize(("text", "labels"), [("a b", ["a", "␣", "b"]), ("\n\t$", ["↵", "⇥", "$"]), ("\x07", ["\\7"])])
def test_every_token_has_a_label_that_can_be_seen(text, labels):
    tokenizer = tiny_tokenizer()
    assert labels_of(tokenizer, tokenizer(text).input_ids) == labels


def test_labels_of_half_signs_specials_and_long_tokens():
    tokenizer = tiny_tokenizer()
    assert labels_of(tokenizer, tokenizer("é").input_ids) == ["�", "�"]
    assert labels_of(tokenizer, [2]) == ["<eos>"]

    class Long:
        def decode(self, ids):
            return " " + "government" * 3

    (label,) = labels_of(Long(), [7])
    assert label == "governmentgov…"
    assert len(label) == LONGEST
