"""One record as tables, Markdown, CSV, figures and TensorBoard: all say the same."""

import csv
import io
import json
import math
import re
import statistics
from pathlib import Path

import pytest
from buddy.comparison import grid as grid_module
from buddy.comparison.grid import Grid, number, show
from buddy.comparison.longform import as_csv
from buddy.comparison.tensorboard import write_tensorboard
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from buddy.errors import RunError
from buddy.evaluation import tables
from buddy.evaluation.figures import LAYERS, TIME, draw_all
from buddy.evaluation.record import read_record, shown_command, write_record
from buddy.evaluation.report import render, show_files
from buddy.evaluation.results import Results
from buddy.scoring.statistics import difference
from tests.comparison import made
from tests.hparams import row_of_table


@pytest.fixture(scope="module")
def comparison() -> Results:
    return Results(json.loads(json.dumps(made.record())))


def row(grid: Grid, label: str) -> tuple[str, ...]:
    return next(cells for cells in grid.rows if cells[0] == label)


# Tables


def test_perplexity_is_the_mean_over_seeds_with_its_spread(comparison):
    grid = tables.perplexities(comparison, "speeches")
    assert grid.head == ("router", "1 (8)", "0.75 (6)", "0.5 (4)")
    assert [cells[0] for cells in grid.rows] == [*made.KINDS]
    values = [math.exp(3.0), math.exp(3.1)]
    shown = f"{statistics.mean(values):.2f} ±{statistics.stdev(values):.2f}*"
    assert row(grid, "ours")[1:3] == (f"{math.exp(2.5):.2f}", shown)
    assert row(grid, "best")[2] == f"{math.exp(3.2):.2f}†"
    assert row(grid, "worse[a=1;b=2]")[3].endswith("†"), "another router is best at another budget"
    assert row(grid, "full")[1:] == (f"{math.exp(2.5):.2f}", "–", "–")


def test_differences_are_to_the_best_static_router_of_each_budget(comparison):
    grid = tables.differences(comparison, "web")
    assert row(grid, "best")[1] == row(grid, "worse[a=1;b=2]")[2] == "†"
    ours, best = (comparison.scores(label, "web", 0.75) for label in ("ours", "best"))
    mean, (low, high) = difference(ours, best)
    assert row(grid, "ours")[1] == f"{mean:+.2f} ({low:+.2f}, {high:+.2f})*"
    assert mean == pytest.approx(3.05 - 3.2)
    assert row(grid, "dice")[1].startswith("+3.80 (+1.8")
    assert row(grid, "dice")[1].endswith("*"), "losing is marked too"
    assert row(grid, "full")[1:] == ("–", "–")
    assert "† best static router: best at 0.75; worse[a=1;b=2] at 0.5." in grid.note


def test_a_difference_over_few_documents_is_never_marked(comparison):
    found = comparison.difference("dice", "web", 0.75)
    assert found.apart
    assert not type(found)(found.mean, found.low, found.high, units=4).apart


def test_without_a_static_router_there_are_no_differences():
    record = made.record()
    record["runs"] = [run for run in record["runs"] if run["router"] in ("ours", "full")]
    comparison = Results(record)
    assert tables.differences(comparison, "web").rows == ()
    assert not any("Difference" in grid.title for grid in tables.all_grids(comparison))


def test_costs_speed_and_tasks(comparison):
    assert row(tables.costs(comparison), "ours")[1:] == ("learned", "2", "10.5", "1 234", "as asked")
    decode, prefill = tables.speeds(comparison)
    assert row(decode, "ours")[1:] == ("40.00", "100.0", "100.0")
    assert row(prefill, "full")[1:] == ("6400", "–", "–")
    assert "Stock dense model: 50.00." in decode.note
    first, second, _ = tables.tasks(comparison)
    assert first.head == ("router", "piqa", "boolq", "mean")
    assert row(first, "ours")[1:] == ("85.0", "95.0", "90.0")
    assert second.head[-1] == "to the best static"
    assert row(second, "best")[1:] == ("60.0", "70.0", "65.0", "†")
    assert row(second, "ours")[-1].startswith("+25.0 (+")
    assert row(second, "ours")[-1].endswith("*")
    assert row(second, "worse[a=1;b=2]")[-1].startswith("-10.0 (-")


