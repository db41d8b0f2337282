"""Text from a finished run: what is printed where, and what is refused."""

import re
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from buddy.build import load_model
from buddy.errors import BudgetError, DataError
from buddy.hub.load import generate, summary

PROMPT = "budget depth layer router"
NEW = 12


def stock(folder, prompt: str, **options) -> str:
    """What transformers alone writes, as the streamer would print it."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    inputs = tokenizer(prompt, return_tensors="pt")
    written = model.generate(
        input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=NEW, **options
    )
    return tokenizer.decode(written[0, inputs.input_ids.shape[1] :], skip_special_tokens=True) + "\n"


@pytest.mark.parametrize("name", ["buddy", "full"])
def test_full_depth_writes_what_stock_transformers_writes(finished, tiny_llama_folder, capsys, name):
    generate(finished / name, prompt=PROMPT, budget="1.0", max_new_tokens=NEW)
    out, err = capsys.readouterr()
    assert out == stock(tiny_llama_folder, PROMPT, do_sample=False)
    assert "Asked for 6 of 6 layers a token. Prompt: 6 / 6.0 / 6 layers (min / mean / max) (1 sink token at 6)" in err


def test_less_writes_something_else_and_says_what_ran(finished, tiny_llama_folder, capsys):
    generate(finished / "buddy", prompt=PROMPT, budget="3layers", max_new_tokens=NEW)
    out, err = capsys.readouterr()
    assert out.endswith("\n")
    assert out != stock(tiny_llama_folder, PROMPT, do_sample=False)
    assert re.fullmatch(
        r"Asked for 3 of 6 layers a token\. Prompt: 3 / 3\.0 / 3 layers \(min / mean / max\) \(1 sink token at 6\); "
        r"11 decode steps: 3 / 3\.0 / 3 layers \(min / mean / max\), \d+ distinct plans?\.\n",
        err,
    )


def test_sampling_follows_the_seed(finished, tiny_llama_folder, capsys):
    texts = []
    for seed in (3, 3, 4):
        generate(finished / "buddy", prompt=PROMPT, budget="1", max_new_tokens=NEW, temperature=0.8, seed=seed)
        texts.append(capsys.readouterr().out)
    torch.manual_seed(3)
    assert texts[0] == texts[1] == stock(tiny_llama_folder, PROMPT, do_sample=True, temperature=0.8)
    assert texts[0] != texts[2]


def test_a_chat_template_is_used_where_there_is_one(finished, tiny_llama_folder, capsys, monkeypatch):
    def with_template(run, **options):
        routed = load_model(run, **options)
        routed.backbone.tokenizer.chat_template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}>"
        return routed

    monkeypatch.setattr("buddy.hub.load.load_model", with_template)
    generate(finished / "buddy", prompt="plan", budget="1.0", max_new_tokens=NEW, chat=True)
    assert capsys.readouterr().out == stock(tiny_llama_folder, "[plan]>", do_sample=False)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"chat": True}, DataError, r"has no chat template; give plain text and leave chat out\."),
        ({"prompt": ""}, DataError, r"The prompt is empty; give some text to continue\."),
        ({"prompt": " \n"}, DataError, "The prompt is empty"),
        ({"temperature": -1.0}, DataError, r"The temperature is -1\.0; give 0 or more"),
        ({"budget": "1.5"}, BudgetError, "The budget 1.5 is not above 0 and at most 1"),
        ({"budget": "1layer"}, BudgetError, "ask for 2layers .* or more"),
        ({"max_new_tokens": 600}, DataError, "has 25 tokens, and 600 new ones go past the 512 positions"),
    ],
)
def test_what_is_refused(finished, capsys, options, error, message):
    with pytest.raises(error, match=message):
        generate(finished / "buddy", **{"prompt": PROMPT, "budget": "0.5", "max_new_tokens": 4, **options})
    assert capsys.readouterr().out == ""


def record(*passes: tuple[list[int], int]) -> SimpleNamespace:
    """One row's passes: executed layers of each token, and how many of them were sinks."""
    return SimpleNamespace(
        executed=[torch.tensor([executed]) for executed, _ in passes],
        sinks=[(torch.arange(len(executed)) < sinks)[None] for executed, sinks in passes],
        runs=[torch.eye(4)[number % 3].bool().expand(1, len(e), 4) for number, (e, _) in enumerate(passes)],
    )


def test_the_summary_counts_what_ran():
    passes = [([9, 9, 3, 5], 2), ([4], 0), ([2], 0), ([3], 0), ([3], 0)]
    assert summary(record(*passes), 3, 9) == (
        "Asked for 3 of 9 layers a token. Prompt: 3 / 4.0 / 5 layers (min / mean / max) (2 sink tokens at 9); "
        "4 decode steps: 2 / 3.0 / 4 layers (min / mean / max), 3 distinct plans."
    )
    assert summary(record(([9], 1), ([9], 1), ([2], 0), ([4], 0)), 3, 9) == (
        "Asked for 3 of 9 layers a token. Prompt: no routed token (1 sink token at 9); "
        "3 decode steps: 2 / 3.0 / 4 layers (min / mean / max) (1 sink token at 9), 2 distinct plans."
    )
    assert summary(record(([9], 1), ([9], 1)), 3, 9) == (
        "Asked for 3 of 9 layers a token. Prompt: no routed token (1 sink token at 9); "
        "1 decode step: no routed token (1 sink token at 9)."
    )
    assert summary(record(([9], 1)), 3, 9) == (
        "Asked for 3 of 9 layers a token. Prompt: no routed token (1 sink token at 9)."
    )
    assert summary(record(([3], 0), ([3], 0)), 3, 9) == (
        "Asked for 3 of 9 layers a token. Prompt: 3 / 3.0 / 3 layers (min / mean / max); "
        "1 decode step: 3 / 3.0 / 3 layers (min / mean / max), 1 distinct plan."
    )
