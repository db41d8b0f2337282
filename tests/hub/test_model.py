"""A run as a model in Python: what it writes is what `buddy generate` writes."""

import shutil
import threading
import time

import pytest
import torch

import buddy
from buddy.errors import BackboneError, BudgetError, DataError, RunError
from buddy.hub.load import Stop, generate
from buddy.hub.push_pull import push
from tests.hub.test_share import Hub

PROMPT = "budget depth layer router"


@pytest.fixture(scope="module")
def model(finished):
    return buddy.load(finished / "buddy")


@pytest.mark.parametrize("budget", [0.5, "4layers", 1.0])
def test_it_writes_what_the_command_writes(finished, model, capsys, budget):
    text = model.generate(PROMPT, budget, max_new_tokens=9)
    said = model.ran
    generate(finished / "buddy", prompt=PROMPT, budget=str(budget), max_new_tokens=9)
    out, err = capsys.readouterr()
    assert out == text + "\n"
    assert err == said + "\n"


def test_streaming_gives_the_same_in_pieces(model):
    whole = model.generate(PROMPT, 0.5, max_new_tokens=12)
    said = model.ran
    pieces = list(model.stream(PROMPT, 0.5, max_new_tokens=12))
    assert "".join(pieces) == whole
    assert model.ran == said


def test_leaving_a_stream_stops_the_writing(model, monkeypatch):
    before, written = threading.active_count(), []

    def write(prompt, budget, *, streamer, stop):
        while not stop(torch.zeros(1, 1), None).all():
            written.append(time.sleep(0.001))
            streamer.on_finalized_text("word ")

    monkeypatch.setattr(model, "write", write)
    stream = model.stream(PROMPT, 0.5)
    assert next(stream) == "word "
    stream.close()
    assert threading.active_count() == before
    assert written


def test_a_text_that_is_stopped_is_short(model):
    stop = Stop()
    stop.now = True
    model.write(PROMPT, 0.5, max_new_tokens=50, stop=stop)
    assert "decode step" not in model.ran


def test_a_mistake_in_a_stream_is_raised_where_it_is_read(model):
    with pytest.raises(BudgetError, match="not above 0 and at most 1"):
        list(model.stream(PROMPT, 1.5))


def test_sampling_follows_the_seed_and_leaves_the_callers_generator_alone(model):
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    texts = [model.generate(PROMPT, 1.0, max_new_tokens=12, temperature=0.9, seed=seed) for seed in (3, 3, 4)]
    assert torch.equal(torch.rand(1), expected)
    assert texts[0] == texts[1] != texts[2]


def test_chat_and_messages(finished):
    model = buddy.load(finished / "buddy")
    model.routed.backbone.tokenizer.chat_template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}>"
    expected = model.generate("[plan]>", 0.5, max_new_tokens=6)
    assert model.generate("plan", 0.5, max_new_tokens=6, chat=True) == expected
    messages = [{"role": "user", "content": "plan"}]
    assert model.generate(messages, 0.5, max_new_tokens=6) == expected
    assert "".join(model.stream(messages, 0.5, max_new_tokens=6)) == expected


@pytest.mark.parametrize("messages", [[{"role": "user"}], ["plan"], {"role": "user", "content": "plan"}, b"plan"])
def test_messages_of_another_form_are_refused(finished, messages):
    model = buddy.load(finished / "buddy")
    model.routed.backbone.tokenizer.chat_template = "{% for m in messages %}{{ '[' + m['content'] }}{% endfor %}>"
    with pytest.raises(DataError, match=r"does not take these messages \(.*\); give a list of \{\"role\": …, "):
        model.generate(messages, 0.5)


@pytest.mark.parametrize(
    ("prompt", "options", "error", "message"),
    [
        ("", {}, DataError, "The prompt is empty"),
        ([], {}, DataError, "The prompt is empty"),
        (PROMPT, {"temperature": -1.0}, DataError, r"The temperature is -1\.0; give 0 or more"),
        (PROMPT, {"temperature": 1e-300}, DataError, "give 0 for the likeliest token, or 1e-06 or more"),
        (PROMPT, {"temperature": float("nan")}, DataError, "The temperature is nan"),
        (PROMPT, {"seed": 2**64}, DataError, "The seed is 18446744073709551616; give one from 0 to 2"),
        (PROMPT, {"max_new_tokens": 0}, DataError, "max_new_tokens is 0; give 1 or more"),
        (PROMPT, {"max_new_tokens": 600}, DataError, "set a smaller max_new_tokens"),
        (PROMPT, {"chat": True}, DataError, "has no chat template"),
        (PROMPT, {"budget": "half"}, BudgetError, "The budget 'half' is neither"),
        (PROMPT, {"budget": "auto"}, BudgetError, "has no budget predictor"),
    ],
)
def test_what_is_refused(model, prompt, options, error, message):
    with pytest.raises(error, match=message):
        model.generate(prompt, **options)


def test_it_says_what_it_is(model, small):
    assert repr(model) == f"<buddy model: {small.model}, 6 layers, router BuddyRouter>"


# Where runs come from


def test_a_pushed_folder_is_loaded(finished, model, tmp_path):
    push(finished / "buddy", to=str(tmp_path / "pushed"))
    expected = model.generate(PROMPT, 0.5, max_new_tokens=6)
    assert buddy.load(tmp_path / "pushed").generate(PROMPT, 0.5, max_new_tokens=6) == expected


def test_a_name_on_the_hub_is_loaded(finished, model, tmp_path, monkeypatch):
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.snapshot_download)
    push(finished / "buddy", to="someone/router")
    loaded = buddy.load("someone/router")
    assert loaded.generate(PROMPT, 0.5, max_new_tokens=6) == model.generate(PROMPT, 0.5, max_new_tokens=6)
    (tmp_path / "hub" / "someone" / "router" / "run.json").write_text("{}")
    with pytest.raises(RunError, match=r"someone/router/run\.json is damaged"):
        buddy.load("someone/router")


def test_a_backbone_that_lies_elsewhere(finished, small, model, tmp_path):
    shutil.copytree(small.model, tmp_path / "model")
    loaded = buddy.load(finished / "buddy", backbone=str(tmp_path / "model"))
    assert loaded.routed.backbone.name == str(tmp_path / "model")
    assert loaded.generate(PROMPT, 0.5, max_new_tokens=6) == model.generate(PROMPT, 0.5, max_new_tokens=6)
    with pytest.raises(BackboneError, match="There is no folder '/no/such'"):
        buddy.load(finished / "buddy", backbone="/no/such")


def test_what_is_no_run(finished):
    with pytest.raises(RunError, match=r"There is no run folder .*; did you mean 'buddy'"):
        buddy.load(finished / "budy")
    with pytest.raises(RunError, match="There is no run folder nowhere"):
        buddy.load("nowhere")
    with pytest.raises(RunError, match="someone/router cannot be read from the hub"):
        buddy.load("someone/router")
    with pytest.raises(RunError, match="is a folder and has no revisions"):
        buddy.load(finished / "buddy", revision="main")