def turned(record: dict, items: dict[tuple[str, str], list[int]]) -> dict:
    """The record with the answers to these items, by router and task, turned round at 0.5 for the first seed."""
    for (label, task), places in items.items():
        run = next(run for run in record["runs"] if run["router"] == label)
        entry = next(each for each in run["tasks"] if (each["task"], each["budget"]) == (task, 0.5))
        entry["correct"] = [1 - right if place in places else right for place, right in enumerate(entry["correct"])]
    return record


def test_flips_are_answers_that_turn_right_or_wrong():
    items = {("ours", "piqa"): [0, 8, 9], ("best", "piqa"): [1, 2], ("best", "boolq"): [0, 1, 2, 3]}
    record = turned(json.loads(json.dumps(made.record())), items | {("worse[a=1;b=2]", "boolq"): [*range(10)]})
    shares, apart = tables.flips(Results(record))
    assert shares.head == ("router", "0.75 (6)", "0.5 (4)")
    assert row(shares, "ours")[1:] == ("0.0", "7.5")  # of two seeds and two tasks, (3/10 + 0 + 0 + 0) / 4
    assert row(shares, "best")[1:] == ("0.0†", "30.0†")
    assert row(shares, "worse[a=1;b=2]")[1:] == ("0.0", "50.0")
    assert row(shares, "full")[1:] == ("–", "–")
    assert row(apart, "ours")[2].startswith("-22.5 (-")
    assert row(apart, "worse[a=1;b=2]")[2].startswith("+20.0 (")
    assert row(apart, "best")[2] == "†"
    assert "**Flips against full depth, %**" in render(Results(record), {})


def test_flips_need_answers_at_full_depth():
    record = json.loads(json.dumps(made.record()))
    for run in record["runs"]:
        run["tasks"] = [entry for entry in run["tasks"] if entry["budget"] < 1]
    assert tables.flips(Results(record)) == []


def test_tasks_whose_answers_are_not_known_have_no_difference():
    record = made.record()
    for entry in record["runs"][0]["tasks"]:
        entry["correct"] = None
    _, second, _ = tables.tasks(Results(record))
    assert row(second, "ours")[1:] == ("85.0", "95.0", "90.0", "–")


def test_layers_that_ran_otherwise_than_asked_are_shown():
    record = made.record()
    record["runs"][0]["domains"]["web"]["results"][1]["executed"] = {"min": 5, "mean": 5.5, "max": 6}
    assert row(tables.costs(Results(record)), "ours")[-1] == "6: 5/5.88/6"


@given(st.floats(1.0, 1e12))
def test_numbers_keep_about_three_digits(value):
    shown = number(value)
    assert float(shown) == pytest.approx(value, rel=0.05 if "e" in shown else 0.005)
    assert len(shown) <= 6


@pytest.mark.parametrize("width", [40, 60, 118])
def test_wide_tables_are_split_and_nothing_is_lost(comparison, width, monkeypatch, capsys):
    monkeypatch.setattr(grid_module, "WIDTH", width)
    for grid in tables.all_grids(comparison):
        show(grid)
        out = capsys.readouterr().out
        table = out.partition(grid.title)[2].partition(grid.note[:20] or "\0")[0]
        assert max(map(len, table.rstrip().splitlines())) <= max(width, 72)
        words = table.split()
        for cell in (cell for cells in grid.rows for cell in cells[1:]):
            assert all(word in words for word in cell.split()), cell


# Documents and files


def cells_of(markdown: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines() if line.startswith("|")
    ]


def test_the_markdown_has_every_table(comparison):
    text = render(comparison, {LAYERS: "a.png", TIME: "b.png"})
    found = cells_of(text)
    for domain in comparison.domains:
        grids = [tables.perplexities, tables.differences, tables.kl_grid, tables.seeds]
        for grid in (make(comparison, domain) for make in grids):
            assert f"**{grid.title}**" in text
            for cells in grid.rows:
                assert [cell.strip() for cell in cells] in found
    for grid in (tables.costs(comparison), *tables.speeds(comparison), *tables.tasks(comparison)):
        assert all([cell.strip() for cell in cells] in found for cells in grid.rows)
    assert "](a.png)" in text
    assert "](b.png)" in text
    assert "buddy compare --recipe quickstart --routers all" in text
    assert "2026-01-02, Some CPU, 2 cores, 15.5 GiB of memory. python 3.11.7, torch 2.13.0." in text
    assert "- broken, seed 0" in text
    assert "/tmp" not in text, "no paths"


