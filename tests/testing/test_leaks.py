"""Wherever one token's answer hangs on another's context, a check notices, and only the one that it is for."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from buddy import Router
from buddy.testing import Subject, answers, tiny_backbone
from buddy.testing.check import Failed
from buddy.testing.subject import LENGTH, ROWS

TOKENS = st.tuples(st.integers(0, ROWS - 1), st.integers(0, LENGTH - 1))


class Leaks(Router):
    """Learned: reads its token, and for one token of a window another one too."""

    kind = "learned"
    reader, source = (0, 0), (0, 0)

    def score(self, context):
        scores = context.hidden[..., : self.geometry.routable]
        if scores.dim() < 3 or scores.shape[:2] != (ROWS, LENGTH):
            return scores
        scores = scores.clone()
        scores[self.reader] += 0.3 * context.hidden[self.source][: self.geometry.routable].flip(0)
        return scores


@pytest.fixture(scope="module")
def subject():
    return Subject(Leaks, backbone=tiny_backbone())


@settings(max_examples=60, deadline=None)
@given(reader=TOKENS, source=TOKENS)
def test_every_leak_is_noticed(subject, reader, source):
    Leaks.reader, Leaks.source = reader, source
    found = set()
    for check in (answers.causal, answers.rows, answers.alone):
        try:
            check.function(subject)
        except Failed:
            found.add(check.name)
    assert ("causal" in found) == (source[1] > reader[1])
    assert ("rows" in found) == (source[0] != reader[0])
