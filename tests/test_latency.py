"""What a token takes: measured once, kept, read again, and what happens where that cannot be."""

from itertools import combinations, pairwise
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock, Timeout
from hypothesis import given
from hypothesis import strategies as st

from buddy import latency
from buddy.engine.model import RoutedLM, geometry_of
from buddy.errors import BudgetError
from buddy.latency import LatencyTable, interpolated, measure_latencies, points_of, timing_setting
from buddy.metrics.timing import StepMeans
from tests.adapted import adapted
from tests.engine.reference import Fickle, routed_tiny
from tests.tiny import tiny_backbone


@pytest.fixture(scope="module")
def routed():
    return routed_tiny()


@pytest.fixture
def timed(monkeypatch):
    """Stands in for the clock: 1 ms per layer and 2 ms besides; the rounds of each measurement."""

    class Calls(list):
        offset = 2.0

    calls = Calls()

    def stand_in(routed, rounds, track, texts):
        calls.append(rounds)
        return {count: calls.offset + count for count in points_of(routed)}

    monkeypatch.setattr(latency, "measure_latencies", stand_in)
    return calls


def test_every_count_is_timed_in_every_round(routed, monkeypatch):
    asked = []

    class Timed(latency.BenchmarkCase):
        def step(self, ids, cache):
            assert ids.shape == (1, 1)
            assert routed.settings.mean_over == 1
            asked.append((self.layers, cache.get_seq_length()))
            super().step(ids, cache)
            return float(self.layers + (len(asked) - 1) // 20)

    monkeypatch.setattr(latency, "BenchmarkCase", Timed)
    monkeypatch.setattr(latency, "STEPS", 4)
    with routed.changed(mean_over=8):  # exactly K layers are timed all the same
        found = measure_latencies(routed, rounds=2)
    turns = [sorted(asked[first : first + 5]) for first in range(0, len(asked), 5)]
    assert turns == 3 * [[(layers, at) for layers in (2, 3, 4, 5, 6)] for at in range(64, 68)]  # token by token
    assert found == {k: k + 1.5 for k in (2, 3, 4, 5, 6)}  # the first round is not counted


@given(st.dictionaries(st.integers(2, 40), st.floats(0.1, 100), min_size=1))
def test_between_points_lies_a_line_that_never_falls(points):
    table = interpolated(points)
    counts = sorted(points)
    assert list(table) == list(range(counts[0], counts[-1] + 1))
    values = list(table.values())
    assert all(one <= other + 1e-9 for one, other in pairwise(values))
    assert table[counts[0]] == pytest.approx(points[counts[0]])
    assert max(values) == pytest.approx(max(points.values()))


def test_measured_on_first_use_read_by_the_next_process_and_remeasured_on_demand(routed, timed, tmp_path):
    table = LatencyTable(tmp_path)
    assert table(routed) == LatencyTable(tmp_path)(routed) == {2: 4.0, 3: 5.0, 4: 6.0, 5: 7.0, 6: 8.0}
    assert len(timed) == 1
    timed.offset = 3.0
    assert table.remeasure(routed, 3) == {2: 5.0, 3: 6.0, 4: 7.0, 5: 8.0, 6: 9.0}
    assert table(routed)[4] == LatencyTable(tmp_path)(routed)[4] == 7.0
    assert LatencyTable(None)(routed)[6] == 9.0
    assert timed == [5, 3, 5], "without a folder nothing is stored"


@pytest.mark.parametrize("text", ["", '{"setting": {}, "milliseconds": {"2": 1}}'])
def test_a_damaged_table_is_measured_again(routed, timed, tmp_path, text):
    LatencyTable(tmp_path)(routed)
    (path,) = tmp_path.glob("*.txt")
    path.write_text(text)
    for _ in range(2):
        assert LatencyTable(tmp_path)(routed)[6] == 8.0
    assert len(timed) == 2
    assert LatencyTable(path)(routed)[6] == 8.0, "a folder that cannot be used costs time only"


def test_two_models_are_not_measured_at_once(routed, tmp_path, monkeypatch):
    other = FileLock(tmp_path / latency.LOCK)

    def stand_in(*_):
        with pytest.raises(Timeout):
            other.acquire(timeout=0)
        return {2: 1.0, 6: 5.0}

    monkeypatch.setattr(latency, "measure_latencies", stand_in)
    LatencyTable(tmp_path)(routed)
    with routed.changed(reroute_every=4):
        LatencyTable(tmp_path)(routed)
    with other:  # whoever has a table waits for nobody
        assert LatencyTable(tmp_path)(routed)[6] == 5.0


def test_a_batch_has_a_table_of_its_own(routed, tmp_path, monkeypatch):
    rows = []

    def stand_in(field, ids, *_):
        rows.append(ids)
        return [StepMeans(len(ids) * each.layers, each.layers) for each in field]

    monkeypatch.setattr(latency, "decode_interleaved", stand_in)
    table = LatencyTable(tmp_path)
    assert table(routed)[4] == 4.0
    assert table(routed, 3)[4] == LatencyTable(tmp_path)(routed, 3)[4] == 12.0
    assert {len(ids) for ids in rows} == {1, 3}
    assert len({tuple(row) for row in rows[-1].tolist()}) == 3, "rows differ, so that their plans do"


def test_another_setting_has_another_table(routed, monkeypatch):
    settings = [timing_setting(routed)]
    with routed.changed(reroute_every=4):
        settings.append(timing_setting(routed))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 7)
        settings.append(timing_setting(routed))
    for change in ("dtype", "router", "backbone"):
        backbone = tiny_backbone("llama", seed=int(change == "backbone"))
        other = RoutedLM(backbone, Fickle(geometry_of(backbone)))
        if change == "dtype":
            backbone.model.bfloat16()
        if change == "router":
            other.router.weight = torch.nn.Parameter(torch.zeros(3))
        settings.append(timing_setting(other))
    assert all(one != other for one, other in combinations(settings, 2))


def test_an_adapter_beside_the_weights_has_the_table_of_the_merged_model(monkeypatch):
    routed = adapted()
    beside, seen = timing_setting(routed), []
    monkeypatch.setattr(
        latency, "decode_interleaved", lambda field, *_: seen.append(routed.adapter._is_off) or [StepMeans(1.0, 4)] * 5
    )
    measure_latencies(routed, rounds=1)
    assert seen == [True, True]
    routed.merge()
    assert timing_setting(routed) == beside


def test_a_model_resolves_latencies_by_its_table(routed, timed):
    routed.table = LatencyTable(None)
    try:
        assert [routed.executed_layers(budget) for budget in ("4ms", "6.9 ms", "8ms", "1000ms")] == [2, 4, 6, 6]
        with pytest.raises(BudgetError, match=r"4\.00"):
            routed.executed_layers("3.9ms")
        with routed.at("5ms") as record, torch.no_grad():
            routed.backbone.model(torch.randint(3, 259, (1, 9)))
        assert record.executed[0][0, 1:].tolist() == [3] * 8
    finally:
        routed.table = None


def test_a_router_of_full_depth_has_one_point(routed):
    full = SimpleNamespace(geometry=routed.geometry, router=SimpleNamespace(full_depth=True))
    assert points_of(full) == [6]
