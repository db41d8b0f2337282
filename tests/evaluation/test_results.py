"""One record as a frame, statistics, tables, Markdown, CSV, figures and TensorBoard: all say the same."""

import json
import math
import statistics
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata

from buddy.evaluation import figures, tables
from buddy.evaluation.figures import LAYERS, MEASURED, TIME, draw_all, draw_run, write_tensorboard
from buddy.evaluation.record import show_files, write_record
from buddy.evaluation.results import Results
from buddy.evaluation.tables import render
from buddy.metrics.statistics import difference
from tests.evaluation import made

pytestmark = pytest.mark.usefixtures("drawn_figures")

FULL_NAME = "SmolLM2-135M-Instruct (Q4_1, dequantised)"


def fresh() -> dict:
    return json.loads(json.dumps(made.record()))


@pytest.fixture(scope="module")
def results() -> Results:
    return Results(fresh())


@pytest.fixture(scope="module")
def drawn(results, drawn_figures, tmp_path_factory):
    folder = tmp_path_factory.mktemp("figures")
    return folder, draw_all(results, folder, "x-")


def row(table: tables.Table, label: str) -> list[str]:
    return next(cells for cells in table.rows if cells[0] == label)


def losses(record: dict, label: str, text: str, place: int) -> np.ndarray:
    """(seeds, documents) straight from the record."""
    runs = [run for run in record["runs"] if run["router"] == label]
    return np.array([run["domains"][text]["documents"][place]["loss"] for run in runs])


# Numbers


@pytest.mark.parametrize(
    ("value", "shown"), [(1.234, "1.23"), (99.996, "100.0"), (31130.2, "31130"), (1.24e6, "1.2e6"), (math.inf, "inf")]
)
def test_numbers_have_about_four_digits(value, shown):
    assert tables.number(value) == shown


@pytest.mark.parametrize(("label", "excepted"), [("worse", False), ("worse[bridge.steps=9]", True)])
def test_rows_with_settings_of_their_own_are_excepted_from_what_is_said_of_all(label, excepted):
    named = json.loads(json.dumps(fresh()).replace("worse[a=1;b=2]", label))
    assert ("brackets" in render(Results(named), {}).partition("| text |")[2].partition("## ")[0]) == excepted


def test_a_task_that_is_no_share_has_its_own_unit():
    record = fresh()
    for run in record["runs"]:
        for entry in run["tasks"]:
            if entry["task"] == "boolq":
                entry |= {"metric": "word_perplexity", "value": 123456.0, "correct": None}
    found = Results(record)
    assert found.shares == ["piqa"]
    assert found.task_scores["mean"].equals(found.task_scores.piqa.rename("mean"))
    rows = {row[0]: row[1:4] for row in tables.tasks(found)[1].rows}
    assert rows["ours"][1] == "1.235e+05"
    assert rows["ours"][0] == rows["ours"][2]


def test_the_frame_holds_every_number_once(results):
    record, frame = results.record, results.frame
    assert not frame.duplicated(["router", "seed", "text", "budget", "document", "metric"]).any()
    for run in record["runs"]:
        own = frame[(frame.router == run["router"]) & (frame.seed == run["seed"])]
        for text, found in run["domains"].items():
            for result, sums in zip(found["results"], found["documents"], strict=True):
                here = own[(own.text == text) & (own.budget == result["budget"])]
                assert here[(here.metric == "loss")].value.tolist() == sums["loss"]
                (perplexity,) = here[here.metric == "perplexity"].value
                assert perplexity == result["perplexity"]
        for entry in run["tasks"]:
            here = own[(own.text == entry["task"]) & (own.budget == entry["budget"])]
            assert here[here.metric == "correct"].value.tolist() == entry["correct"]


def test_perplexity_is_the_mean_over_seeds_with_its_spread(results):
    values = [math.exp(3.0), math.exp(3.1)]
    ours = results.scores.loc["speeches", "ours", 0.75]
    assert ours.perplexity == pytest.approx(statistics.mean(values))
    assert ours.perplexity_std == pytest.approx(statistics.stdev(values))
    table = tables.perplexities(results, "speeches")
    assert [cells[0] for cells in table.rows] == [*made.KINDS]
    assert row(table, "ours")[2] == f"{statistics.mean(values):.2f} ±{statistics.stdev(values):.2f}*"
    assert row(table, "best")[2] == f"{math.exp(3.2):.2f}†"
    assert row(table, "worse[a=1;b=2]")[3].endswith("†"), "another router is best at another budget"
    assert row(table, "full")[1:] == [f"{math.exp(2.5):.2f}", "–", "–"]


def test_full_depth_has_a_spread_where_an_adapter_changes_it():
    record = json.loads(json.dumps(fresh()).replace('"ours"', '"ours[adapter.steps=9]"'))
    assert "±" not in row(tables.perplexities(Results(record), "speeches"), "ours[adapter.steps=9]")[1]
    for run in record["runs"]:
        (full,) = (each for each in run["domains"]["speeches"]["results"] if each["budget"] == 1.0)
        full["perplexity"] += run["seed"]
    assert "±" in row(tables.perplexities(Results(record), "speeches"), "ours[adapter.steps=9]")[1]
    assert "but for rows with an adapter" in render(Results(record), {})


