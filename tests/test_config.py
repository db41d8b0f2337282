"""Recipes: found, overridden, checked with all mistakes at once, translated from 0.1, and read back as saved."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from buddy.config import (
    flatten,
    installed_recipes,
    load_recipe,
    override,
    recipe_name,
    recipe_path,
    to_yaml,
    with_router,
)
from buddy.errors import RecipeError
from buddy.schema import (
    COMPLETE,
    RESERVED,
    AdapterSection,
    BackboneSection,
    ClassSpec,
    DataSection,
    OptimizerSection,
    Recipe,
    Rival,
    RouterSection,
    leaves,
    problems,
)

ROOT = Path(__file__).parents[1]
STORED = sorted(ROOT.glob("docs/comparison/**/recipe.yaml"))
assert len(STORED) > 20


def mistake_of(*overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe("quickstart", overrides)
    return str(caught.value)


@pytest.fixture
def written(tmp_path):
    """Writes a recipe file."""

    def written(text: str | bytes) -> Path:
        path = tmp_path / "mine.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return written


# Finding


@pytest.mark.parametrize("name", installed_recipes())
def test_an_installed_recipe_loads_and_reads_back_equal(name, written):
    recipe = load_recipe(name)
    assert not problems(recipe)
    assert load_recipe(written(to_yaml(recipe)), saved=True) == recipe
    assert f"buddy fit --recipe {name}\n" in recipe_path(name).read_text("utf-8")


def test_a_recipe_may_lie_anywhere_and_an_installed_name_wins(tmp_path, monkeypatch):
    for name in ("quickstart", "other"):
        (tmp_path / name).write_text("seed: 7")
    monkeypatch.chdir(tmp_path)
    assert load_recipe("other") == load_recipe(tmp_path / "other") == replace(Recipe(), seed=7)
    assert load_recipe("quickstart").seed == 0
    assert [recipe_name(path) for path in ("qwen2.5-0.5b", "a/b/mine.v2.yaml", "x.yml")] == [
        *("qwen2.5-0.5b", "mine.v2", "x")
    ]


@pytest.mark.parametrize("source", ["quikstart", "no/quickstart.yaml", "zzz", "a\0b", "x" * 5000])
def test_an_unknown_recipe(source):
    with pytest.raises(RecipeError, match="quickstart"):
        load_recipe(source)


@pytest.mark.parametrize(
    "text",
    [
        *("", "# only a comment", "- 1\n- 2", "quickstart", "seed: 1\ndata: [1, 2\n", "seed: 1\nseed: 2\n"),
        *("data: {source: '${'}", "data: {source: '${oc.env:HOME}'}", "data: {source: '${missing}'}", "seed: ${seed}"),
        *('output: "\\x24{oc.env:HOME}"', "seed: {'${oc.env:HOME}': 1}", "output: '${oc.${router.name}:HOME}'"),
        *("data: {source: '\\${escaped}'}", "seed: ???", "a: " + "[" * 900 + "]" * 900, b"output: \xff", "x" * 2**21),
    ],
)
def test_a_file_that_cannot_be_used(written, text):
    with pytest.raises(RecipeError, match=r"mine\.yaml"):
        load_recipe(written(text))


# References


def test_a_file_of_ones_own_may_refer_to_its_keys(written):
    path = written("data: {window: 80, prompt: 8}\noutput: runs/${data.window}-${seed}\nseed: 4")
    assert load_recipe(path).output == "runs/80-4"
    assert load_recipe(path, ["data.window=96"]).output == "runs/96-4", "overrides come first"
    assert (
        load_recipe(written("data: {window: 80, prompt: '${seed}', batch_size: 2}  # a: b\nseed: 4")).data.prompt == 4
    )
    assert load_recipe(written("output: '${router.name}: second'")).output == "buddy: second"
    timed = load_recipe(written("trainer: {val_check_interval: '00:15:00'}"))
    assert timed.trainer["val_check_interval"] == "00:15:00"


def test_references_are_refused_in_saved_recipes_and_overrides(written):
    with pytest.raises(RecipeError, match=r"data\.source"):
        load_recipe(written("data: {source: '${output}'}"), saved=True)
    assert "data.source" in mistake_of("data.source=${output}")


# Overriding


def test_overrides_lie_over_the_file_in_order():
    recipe = load_recipe("quickstart", ["budgets=[1, 0.5]", "seed=1", "seed=2", "data={window: 99}", "ckpt_path="])
    assert (recipe.budgets, recipe.seed, recipe.data.window, recipe.ckpt_path) == ([1.0, 0.5], 2, 99, None)
    assert recipe.data.prompt == load_recipe("quickstart").data.prompt
    recipe = load_recipe("quickstart", ["trainer.max_steps=1e3", "optimizer.lr=1"])
    assert [(type(n), n) for n in (recipe.trainer["max_steps"], recipe.optimizer.lr)] == [(int, 1000), (float, 1.0)]


@pytest.mark.parametrize("spelling", ["router=uniform", "router.name=uniform", "router={name: uniform}"])
def test_another_router_starts_from_empty_options(written, spelling):
    path = written("router: {name: buddy, options: {hidden: 8}}")
    assert load_recipe(path, [spelling]).router == RouterSection("uniform")
    assert load_recipe(path, ["router.options.seed=3", spelling]).router == RouterSection("uniform", {"seed": 3})
    same = load_recipe(path, ["router=buddy", "router.options.a.b=1"])
    assert same.router.options == {"hidden": 8, "a": {"b": 1}}


def test_short_forms_and_a_section_that_may_be_null(written):
    recipe = load_recipe(written("router: uniform\nadapter: {targets: q_proj}\nrivals: [full]"))
    assert (recipe.router, recipe.adapter.targets) == (RouterSection("uniform"), ["q_proj"])
    assert recipe.rivals == [Rival("full")]
    assert override(recipe, ["adapter=null"], "it").adapter is None
    assert load_recipe("quickstart", ["adapter.rank=3"]).adapter == AdapterSection(rank=3)


# Rivals


def test_a_rival_has_overrides_of_its_own():
    rival = Rival("first", ("optimizer.lr=1e-2", "router.options.hidden=8", "trainer.max_steps=7"))
    recipe = replace(load_recipe("quickstart", ["router.options.hidden=4"]), rivals=[rival])
    other = with_router(recipe, rival)
    assert (other.router, other.optimizer.lr) == (RouterSection("first", {"hidden": 8}), 1e-2)
    assert (other.trainer["max_steps"], other.rivals) == (7, [rival])
    assert rival.label == "first[optimizer.lr=1e-2;hidden=8;trainer.max_steps=7]"
    assert with_router(recipe, Rival("first")) == replace(recipe, router=RouterSection("first"))
    assert with_router(recipe, Rival("buddy")) == recipe
    same = with_router(recipe, Rival("buddy", ("router.options.prior=none",)))
    assert same.router.options == {"hidden": 4, "prior": "none"}


def test_one_router_may_be_its_own_rival_at_another_rate():
    recipe = load_recipe("quickstart", ["rivals=[{name: buddy, overrides: [optimizer.lr=1e-3]}, buddy]"])
    assert [with_router(recipe, rival).optimizer.lr for rival in recipe.rivals] == [1e-3, 6e-3]


@pytest.mark.parametrize(
    ("rival", "key"),
    [
        ("{name: first, overrides: [optimizer.lrr=1]}", "optimizer.lrr"),
        ("{name: first, overrides: [optimizer.lr=-1]}", "optimizer.lr"),
        ("{name: first, overrides: [optimizer.lr]}", "optimizer.lr"),
        ("{name: first, overrides: [data.window=9]}", "data.window"),
        ("{name: first, overrides: [router=uniform]}", "router"),
        ("{name: first, overrides: [router.name=uniform]}", "router.name"),
        ("{name: first, overrides: [trainer.devices=2]}", "trainer.devices"),
        ("{name: first, overrides: [trainer.nodes=2]}", "trainer.nodes"),
        ("{name: first, overrides: [trainer.ckpt_path=a.ckpt]}", "trainer.ckpt_path"),
        ("{name: first, overrides: 3}", "overrides"),
        ("{nme: first}", "nme"),
        ("''", "name"),
        ("3", "rivals"),
        ("full, full", "full"),
        ("{name: a, overrides: [seed=1]}, {name: a, overrides: [seed=1]}", "more than once"),
    ],
)
def test_a_rival_that_cannot_be(rival, key):
    assert key in mistake_of(f"rivals=[{rival}]")


# Spellings of 0.1


@pytest.mark.parametrize("path", STORED, ids=lambda path: "-".join(path.parts[-4:-1]))
def test_a_recipe_that_0_1_saved_loads(path):
    old, recipe = yaml.safe_load(path.read_text("utf-8")), load_recipe(path, saved=True)
    assert recipe.trainer["max_steps"] == old["trainer"]["max_steps"]
    assert recipe.checkpoint_every == old["trainer"]["checkpoint_every"]
    assert recipe.trainer["gradient_clip_val"] == old["optimizer"]["clip"]
    assert recipe.optimizer.lr == old["optimizer"]["lr"]


def test_old_keys_are_read_under_their_new_names(written):
    old = written("trainer: {nodes: 2, log_every: 3, checkpoint_every: 4, ckpt_path: a.ckpt}\noptimizer: {clip: 0}")
    words = ["trainer={nodes: 2, log_every: 3}", "trainer.checkpoint_every=4", "trainer.ckpt_path=a.ckpt"]
    recipe = load_recipe(old)
    assert recipe == override(Recipe(), [*words, "optimizer.clip=0"], "it")
    assert recipe.trainer == {
        **Recipe().trainer,
        **{"num_nodes": 2, "log_every_n_steps": 3, "gradient_clip_val": None},
    }
    assert (recipe.checkpoint_every, recipe.ckpt_path) == (4, "a.ckpt")
    assert load_recipe(old, ["trainer.num_nodes=5"]).trainer["num_nodes"] == 5


def test_removed_keys_are_ignored_where_they_are_empty():
    recipe = load_recipe("quickstart", ["adapter={rank: 4, rates: []}", "optimizer.lr_by_router={}"])
    assert recipe.adapter == AdapterSection(rank=4)
    for key, value in (("adapter.rates", "[1e-2, 3e-3]"), ("optimizer.lr_by_router", "{first: 1e-2}")):
        assert f"'{key}'" in mistake_of(f"{key}={value}")


# The trainer, callbacks and logger


def test_a_trainer_takes_what_lightning_takes():
    overrides = ["trainer.precision=bf16-mixed", "trainer.accumulate_grad_batches=2", "trainer.val_check_interval=0.5"]
    recipe = load_recipe("quickstart", [*overrides, "trainer.max_time=00:01:00:00", "trainer.limit_val_batches=3"])
    assert recipe.trainer["precision"] == "bf16-mixed"
    assert (recipe.trainer["max_steps"], recipe.trainer["devices"]) == (100, 1), "beside what every recipe has"
    assert flatten(recipe)["trainer.accumulate_grad_batches"] == 2


def test_callbacks_and_logger_are_classes_by_their_path():
    callbacks = "callbacks=[{class_path: a.B, init_args: {monitor: val/kl}}, {class_path: a.B}]"
    recipe = load_recipe("quickstart", [callbacks, "logger.class_path=lightning.pytorch.loggers.CSVLogger"])
    assert recipe.callbacks == [ClassSpec("a.B", {"monitor": "val/kl"}), ClassSpec("a.B")]
    assert recipe.logger == ClassSpec("lightning.pytorch.loggers.CSVLogger")


# Checking


WRONG = {  # values that a key refuses
    "trainer.limit_val_batches": ["[1]"],
    "trainer.precision": ["16-true"],
    "trainer.max_steps": ["-1", "1.5"],
    "trainer.accumulate_grad_batches": ["true", "0", "1.5"],
    "trainer.limit_train_batches": ["0", "0.0"],
    "trainer.val_check_interval": ["0", "-1"],
    "trainer.gradient_clip_val": ["-1"],
    "trainer": ["4"],
    "callbacks": ["[a.B]"],
    "logger": ["csv"],
    "data": ["[4]"],
    "data.window": ["abc", "true", "'12'"],
    "data.source": ["' '"],
    "data.train_sources": ["['']"],
    "backbone.trust_remote_code": ["perhaps"],
    "backbone.name": ["on"],
    "optimizer.lr": ["fast", "1" * 400, ".nan", ".inf", "0"],
    "seed": ["null", "4294967296", "0x" + "f" * 4000, "[1"],
    "output": ['"a\\0b"'],
    "router.options": ["{1: 2}"],
    "objective.plans": ["3"],
    "budgets": ["[]", "0.5", "[0.5,0.5]"],
    "budgets[0]": ["0.5"],
    "adapter.targets": ["[1]", "[]"],
    "adapter.dropout": ["0.95"],
    "bridge.rank": ["0", "8.5"],
    "bridge.ridge": ["-1"],
    "bridge.windows": ["0"],
    "bridge.steps": ["-1"],
    "bridge.lr": ["0"],
    "bridge.depth": ["3"],
    **{f"trainer.{key}": ["1"] for key in RESERVED},
}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        *((f"{key}={value}", key) for key, values in WRONG.items() for value in values),
        ("trainer.acumulate_grad_batches=2", "'accumulate_grad_batches'"),
        ("trainer.max_step=4", "'max_steps'"),
        ("callbacks=[{class_path: B}]", "callbacks[0].class_path"),
        ("callbacks=[{class_path: a.B, args: {}}]", "callbacks[0].args"),
        ("logger={}", "logger.class_path"),
        ("logger={class_path: a.B, init_args: [1]}", "logger.init_args"),
        ("window=4", "'data.window'"),
        ("windw=4", "'data.window'"),
        ("data.promt=4", "'prompt'"),
        ("zzz=4", "'zzz'"),
        ("seed=" + "[" * 1500, "nested"),
        ("backbone.dtype=float61", "'float16'"),
        ("objective.estimator=perturbd", "'perturbed'"),
        ("routing.sink_tokens=256", "data.window"),
        ("routing.sink_tokens=65", "data.prompt"),
        ("data={window: 2, prompt: 1}", "routing.sink_tokens"),
        ("trainer.max_epochs=0", "trainer.max_steps=0"),
        ("data.prompt=256", "data.window"),
        ('router.options.a="\\ud800"', "router.options.a"),
        ("router.options={a: 1, b: .nan}", "router.options.b"),
        ("objective.kl=0", "objective.ce"),
        ("predictor={name: regress, cap: 0.2}", "predictor.cap"),
        ("predictor={name: grpo, quality: 0, cost: 0}", "predictor.cost"),
        ("budgets=[1.5]", "budgets[0]"),
        ("budgets.0=0.5", "budgets"),
        ("router.options.hidden=???", "hidden"),
        ("data.window", "data.window"),
        ("=3", "key=value"),
        ("data..window=3", "key=value"),
    ],
)
def test_one_mistake_is_one_line_that_names_the_key(override, words):
    message = mistake_of(override)
    assert words in message
    assert "\n" not in message


def test_all_mistakes_at_once(written):
    path = written("sed: 1\ndata: {window: wide, promt: 3}\nobjective: {plans: 5}")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, ["trainer.devices=0", "data", "data.prompt=999"])
    lines = str(caught.value).split("\n  - ")[1:]
    assert len(lines) == 6, "data.prompt is not compared with a window of the wrong type"
    for key in ("'sed'", "data.window", "'data.promt'", "'data'", "trainer.devices", "objective.plans"):
        assert sum(key in line for line in lines) == 1


def test_problems_of_a_recipe_made_in_python():
    wrong = replace(Recipe(), seed="x", budgets=[2.0], data=DataSection(window=True), callbacks=[ClassSpec("B")])
    found = problems(wrong)
    assert [sum(key in text for text in found) for key in ("seed", "budgets", "data.window", "callbacks")] == [1] * 4


# Saving


def test_flatten_gives_scalars_under_dotted_keys():
    flat = flatten(load_recipe("quickstart", ["bridge=null", "router.options={hidden: 8, parts: [a, b], bound: null}"]))
    assert (flat["router.options.hidden"], flat["router.options.parts"]) == (8, "[a, b]")
    assert (flat["router.options.bound"], flat["budgets"]) == ("null", "[1.0, 0.875, 0.75, 0.625, 0.5]")
    assert flat.keys() >= {key for key, *_ in leaves(Recipe())} - {"router.options"}
    assert all(isinstance(value, bool | int | float | str) for value in flat.values())


WORD = st.text(st.characters(exclude_characters="\0$", exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    lambda text: text.strip() and text != "???"
)
PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | WORD
OPTIONS = st.dictionaries(
    WORD, st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORD, inner, max_size=3))
)
RATES = st.floats(1e-300, 1e300)


# hypothesis sometimes says of OPTIONS, wrongly, that it does not recurse
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisDeprecationWarning")
@settings(deadline=None, max_examples=25)
@given(options=OPTIONS, words=st.lists(WORD, min_size=1, max_size=3, unique=True), rate=RATES, whole=st.booleans())
def test_a_saved_recipe_reads_back_equal(tmp_path_factory, options, words, rate, whole):
    recipe = replace(
        COMPLETE if whole else Recipe(),
        backbone=BackboneSection(words[0], revision=words[-1]),
        data=DataSection(words[0], train_sources=words),
        budgets=[min(rate, 1.0)],
        router=RouterSection(words[0], options),
        rivals=[Rival(word, (f"optimizer.lr={rate}",)[:whole]) for word in words],
        optimizer=OptimizerSection(rate),
        callbacks=[ClassSpec("a.B", options)],
        logger=ClassSpec("a.b.C", options) if whole else None,
        output=words[-1],
    )
    path = tmp_path_factory.getbasetemp() / "saved.yaml"
    path.write_text(to_yaml(recipe), "utf-8")
    assert load_recipe(path, saved=True) == load_recipe(path) == recipe


KEYS = [key for key, *_ in leaves(COMPLETE)]
KEYS += ["router", "data", "adapter", "trainer", "logger", "budgets[0]", "router.options.a", "rivals"]
KEYS += ["adapter.rates", "optimizer.clip", "trainer.nodes", "trainer.ckpt_path"]
VALUES = st.text(max_size=20) | st.text(alphabet="[]{}:,&*!|>-?'\"#%@`$.0123e ~=", max_size=12)
WORDS = st.text(max_size=30) | st.builds("{}={}".format, st.sampled_from(KEYS), VALUES)


@pytest.mark.slow
@settings(deadline=None, max_examples=40)
@example(overrides=["router.options.a=" + "[" * 200 + "]" * 200])
@example(overrides=["router.options={<<: 3}"])
@example(overrides=["router.options.a=&a [*a]"])
@example(overrides=["router.options.a=!!timestamp 2001-99-99"])
@example(overrides=["router.options.a=!!set {a}"])
@example(overrides=["router=3", "router.options.a=1"])
@example(overrides=["optimizer=3", "optimizer.lr=1"])
@example(overrides=["trainer=[3]", "optimizer.clip=1"])
@given(overrides=st.lists(WORDS, max_size=4))
def test_any_override_gives_a_recipe_or_a_recipe_error(overrides):
    try:
        recipe = load_recipe("quickstart", overrides)
    except RecipeError as error:
        assert str(error).startswith("The recipe quickstart ")  # noqa: PT017 - both outcomes are checked
    else:
        assert isinstance(recipe, Recipe)
        assert flatten(recipe)
        assert to_yaml(recipe)