def test_the_markdown_depends_on_the_record_alone(comparison):
    again = Results(json.loads(json.dumps(made.record())))
    assert render(again, {LAYERS: "a.png"}) == render(comparison, {LAYERS: "a.png"})


@pytest.mark.parametrize(
    ("rates", "words"), [("[0.01, 0.003]", "best of the rates 0.01, 0.003 by validation windows"), ("[]", "rate 0.001")]
)
def test_what_was_healed_says_how(rates, words):
    record = made.record()
    lora = {"adapter.rank": 8, "adapter.steps": 100, "adapter.lr": 0.001, "adapter.rates": rates}
    text = render(Results(record | {"recipe": record["recipe"] | {"data.batch_size": 4} | lora}), {})
    assert "# Results, healed" in text
    assert "one LoRA adapter of rank 8 for all budgets beside the frozen weights, 100 steps of 4 windows on " in text
    assert f", at the {words}. It is on at full depth too" in text
    assert "At full depth all routers are the dense model" not in text
    assert "At full depth all routers are the dense model" in render(Results(record), {})


def test_the_csv_has_a_line_for_each_run_text_and_budget(comparison):
    lines = list(csv.DictReader(io.StringIO(as_csv(comparison))))
    expected = [
        (run["router"], str(run["seed"]), domain, entry["budget"], entry["perplexity"], entry["kl"])
        for run in comparison.record["runs"]
        for domain in comparison.domains
        for entry in run["domains"][domain]["results"]
    ]
    found = [
        (e["router"], e["seed"], e["domain"], float(e["budget"]), float(e["perplexity"]), float(e["kl"])) for e in lines
    ]
    assert found == expected
    assert {line["decode_tokens_per_second"] for line in lines} == {"40.0", "100.0"}
    assert {line["prefill_tokens_per_second"] for line in lines} == {"6400.0"}
    assert {line["kind"] for line in lines} == {"learned", "static", "random"}


def test_without_times_the_columns_are_empty_and_there_is_no_figure(tmp_path):
    comparison = Results(made.record() | {"speed": None})
    (tmp_path / f"{TIME}.png").write_text("of an earlier comparison")
    assert list(draw_all(comparison, tmp_path)) == [LAYERS]
    assert [path.name for path in tmp_path.iterdir()] == [f"{LAYERS}.png"]
    assert {line["decode_tokens_per_second"] for line in csv.DictReader(io.StringIO(as_csv(comparison)))} == {""}
    assert tables.speeds(comparison) == []


def test_a_record_is_read_back_as_it_was(tmp_path):
    write_record(tmp_path / "comparison.json", made.record())
    text = (tmp_path / "comparison.json").read_text()
    assert read_record(tmp_path / "comparison.json") == json.loads(json.dumps(made.record()))
    assert len(text.splitlines()) < len(json.dumps(made.record(), indent=1).splitlines()) / 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"There is no file .*; name the comparison\.json that"),
        ("{", "is damaged; make it again"),
        ('{"format": 1}', "is no comparison; name"),
        ('{"format": 2}', r"newer Buddy \(format 2\)"),
        (json.dumps(made.record() | {"runs": [{"router": "ours"}]}), "is damaged; make it again"),
        (json.dumps(made.record() | {"runs": []}), "is damaged; make it again"),
        (json.dumps(made.record() | {"recipe": {}}), "is damaged; make it again"),
        (json.dumps({key: value for key, value in made.record().items() if key != "failures"}), "is no comparison"),
    ],
)
def test_what_is_no_record_is_told(content, message, tmp_path):
    path = tmp_path / "comparison.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(RunError, match=message):
        show_files([path], None)


def test_a_folder_is_no_record(tmp_path):
    with pytest.raises(RunError, match=r"is a folder; name the comparison\.json in it"):
        show_files([tmp_path], None)


def test_what_is_read_is_not_written_over(tmp_path):
    path = tmp_path / "comparison.json"
    write_record(path, made.record())
    with pytest.raises(RunError, match=r"comparison\.json is what this command reads; name another file for what it"):
        show_files([path], tmp_path / "." / "comparison.json")
    assert read_record(path)


