"""The benchmark's two ways of a greedy search, on a tiny model."""

from studies.calibration_benchmark import Clock, search, show
from tests.calibration.small import WINDOWS, probe, routed


def test_both_ways_take_the_same_layers_and_are_timed(capsys):
    clocks = Clock(), Clock()
    rounds = list(search(probe(routed(sinks=0)), WINDOWS.split(2), 3, clocks))
    assert [each.naive for each in rounds] == [each.shared for each in rounds]
    assert len({each.naive for each in rounds}) == 3
    assert max(each.apart for each in rounds) < 1e-6
    assert all(len(times) == 3 and min(times) > 0 for clock in clocks for times in (clock.wall, clock.processor))
    show(rounds, clocks, "a tiny model")
    assert f"{sum(clocks[0].wall) / sum(clocks[1].wall):.2f}" in capsys.readouterr().out


def test_with_sinks_the_two_ways_differ():
    clocks = Clock(), Clock()
    (first,) = search(probe(routed(sinks=2)), WINDOWS.split(2), 1, clocks)
    assert first.apart > 1e-3