def test_at_full_depth_alone_there_is_no_divergence():
    record = fresh()
    record["routers"] = [each for each in record["routers"] if each["label"] == "full"]
    record["runs"] = [each for each in record["runs"] if each["router"] == "full"]
    assert not tables.kl(Results(record)).has_numbers


def test_lines_of_many_routers_all_look_different():
    many = SimpleNamespace(routers=pd.DataFrame({"kind": ["learned"] * 40}))
    assert len({str(style) for style in figures._styles(many)}) == 40


def test_differences_are_to_the_best_static_router_of_each_budget(results):
    scores = results.scores.loc["web"]
    assert scores.index[scores.best_static].tolist() == [("best", 0.75), ("worse[a=1;b=2]", 0.5)]
    ours, best = (losses(results.record, label, "web", 1) for label in ("ours", "best"))
    mean, (low, high) = difference(ours, best, np.full(made.DOCUMENTS, 10.0))
    found = scores.loc["ours", 0.75]
    assert (found.difference, found.difference_low, found.difference_high) == pytest.approx((mean, low, high))
    assert found.difference == pytest.approx(3.05 - 3.2)
    assert scores.loc["dice", 0.75].significant, "losing is marked too"
    assert math.isnan(scores.loc["best", 0.75].difference)
    assert scores.xs(1.0, level="budget").difference.isna().all()


def test_without_a_static_router_there_are_no_differences():
    record = fresh()
    record["runs"] = [run for run in record["runs"] if run["router"] in ("ours", "full")]
    results = Results(record)
    assert results.scores.difference.isna().all()
    assert not any("Difference" in table.title for table in tables.all_tables(results))


def test_costs_speed_and_tasks(results):
    assert row(tables.costs(results), "ours")[1:] == ["learned", "2", "10.5", "1 234", "as asked"]
    decode, prefill, work = tables.speeds(results)
    assert row(decode, "ours")[1:] == ["40.00", "100.0", "100.0"]
    assert row(prefill, "full")[1:] == ["6400", "–", "–"]
    assert row(work, "ours")[1:] == ["71.5", "71.5", "71.5"]
    assert row(work, "full")[1:] == ["71.5", "–", "–"]
    first, second, _ = tables.tasks(results)
    assert row(first, "ours")[1:] == ["85.0", "95.0", "90.0"]
    assert row(second, "best")[1:] == ["60.0", "70.0", "65.0", "†"]
    ours = results.task_scores.loc["ours", 0.75]
    assert ours.difference == pytest.approx(0.25)
    assert ours.significant
    assert results.task_scores.loc["worse[a=1;b=2]", 0.75].difference == pytest.approx(-0.1)


def test_the_layers_of_timed_tokens_are_noted_where_they_are_not_k():
    record = fresh()
    assert not any("timed tokens" in table.note for table in tables.speeds(Results(record)))
    for entry in record["speed"]["results"]:
        entry["decode_layers"] += 0.5 * (entry["router"] == "ours")
    decode, *others = tables.speeds(Results(record))
    assert decode.note.endswith("of ours ran 6.5, 4.5 layers.")
    assert not any("timed tokens" in table.note for table in others)


def test_flips_are_answers_that_turn_right_or_wrong():
    record = fresh()
    turned = {("ours", "piqa"): [0, 8, 9], ("best", "piqa"): [1, 2], ("best", "boolq"): [0, 1, 2, 3]}
    for (label, task), places in (turned | {("worse[a=1;b=2]", "boolq"): range(10)}).items():
        run = next(run for run in record["runs"] if run["router"] == label)
        entry = next(each for each in run["tasks"] if (each["task"], each["budget"]) == (task, 0.5))
        entry["correct"] = [1 - right if place in places else right for place, right in enumerate(entry["correct"])]
    found = Results(record).task_scores
    assert found.loc["ours", 0.5].flips == pytest.approx(0.075)  # of two seeds and two tasks, (3/10 + 0 + 0 + 0) / 4
    assert found.loc["best", 0.5].flips == pytest.approx(0.3)
    assert found.loc["best", 0.5].flips_best_static
    assert found.loc["ours", 0.5].flips_difference == pytest.approx(-0.225)
    assert found.loc["worse[a=1;b=2]", 0.5].flips_difference == pytest.approx(0.2)
    for run in record["runs"]:
        run["tasks"] = [entry for entry in run["tasks"] if entry["budget"] < 1]
    assert not any(each.has_numbers for each in tables.flips(Results(record))), "full depth was not scored"


# What is shown


