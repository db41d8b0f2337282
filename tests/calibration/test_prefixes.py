"""Which beginnings of plans are kept."""

from hypothesis import given
from hypothesis import strategies as st

from buddy.calibration.measures import MOST, room_for, worth_keeping
from tests.calibration.small import WINDOWS

PLANS = st.lists(st.text("01", min_size=8, max_size=8), min_size=1, max_size=12)


@given(plans=PLANS, room=st.integers(0, 100))
def test_they_fit_into_the_room_and_begin_the_plans(plans, room):
    kept = worth_keeping(plans, 8, room)
    assert len(kept) <= room
    assert all(any(plan.startswith(start) for plan in plans) and 1 <= len(start) < 8 for start in kept)


@given(plans=PLANS, room=st.integers(1, 100))
def test_no_denser_layers_would_fit(plans, room):
    kept = worth_keeping(plans, 8, room)
    ends = {len(start) for start in kept}
    assert kept == {plan[:end] for plan in plans for end in ends}
    if len(ends) < 7:
        ends = {round(8 * place / (len(ends) + 2)) for place in range(1, len(ends) + 2)}
        assert len({plan[:end] for plan in plans for end in ends}) > room


def test_with_room_for_all_every_layer_is_kept():
    assert worth_keeping(["1111", "1011"], 4, 9) == {"1", "11", "111", "10", "101"}
    assert worth_keeping(["1111", "1011"], 4, 0) == set()


def test_the_room_is_bounded_and_shared_by_the_batches():
    size, device = 1 << 20, WINDOWS.device
    assert 0 < room_for(size, device, 1) <= MOST >> 20
    assert room_for(size, device, 4) == room_for(size, device, 1) // 4
    assert room_for(MOST + 1, device, 1) == 0
