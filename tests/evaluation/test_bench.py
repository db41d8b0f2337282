"""`buddy bench` on a tiny finished run: what it times, what it writes, what it refuses."""

import json
import shutil

import pytest
import torch
from PIL import Image

from buddy.builders.model import build_backbone
from buddy.compare import fit
from buddy.evaluation.bench import bench_run, measured
from buddy.metrics.timing import PROMPT, STEPS, BenchmarkCase, benchmark_cases, cache_bytes, time_interleaved
from buddy.run import read_run
from buddy.run_files import load_router, save_router, update_checksums
from tests.engine.reference import routed_tiny
from tests.small import rewrite
from tests.tiny import tiny_backbone

pytestmark = pytest.mark.slow

IDS = torch.randint(3, 259, (2, 100), generator=torch.Generator().manual_seed(0))
PROMPTS = {"short": IDS[:1, :8], "longer": IDS[:1, :40]}


@pytest.fixture
def quick(monkeypatch):
    """Few tokens are timed, and in a comparison one round."""
    for module in ("evaluation.bench", "evaluation.bench_serve", "metrics.timing", "latency"):
        monkeypatch.setattr(f"buddy.{module}.STEPS", 4)
    for module in ("evaluation.bench", "metrics.timing"):
        monkeypatch.setattr(f"buddy.{module}.PROMPT", 16)
    monkeypatch.setattr("buddy.evaluation.bench.ROUNDS", 1)


@pytest.mark.usefixtures("quick")
def test_every_case_runs_in_every_round():
    routed = routed_tiny()
    field = benchmark_cases(routed, [4, 3], IDS)
    below = [(name, layers) for layers in (4, 3) for name in ("routed", "shared", "pruned")]
    assert [(each.name, each.layers) for each in field] == [("dense", 6), ("full", 6), *below]
    timings = time_interleaved(field, PROMPTS, {"one": IDS[:1, :20], "two": IDS[:, :20], "late": IDS[:1]}, rounds=2)
    for (name, _), timing in timings.items():
        assert all(len(values) == 2 for values in timing.rounds.values())
        assert set(timing.rounds) == {*PROMPTS, *([] if name == "shared" else ["one", "two", "late"])}
        assert all(ms > 0 for values in timing.rounds.values() for ms in values)
    assert (
        timings["pruned", 3].flops["total"] < timings["pruned", 4].flops["total"] < timings["dense", 6].flops["total"]
    )
    assert timings["full", 6].flops == timings["dense", 6].flops
    assert timings["pruned", 3].cache_bytes == timings["dense", 6].cache_bytes // 2


def test_cases_take_turns_token_by_token(monkeypatch):
    field, order, step = benchmark_cases(routed_tiny(), [3], IDS), [], BenchmarkCase.step

    def noted(self, ids, cache):
        order.append((self.name, cache.get_seq_length()))
        return step(self, ids, cache)

    monkeypatch.setattr(BenchmarkCase, "step", noted)
    time_interleaved(field, PROMPTS, {"decode": IDS[:1, : PROMPT + STEPS]}, rounds=1)
    turns = [order[first : first + 4] for first in range(0, len(order), 4)]
    assert [sorted(turn) for turn in turns] == 2 * [
        [(name, at) for name in ("dense", "full", "pruned", "routed")] for at in range(PROMPT, PROMPT + STEPS)
    ]
    assert len({tuple(name for name, _ in turn) for turn in turns}) > 12  # of 24 orders


def test_stock_models_get_the_cache_that_the_engine_has():
    """Long caches are views of buffers for all, and say what stock's own cache says."""
    dense = benchmark_cases(routed_tiny(), [3], IDS)[0]
    ids = IDS[:1].repeat(1, 4)
    with torch.no_grad():
        cache = dense.prefill(ids)
        after = dense.model(IDS[:1, :1], cache=cache, use_cache=True)
        stock = dense.model(torch.cat([ids, IDS[:1, :1]], 1))
    assert after.cache.layers[0].keys.data_ptr() == after.cache.layers[0].buffers[0].data_ptr()
    torch.testing.assert_close(after.logits[:, -1], stock.logits[:, -1], atol=1e-5, rtol=1e-4)


@pytest.mark.usefixtures("quick")
def test_counted_work_is_that_of_the_layers_that_ran(monkeypatch):
    """All but the K/V of skipped tokens, and attention over keys that a mask hides, is what pruning leaves."""
    monkeypatch.setattr("buddy.engine.selection.MIN_SKIPPED", 2)  # few tokens, of which the engine would select none
    field = benchmark_cases(routed_tiny(sink_tokens=0), [3], IDS)
    timings = time_interleaved(field, {"prefill": IDS[:1, :90]}, {}, rounds=1)
    assert timings["routed", 3].flops["without_head"] < 1.35 * timings["pruned", 3].flops["without_head"]
    assert timings["routed", 3].flops["without_head"] < 0.8 * timings["dense", 6].flops["without_head"]


def test_waiting_states_are_counted_once():
    routed = routed_tiny(batch_plan="shared", reroute_every=None, prompt_plan="shared")
    with torch.no_grad(), routed.at(executed=[2]):
        cache = routed.backbone.model(IDS[:1], use_cache=True).cache
    stock = tiny_backbone("llama").model(IDS[:1], use_cache=True).cache
    assert sum(bool(layer.pending) for layer in cache.layers) == 4
    assert cache_bytes(cache) < 0.8 * cache_bytes(stock)


