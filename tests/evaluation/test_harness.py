"""lm-eval's model `buddy`: HFLM's own scores at full depth, step-by-step decoding's below."""

import json
import sys
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from buddy.engine.model import RoutedLM
from buddy.errors import DataError, RunError
from buddy.evaluation.harness import BuddyLM
from buddy.evaluation.lm_eval import main
from buddy.evaluation.tasks import task_scores
from buddy.testing.subject import CONTEXT
from tests.documents import setup_cfg
from tests.engine.reference import Fickle, FickleGates, routed_tiny
from tests.evaluation.own_task import define
from tests.tiny import tiny_backbone

pytestmark = pytest.mark.slow

PAIRS = [
    ("Question: which?\nAnswer:", " this one"),
    ("Question: which?\nAnswer:", " that"),
    ("Question: which?\nAnswer:", " none of the two"),
    ("A", "b"),
    ("A", "c"),
    ("Ab", "c"),
    ("", "without any context"),
    ("Is it so?", " y"),
    ("Is it so?", " n"),
    ("long " * 120, " and cut from the left"),
]


def likelihoods(pairs):
    return [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]


@torch.no_grad()
def decoded(routed: RoutedLM, layers: int, context: list[int], continuation: list[int]) -> tuple[float, bool, int]:
    """Log-probability by step-by-step decoding: the context is the prompt, then each answer token is a step."""
    scores, greedy, ids, cache = [], True, torch.tensor([context]), None
    with routed.at(executed=[layers]) as record:
        for token in continuation:
            step = ids if cache is None else ids[:, -1:]
            output = routed.backbone.model(step, cache=cache, use_cache=True)
            cache, last = output.cache, output.logits[0, -1].log_softmax(-1)
            scores.append(last[token].item())
            greedy &= int(last.argmax()) == token
            ids = torch.cat([ids, torch.tensor([[token]])], 1)
    executed = torch.cat([each[0] for each in record.executed])
    return sum(scores), greedy, int(executed[routed.sink_tokens :].sum())


# At full depth


PROMPTS = {"token": {}, "prompt": {"prompt_plan": "shared", "reroute_every": None}, "second": {"reroute_every": 2}}
PLANS = PROMPTS | {"batch": {"batch_plan": "shared"}}


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("plans", PLANS)
def test_at_full_depth_scores_are_hflms_to_the_bit(batch_size, plans):
    stock = tiny_backbone("llama")
    theirs = HFLM(stock.model, tokenizer=stock.tokenizer, batch_size=batch_size)
    ours = BuddyLM(routed_tiny(**PLANS[plans]), 1.0, batch_size=batch_size)
    requests = likelihoods(PAIRS)
    assert ours.loglikelihood(requests, disable_tqdm=True) == theirs.loglikelihood(requests, disable_tqdm=True)


def test_at_full_depth_whole_texts_and_generated_ones_are_hflms():
    stock = tiny_backbone("llama")
    theirs, ours = HFLM(stock.model, tokenizer=stock.tokenizer, batch_size=2), BuddyLM(routed_tiny(), 1, batch_size=2)
    texts = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in ("some text", "long " * 150)]
    assert ours.loglikelihood_rolling(texts, disable_tqdm=True) == theirs.loglikelihood_rolling(
        texts, disable_tqdm=True
    )
    asked = {"until": ["\n"], "max_gen_toks": 8, "do_sample": False}
    prompts = [Instance("generate_until", {}, (text, asked), 0) for text in ("Say:", "And say something longer:", "Oh")]
    assert ours.generate_until(prompts, disable_tqdm=True) == theirs.generate_until(prompts, disable_tqdm=True)


# Below


@pytest.mark.parametrize(
    ("router", "options"),
    [
        (Fickle, {"policy": "hole"}),
        (Fickle, {"reroute_every": 3}),
        (Fickle, {"prompt_plan": "shared", "policy": "zero"}),
        (Fickle, {"prompt_plan": "shared", "reroute_every": None}),
        (Fickle, {"sink_tokens": 0}),
        (FickleGates, {}),
    ],
    ids=["hole", "every third", "shared prompt", "one plan", "no sinks", "layer by layer"],
)
def test_below_full_depth_scores_are_those_of_decoding(router, options):
    routed = routed_tiny(router=router, **options)
    pairs = [pair for pair in PAIRS if len(pair[0]) < 100]
    lm = BuddyLM(routed, 0.5, batch_size=4)
    found = lm.loglikelihood(likelihoods(pairs), disable_tqdm=True)
    for (context, continuation), (score, greedy) in zip(pairs, found, strict=True):
        tokens = lm.tok_encode(context) or [lm.prefix_token_id], lm.tok_encode(continuation)
        expected, chosen, _ = decoded(routed, 3, *tokens)
        assert score == pytest.approx(expected, abs=2e-4)
        assert greedy == chosen


COMPANY = {name: BuddyLM(routed_tiny(**options), 0.5, batch_tokens=64) for name, options in PROMPTS.items()}


@pytest.mark.parametrize("plans", PROMPTS)
@settings(max_examples=15, deadline=None)
@given(
    st.lists(
        st.tuples(st.text("ab \n", max_size=12).map("a".__add__), st.text("abc", min_size=1, max_size=5)),
        min_size=1,
        max_size=6,
    )
)
def test_a_score_does_not_depend_on_its_company(plans, pairs):
    lm = COMPANY[plans]
    together = lm.loglikelihood(likelihoods(pairs), disable_tqdm=True)
    alone = [lm.loglikelihood(likelihoods([pair]), disable_tqdm=True)[0] for pair in pairs]
    assert [score for score, _ in together] == pytest.approx([score for score, _ in alone], abs=2e-4)