def test_a_record_becomes_a_document_with_its_figures(comparison, tmp_path, capsys):
    write_record(tmp_path / "comparison.json", made.record())
    (tmp_path / "docs").mkdir()
    show_files([tmp_path / "comparison.json"], tmp_path / "docs" / "results.md")
    text = (tmp_path / "docs" / "results.md").read_text()
    links = re.findall(r"\]\((.*?)\)", text)
    assert links == ["results-quality-layers.png", "results-quality-time.png"]
    assert {path.name for path in (tmp_path / "docs").iterdir()} == {"results.md", *links}
    assert text == render(comparison, dict(zip((LAYERS, TIME), links, strict=True)))
    assert "Perplexity on web" in capsys.readouterr().out


def test_the_command_names_files_without_their_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.jsonl").write_text("{}")
    words = ["buddy", "compare", "--domains", f"one=texts/a.jsonl,{tmp_path}/b.txt,owner/name", "router=a[b=1]"]
    assert shown_command(words) == "buddy compare --domains one=a.jsonl,b.txt,owner/name 'router=a[b=1]'"
    words = [f"data.train_sources=[{tmp_path}/a.jsonl, texts/a.jsonl,owner/name]"]
    assert shown_command(words) == "'data.train_sources=[a.jsonl, a.jsonl,owner/name]'"


# Pictures and TensorBoard


def width(path: Path) -> int:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return image.size[0]


def test_figures_have_a_panel_for_each_text(comparison, tmp_path):
    figures = draw_all(comparison, tmp_path, "x-")
    assert [path.name for path in figures.values()] == ["x-quality-layers.png", "x-quality-time.png"]
    assert min(map(width, figures.values())) > 1400
    one = Results(made.record() | {"domains": made.record()["domains"][:1]})
    assert width(draw_all(one, tmp_path)[LAYERS]) < 1000


def test_curves_overlay_and_the_table_has_a_row_for_each_router(comparison, tmp_path):
    figures = draw_all(comparison, tmp_path)
    (tmp_path / "tensorboard" / "stale").mkdir(parents=True)
    place = write_tensorboard(comparison, tmp_path, figures)
    folders = {router["folder"] for router in comparison.record["routers"]}
    assert {path.name for path in place.iterdir()} == folders | {"_figures"}
    columns = set()
    for router in comparison.record["routers"]:
        events = EventAccumulator(str(place / router["folder"])).Reload()
        loss = {event.step: event.value for event in events.Scalars("web/loss")}
        assert list(loss) == ([8] if router["full_depth"] else [4, 6, 8])
        assert loss[8] == pytest.approx(2.75)
        if router["label"] == "ours":
            assert loss[6] == pytest.approx((3.0 + 3.1) / 2 + 0.25)
            assert [event.step for event in events.Scalars("speed/decode_ms")] == [4, 6, 8]
        settings, tags = row_of_table(events)
        assert settings["router"] == router["name"]
        assert settings["kind"] == router["kind"]
        written = {tag for tag in tags if tag in events.Tags()["scalars"]}
        assert len(written) == 2 + 2 * (1 if router["full_depth"] else 3)
        columns.add((tuple(sorted(settings)), tuple(sorted(tags))))
    assert len(columns) == 1
    pictures = EventAccumulator(str(place / "_figures"), size_guidance={"images": 0}).Reload()
    assert set(pictures.Tags()["images"]) == {LAYERS, TIME}
    assert pictures.Images(LAYERS)[0].width == width(figures[LAYERS])


def test_the_document_says_what_was_learned_from():
    record = made.record()
    assert "calibrated or trained on speeches, at the budgets" in render(Results(record), {})
    rates = {"optimizer.lr": 0.003, "optimizer.lr_by_router": "{dice: 0.006, absent: 0.1}"}
    own = record | {"recipe": record["recipe"] | rates}
    words = "trained on speeches (learning rate 0.003; dice: 0.006), at the budgets"
    assert words in render(Results(own), {})
    record["recipe"]["data.train_sources"] = "[web/c4.jsonl, a/fine.jsonl]"
    words = "on speeches, and those with weights trained on speeches, c4.jsonl and fine.jsonl in turn, at"
    assert words in render(Results(record), {})
    record["recipe"]["data.calibration_sources"] = "[web/c4.jsonl, a/fine.jsonl]"
    assert "calibrated or trained on speeches, c4.jsonl and fine.jsonl in turn, at" in render(Results(record), {})
