import pytest

from buddy.scoring.statistics import flipped


def test_an_answer_that_turns_either_way_is_a_flip():
    assert flipped([1, 1, 0, 0], [1, 0, 1, 0]) == [0, 1, 1, 0]


def test_other_items_cannot_be_compared():
    with pytest.raises(ValueError, match="shorter"):
        flipped([1, 0], [1])