def test_generation_spends_the_budget():
    lm = BuddyLM(routed_tiny(), 0.5, batch_size=2)
    asked = {"until": ["\n\n"], "max_gen_toks": 4, "do_sample": False}
    prompts = [Instance("generate_until", {}, (text, asked), 0) for text in ("One", "Two and more")]
    texts = lm.generate_until(prompts, disable_tqdm=True)
    with lm.routed.at(0.5):
        ids = torch.tensor([lm.tok_encode("One")])
        expected = lm.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, pad_token_id=0)
    assert texts[0] == lm.tok_decode(expected[0, 3:].tolist())
    assert set(lm.executed.tolist()) == {3}
    assert len(lm.executed) >= 2 + 11


def test_rows_that_have_ended_are_not_counted():
    lm, counts = BuddyLM(routed_tiny(), 0.5, batch_size=1), []
    ids = torch.tensor([lm.tok_encode("One")])
    with lm.routed.at(0.5):
        written = lm.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, pad_token_id=0)
    lm.model.generation_config.eos_token_id = written[0, -1].item()
    asked = {"until": ["\n\n"], "max_gen_toks": 8, "do_sample": False}
    prompts = [Instance("generate_until", {}, (text, asked), 0) for text in ("One", "Two and more")]
    for rows in (1, 2):
        lm.batch_size_per_gpu = rows
        lm.set_budget(0.5)
        lm.generate_until(prompts, disable_tqdm=True)
        counts.append(len(lm.executed))
    assert counts[0] == counts[1] < 2 + 11 + 2 * 7


@pytest.mark.parametrize("sinks", [0, 1, 2])
def test_layers_that_ran_are_counted_on_real_tokens(sinks):
    lm = BuddyLM(routed_tiny(sink_tokens=sinks), "4layers", batch_size=8)
    pairs = [("Question:", " a"), ("Question:", " b"), ("A much longer question:", " answer")]
    lm.loglikelihood(likelihoods(pairs), disable_tqdm=True)
    assert set(lm.executed.tolist()) == {4}
    rows = {len("Question: a") - 1, len("A much longer question: answer") - 1}  # the first two are one row
    assert len(lm.executed) == sum(length - sinks for length in rows)
    lm.set_budget(0.5)
    assert len(lm.executed) == 0


def test_batches_by_tokens():
    lm, seen = BuddyLM(routed_tiny(), 0.5, batch_tokens=40), []
    inner = lm.routed.forward
    lm.routed.forward = lambda ids, *args, **options: (seen.append(tuple(ids.shape)), inner(ids, *args, **options))[1]
    lm.loglikelihood(likelihoods([("x" * size, "y") for size in (60, 19, 18, 10, 9, 8, 7)]), disable_tqdm=True)
    assert seen == [(1, 60), (2, 19), (4, 10)]


@pytest.mark.parametrize("pair", [(" ", "a"), ("a", "")])
def test_an_item_without_words(pair):
    with pytest.raises(DataError, match="empty"):
        COMPANY["token"].loglikelihood(likelihoods([pair]), disable_tqdm=True)


# As a model of lm-eval


def test_it_is_registered():
    assert get_model("buddy") is BuddyLM
    (line,) = setup_cfg()["options.entry_points"]["lm_eval.models"].split("\n")[1:]
    assert line == f"buddy = {BuddyLM.__module__}:{BuddyLM.__name__}"


def test_from_a_run_folder(finished):
    lm = BuddyLM.create_from_arg_string(f"run={finished / 'buddy'},budget=0.5", {"batch_size": 2, "device": "cpu"})
    assert (lm.layers, lm.batch_size, lm.max_length) == (3, 2, CONTEXT)
    assert lm.get_model_info()["layers"] == 3
    assert BuddyLM(finished / "buddy", "5layers").layers == 5


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({}, "budget"),
        ({"run": "runs/x", "budget": 1}, "runs/x"),
        ({"run": "runs/x", "budget": 1, "softmax_dtyp": "float32"}, "'softmax_dtype'"),
    ],
)
def test_what_it_cannot_use(options, named):
    with pytest.raises(RunError, match=named):
        BuddyLM(**options)


def test_the_command_lm_eval_says_what_buddy_evaluate_says(finished, tmp_path, monkeypatch):
    items = [{"question": f"{n} or {n + 1}?", "choices": [str(n), str(n + 1)], "label": n % 2} for n in range(5)]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    (tmp_path / "tasks").mkdir()
    accuracy = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
    asks = "Q: {{question}}\nA:"
    define(tmp_path / "tasks", tmp_path / "items.jsonl", "quiz", doc_to_text=asks, metric_list=[accuracy])
    words = ["--model", "buddy", "--model_args", f"run={finished / 'buddy'},budget=0.5", "--tasks", "quiz"]
    words += ["--include_path", str(tmp_path / "tasks"), "--batch_size", "auto", "--limit", "4"]
    monkeypatch.setattr(sys, "argv", ["lm_eval", *words, "--output_path", str(tmp_path / "out.json")])
    monkeypatch.setattr("lm_eval.__main__.setup_logging", lambda: None)  # it would hold this test's error stream
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))  # seconds less
    main()
    (result,) = tmp_path.glob("out*.json")
    theirs = json.loads(result.read_text())
    ours = task_scores(finished / "buddy", ["quiz"], [0.5], limit=4, task_path=tmp_path / "tasks")["results"][0]
    assert theirs["results"]["quiz"]["acc,none"] == ours["value"]
    assert theirs["results"]["quiz"]["acc_stderr,none"] == pytest.approx(ours["stderr"])
    assert theirs["config"]["layers"] == 3