def test_the_document_has_every_table_and_the_backbones_full_name(results, capsys):
    text = render(results, {LAYERS: "a.png", TIME: "b.png"})
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    by_text = [tables.kl(results, each) for each in results.texts]
    for table in (*tables.all_tables(results)[:4], *by_text, *tables.speeds(results), *tables.tasks(results)):
        assert all([cell.strip() for cell in cells] in found for cells in table.rows), table.title
    for said in ("](a.png)", "](b.png)", results.record["command"], "2026-01-02", "- broken, seed 0", FULL_NAME):
        assert said in text
    assert "/tmp" not in text, "no paths"
    assert render(Results(fresh()), {LAYERS: "a.png"}) == render(results, {LAYERS: "a.png"})
    tables.show(results)
    assert FULL_NAME in capsys.readouterr().out


@pytest.mark.slow
def test_a_record_becomes_a_document_with_its_figures(results, tmp_path, capsys):
    write_record(tmp_path / "comparison.json", made.record())
    (tmp_path / "docs").mkdir()
    show_files([tmp_path / "comparison.json"], tmp_path / "docs" / "results.md")
    text = (tmp_path / "docs" / "results.md").read_text()
    links = {name: f"results-{name}.png" for name in (LAYERS, *MEASURED)}
    assert {path.name for path in (tmp_path / "docs").iterdir()} == {"results.md", *links.values()}
    assert text == render(results, links)
    assert "Perplexity on web" in capsys.readouterr().out


def row_of_table(events: EventAccumulator) -> tuple[dict[str, object], list[str]]:
    """What TensorBoard's tab HPARAMS shows of a run: its settings, and the tags of its results."""
    contents = events.PluginTagToContent(metadata.PLUGIN_NAME)
    session = metadata.parse_session_start_info_plugin_data(contents[metadata.SESSION_START_INFO_TAG])
    experiment = metadata.parse_experiment_plugin_data(contents[metadata.EXPERIMENT_TAG])
    assert metadata.SESSION_END_INFO_TAG in contents
    assert {info.name for info in experiment.hparam_infos} == set(session.hparams)
    settings = {name: getattr(value, value.WhichOneof("kind")) for name, value in session.hparams.items()}
    return settings, [info.name.tag for info in experiment.metric_infos]


@pytest.mark.slow
def test_curves_overlay_and_the_table_has_a_row_for_each_router(results, drawn, tmp_path):
    (tmp_path / "tensorboard" / "stale").mkdir(parents=True)
    write_tensorboard(results, tmp_path, drawn[1])
    events_folder = tmp_path / "tensorboard"
    folders = {router["folder"] for router in results.record["routers"]}
    assert {path.name for path in events_folder.iterdir()} == folders | {"_figures"}
    columns = set()
    for router in results.record["routers"]:
        events = EventAccumulator(str(events_folder / router["folder"])).Reload()
        loss = {event.step: event.value for event in events.Scalars("web/loss")}
        assert list(loss) == ([8] if router["full_depth"] else [4, 6, 8])
        assert loss[8] == pytest.approx(2.75)
        if router["label"] == "ours":
            assert loss[6] == pytest.approx((3.0 + 3.1) / 2 + 0.25)
            assert [event.step for event in events.Scalars("speed/decode_ms")] == [4, 6, 8]
        settings, tags = row_of_table(events)
        assert (settings["router"], settings["kind"]) == (router["name"], router["kind"])
        columns.add((tuple(sorted(settings)), tuple(sorted(tags))))
    assert len(columns) == 1
    pictures = EventAccumulator(str(events_folder / "_figures"), size_guidance={"images": 0}).Reload()
    assert set(pictures.Tags()["images"]) == {LAYERS, *MEASURED}


def test_a_run_has_its_own_figure_and_curves(tmp_path):
    draw_run(tmp_path, [made.scores(budget, mean) for budget, mean in ((0.5, 4.0), (1.0, 3.0), (0.75, 3.5))])
    with Image.open(tmp_path / "loss.png") as figure:
        assert figure.format == "PNG"
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == [], "and in no run of its own for TensorBoard"
    events = EventAccumulator(str(tmp_path)).Reload()
    curve = [(event.step, event.value) for event in events.Scalars("test/perplexity_by_layers")]
    assert curve == [(k, pytest.approx(math.exp(mean), rel=1e-6)) for k, mean in ((4, 4.0), (6, 3.5), (8, 3.0))]
    assert {"test/loss_by_layers", "test/kl_by_layers"} <= {*events.Tags()["scalars"]}


@pytest.mark.parametrize("documents", [1, 4])
def test_few_documents_have_no_mark_and_one_has_no_interval(documents):
    record = json.loads(json.dumps(made.record()))
    for run in record["runs"]:
        for found in run["domains"].values():
            for sums in found["documents"]:
                for name in ("loss", "kl", "tokens"):
                    sums[name] = sums[name][:documents]
    row = Results(record).scores.loc["speeches", "dice", 0.75]
    assert row.difference > 0
    assert math.isnan(row.difference_low) if documents == 1 else row.difference_low > 0
    assert not row.significant