@pytest.fixture
def run(finished, tmp_path):
    """A copy of a finished tiny run, to be written into."""
    return shutil.copytree(finished / "buddy", tmp_path / "run")


@pytest.fixture
def bench(run, quick, monkeypatch):
    """The bench of a finished tiny run, with short prompts."""
    monkeypatch.setattr("buddy.evaluation.bench.LONG", 32)
    monkeypatch.setattr("buddy.evaluation.bench.LATE", 48)
    monkeypatch.setattr("buddy.evaluation.bench.BATCH", 2)
    return lambda **options: bench_run(run, rounds=1, **options)


@pytest.mark.usefixtures("drawn_figures")
def test_it_writes_a_table_a_figure_and_json(bench, run, tmp_path, capsys):
    bench(json_file=tmp_path / "speed.json", budgets=["1.0", "4layers", "0.5"])
    shown = capsys.readouterr().out
    assert "cache MiB" in shown
    assert "Peak memory" in shown
    report = json.loads((tmp_path / "speed.json").read_text())
    assert [entry["layers"] for entry in report["results"]] == [6, 4, 3]
    for entry in report["results"]:
        assert {"budget", "decode_ms", "prefill_ms", "vs_dense_decode", "vs_dense_prefill"} <= entry.keys()
    assert report["late_context"] == 48
    below = report["results"][1:]
    assert all({"vs_pruned_decode", "vs_pruned_prefill", "vs_pruned_prefill_shared"} <= entry.keys() for entry in below)
    entry = below[0]
    assert entry["vs_pruned_decode"] == pytest.approx(entry["decode_ms"] / entry["pruned_decode_ms"])  # of one round
    with Image.open(run / "speed.png") as figure:
        assert figure.size[0] > 1000


def test_a_run_whose_budgets_are_means_says_what_was_timed(bench, run, tmp_path):
    rewrite(run, "mean_over: 1\n", "mean_over: 8\n")
    bench(json_file=tmp_path / "speed.json", budgets=["4layers", "0.5"])
    executed = json.loads((tmp_path / "speed.json").read_text())["executed"]
    assert list(executed) == ["4", "3"]
    assert all(list(each) == ["decode", "decode_late", "decode_batch8"] for each in executed.values())
    assert all(2 <= mean <= 6 for each in executed.values() for mean in each.values())
    assert executed["4"]["decode_late"] > executed["3"]["decode_late"]


@pytest.mark.usefixtures("quick")
def test_each_router_is_timed_under_its_own_routing(small, finished, tmp_path):
    fit(small(tmp_path, "router=shortgpt", "rivals=[]", "routing.sink_tokens=8"), "small")
    runs = {"one": read_run(finished / "shortgpt"), "eight": read_run(tmp_path / "small/shortgpt/seed-0")}
    timed = measured(runs, build_backbone(runs["one"].recipe), IDS, tmp_path)
    work = {each["router"]: each["multiply_adds"] for each in timed["results"] if each["layers"] == 3}
    assert work["eight"] > work["one"], "sinks run every layer"
    assert all(each["decode_layers"] == each["layers"] for each in timed["results"]), "no sink is timed"


@pytest.mark.usefixtures("quick")
def test_changed_bridges_and_a_changed_router_are_timed_again(run, tmp_path, monkeypatch):
    backbone = build_backbone(read_run(run).recipe)
    timed = measured({"buddy": read_run(run)}, backbone, IDS, tmp_path)
    monkeypatch.setattr("buddy.evaluation.bench.time_interleaved", lambda *_, **__: pytest.fail("it measured again"))
    assert measured({"buddy": read_run(run)}, backbone, IDS, tmp_path) == timed
    bridges, state = run / "bridge.safetensors", load_router(run)
    bridges.write_bytes(b"bridges")
    update_checksums(run)
    with pytest.raises(pytest.fail.Exception):
        measured({"buddy": read_run(run)}, backbone, IDS, tmp_path)
    bridges.unlink()
    save_router(run, state | {"output.bias": state["output.bias"] + 1})
    update_checksums(run)
    with pytest.raises(pytest.fail.Exception):
        measured({"buddy": read_run(run)}, backbone, IDS, tmp_path)


@pytest.mark.usefixtures("quick")
def test_batches_as_a_server_decodes_them(finished, tmp_path, monkeypatch, capsys):
    from buddy.evaluation import bench_serve

    monkeypatch.setattr(bench_serve, "BATCHES", (1, 3))
    bench_serve.bench_serving(
        finished / "buddy", json_file=tmp_path / "serve.json", budgets=["0.5", "2layers"], rounds=2
    )
    found = json.loads((tmp_path / "serve.json").read_text())["results"]
    assert [(each["case"], each["layers"], each["texts"]) for each in found] == [
        *(("full depth", 6, 1), ("full depth", 6, 3), ("a plan per row", 3, 1), ("a plan per row", 3, 3)),
        *(("a plan per batch", 3, 1), ("a plan per batch", 3, 3), ("pruned", 3, 1), ("pruned", 3, 3)),
        *(("a plan per row", 2, 1), ("a plan per row", 2, 3), ("a plan per batch", 2, 1), ("a plan per batch", 2, 3)),
    ]
    for each in found:
        assert each["spread"][0] <= each["ms"] <= each["spread"][1]
        assert each["tokens_a_second"] == pytest.approx(1e3 * each["texts"] / each["ms"])
    assert "a plan per batch" in capsys.readouterr().out
