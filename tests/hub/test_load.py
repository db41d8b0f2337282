"""`buddy.load` and `buddy generate`: what is written, which layers ran, and what is refused."""

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import buddy
from buddy.errors import BackboneError, BudgetError, DataError, RunError
from buddy.hub.load import generate, summary
from buddy.hub.push_pull import push
from buddy.run import read_run
from buddy.run_files import update_checksums
from tests.hub.fake import FakeHub

PROMPT = "budget depth layer router"
NEW = 9


@pytest.fixture(scope="module")
def model(finished):
    return buddy.load(finished / "buddy")


@pytest.fixture
def chatting(model, monkeypatch):
    monkeypatch.setattr(
        model.routed.backbone.tokenizer, "chat_template", "{% for m in messages %}[{{ m['content'] }}]{% endfor %}>"
    )
    return model


def stock(folder, prompt: str, **options) -> str:
    """What transformers alone writes."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, **options)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_full_depth_writes_what_stock_transformers_writes(finished, model, tiny_llama_folder):
    expected = stock(tiny_llama_folder, PROMPT, do_sample=False)
    assert model.generate(PROMPT, max_new_tokens=NEW) == expected
    assert buddy.load(finished / "full").generate(PROMPT, max_new_tokens=NEW) == expected
    assert model.generate(PROMPT, "3layers", max_new_tokens=NEW) != expected


@pytest.mark.parametrize(("prompt_budget", "executed"), [(None, ["4", "4"]), (1.0, ["6", "4"])])
def test_the_command_streams_what_the_model_writes(finished, model, capsys, prompt_budget, executed):
    options = {"prompt_budget": prompt_budget, "max_new_tokens": NEW}
    text = model.generate(PROMPT, "4layers", **options)
    generate(finished / "buddy", prompt=PROMPT, budget="4layers", **options)
    assert capsys.readouterr() == (f"{text}\n", f"{model.ran}\n")
    assert re.findall(r": (\d) layers", model.ran) == executed  # of the prompt, and of the steps


def test_sampling_follows_the_seed_and_keeps_the_callers_generator(model, tiny_llama_folder):
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    texts = [model.generate(PROMPT, 1.0, max_new_tokens=NEW, temperature=0.8, seed=seed) for seed in (3, 3, 4)]
    assert torch.equal(torch.rand(1), expected)
    torch.manual_seed(3)
    assert texts[0] == texts[1] == stock(tiny_llama_folder, PROMPT, do_sample=True, temperature=0.8)
    assert texts[0] != texts[2]
    hot = [model.generate(PROMPT, 1.0, max_new_tokens=NEW, temperature=two) for two in (2, 2.0)]
    assert hot[0] == hot[1]


def test_streaming_gives_the_same_in_pieces(model):
    whole = model.generate(PROMPT, 0.5, max_new_tokens=NEW)
    ran = model.ran
    assert "".join(model.stream(PROMPT, 0.5, max_new_tokens=NEW)) == whole
    assert model.ran == ran
    with pytest.raises(BudgetError):
        list(model.stream(PROMPT, 1.5))


def test_leaving_a_stream_stops_the_model(model):
    forwards = []
    hook = model.routed.backbone.base.register_forward_pre_hook(lambda *_: forwards.append(1))
    stream = model.stream(PROMPT, 0.5, max_new_tokens=400)
    next(stream)
    stream.close()
    hook.remove()
    assert 1 <= len(forwards) < 10


def test_chat_and_messages(chatting):
    expected = chatting.generate("[plan]>", 0.5, max_new_tokens=6)
    messages = [{"role": "user", "content": "plan"}]
    assert chatting.generate("plan", 0.5, max_new_tokens=6, chat=True) == expected
    assert chatting.generate(messages, 0.5, max_new_tokens=6) == expected


@pytest.mark.parametrize("messages", [["plan"], {"role": "user", "content": "plan"}, b"plan"])
def test_messages_of_another_form_are_refused(chatting, monkeypatch, messages):
    monkeypatch.setattr(chatting.routed.backbone.tokenizer, "chat_template", "{{ '[' + messages[0]['content'] }}")
    with pytest.raises(DataError):
        chatting.generate(messages, 0.5)


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"prompt": " \n"}, DataError, "prompt"),
        ({"prompt": []}, DataError, "prompt"),
        ({"prompt": torch.ones(1, 3).long()}, DataError, "Tensor"),
        ({"temperature": -1.0}, DataError, "-1.0"),
        ({"temperature": 1e-300}, DataError, "1e-300"),
        ({"temperature": "hot"}, DataError, "hot"),
        ({"temperature": float("nan")}, DataError, "nan"),
        ({"temperature": float("inf")}, DataError, "inf"),
        ({"seed": 2**64}, DataError, "seed"),
        ({"seed": None}, DataError, "seed"),
        ({"seed": 1.5}, DataError, "seed"),
        ({"max_new_tokens": 2.5}, DataError, "max_new_tokens"),
        ({"max_new_tokens": 0}, DataError, "max_new_tokens"),
        ({"max_new_tokens": 600}, DataError, "600"),
        ({"chat": True}, DataError, "chat template"),
        ({"budget": "half"}, BudgetError, "half"),
        ({"budget": "1layer"}, BudgetError, "2layers"),
        ({"prompt_budget": "1layer"}, BudgetError, "2layers"),
        ({"budget": "auto"}, BudgetError, "predictor"),
    ],
)
def test_what_is_refused(model, options, error, named):
    with pytest.raises(error, match=named):
        model.generate(**{"prompt": PROMPT, **options})


def test_a_model_in_a_folder_that_is_not_here(finished, tmp_path, monkeypatch):
    run = Path(shutil.copytree(finished / "full", tmp_path / "run"))
    there = read_run(run).recipe.backbone.name
    for file in ("recipe.yaml", "run.json"):
        path = run / file
        path.write_text(path.read_text().replace(there, "mine"))
    update_checksums(run)
    (tmp_path / "mine").symlink_to(there)
    monkeypatch.chdir(tmp_path)
    assert buddy.load(run).generate(PROMPT, max_new_tokens=2)
    monkeypatch.chdir("/")
    with pytest.raises(BackboneError, match=r"mine.*backbone="):
        buddy.load(run)
    assert buddy.load(run, backbone=there).generate(PROMPT, max_new_tokens=2)


def test_a_prompt_of_which_the_tokenizer_knows_nothing(model, monkeypatch):
    monkeypatch.setattr(model, "encode", lambda prompt, chat: [])
    with pytest.raises(DataError, match="prompt"):
        model.generate("\x04")


def forwards(*passes: tuple[list[int], int]) -> SimpleNamespace:
    """A record of one row: for each forward the executed layers of its tokens, and how many of them are sinks."""
    return SimpleNamespace(
        executed=[torch.tensor([executed]) for executed, _ in passes],
        sinks=[(torch.arange(len(executed)) < sinks)[None] for executed, sinks in passes],
        runs=[torch.eye(4)[number % 3].bool().expand(1, len(e), 4) for number, (e, _) in enumerate(passes)],
    )


@pytest.mark.parametrize(
    ("passes", "numbers"),
    [
        ([([9, 9, 3, 5], 2), ([4], 0), ([2], 0), ([3], 0)], "3 9 3 4.0 5 2 9 3 2 3.0 4 3"),
        ([([9], 1), ([9], 1), ([2], 0), ([4], 0)], "3 9 1 9 3 2 3.0 4 1 9 2"),
        ([([9], 1)], "3 9 1 9"),
    ],
)
def test_the_summary_counts_what_ran(passes, numbers):
    """K, L; least, mean, most and sinks of the prompt; steps, their least, mean, most and sinks; plans."""
    assert re.findall(r"\d+(?:\.\d+)?", summary(forwards(*passes), 3, 9)) == numbers.split()


def test_the_summary_says_that_a_budget_is_a_mean():
    passes = forwards(([9, 2], 1), ([5], 0))
    assert "64" in summary(passes, 3, 9, over=64)
    assert "64" not in summary(passes, 3, 9)


# Sources


def test_a_pushed_folder_and_a_name_on_the_hub_are_loaded(finished, model, tmp_path, monkeypatch):
    hub = FakeHub(tmp_path / "hub", monkeypatch)
    expected = model.generate(PROMPT, 0.5, max_new_tokens=6)
    push(finished / "buddy", to=str(tmp_path / "pushed"))
    assert buddy.load(tmp_path / "pushed").generate(PROMPT, 0.5, max_new_tokens=6) == expected
    push(finished / "buddy", to="someone/router")
    assert buddy.load("someone/router").generate(PROMPT, 0.5, max_new_tokens=6) == expected
    (hub.root / "someone" / "router" / "run.json").write_text("{}")
    with pytest.raises(RunError, match=r"someone/router/run\.json"):
        buddy.load("someone/router")


def test_a_backbone_that_is_elsewhere(finished, small, tmp_path):
    shutil.copytree(small.model, tmp_path / "model")
    loaded = buddy.load(finished / "buddy", backbone=str(tmp_path / "model"))
    assert loaded.routed.backbone.name == str(tmp_path / "model")
    with pytest.raises(BackboneError, match="/no/such"):
        buddy.load(finished / "buddy", backbone="/no/such")


@pytest.mark.parametrize(
    ("dtype", "computed"), [(None, torch.float32), ("float16", torch.float16), ("auto", torch.bfloat16)]
)
def test_another_dtype_than_the_runs(finished, monkeypatch, dtype, computed):
    monkeypatch.setattr("buddy.builders.model.fastest_dtype", lambda accelerator: "bfloat16")
    assert buddy.load(finished / "shortgpt", dtype=dtype).routed.backbone.dtype == computed


def test_what_is_no_run(finished):
    with pytest.raises(RunError, match="did you mean 'buddy'"):
        buddy.load(finished / "budy")
    for name in ("nowhere", "someone/router"):
        with pytest.raises(RunError, match=name):
            buddy.load(name)
    with pytest.raises(RunError, match="main"):
        buddy.load(finished / "buddy", revision="main")
