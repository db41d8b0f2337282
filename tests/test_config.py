"""Recipes: found, overridden, checked with all mistakes at once, translated from 0.1, and read back as saved."""

import subprocess
import sys
from dataclasses import fields, replace
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
    RESERVED,
    AdapterSection,
    BackboneSection,
    ClassSpec,
    DataSection,
    ObjectiveSection,
    OptimizerSection,
    PredictorSection,
    Recipe,
    Rival,
    RouterSection,
    RoutingSection,
    TrainerKeywords,
    leaves,
    problems,
)

ROOT = Path(__file__).parents[1]
STORED = sorted(ROOT.glob("docs/comparison/**/recipe.yaml"))


def mistake_of(*overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe("quickstart", overrides)
    return str(caught.value)


def written(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text, "utf-8")
    return path


# Finding


@pytest.mark.parametrize("name", installed_recipes())
def test_an_installed_recipe_loads_and_reads_back_equal(name, tmp_path):
    recipe = load_recipe(name)
    assert not problems(recipe)
    assert load_recipe(written(tmp_path, to_yaml(recipe)), saved=True) == recipe
    text = recipe_path(name).read_text("utf-8")
    assert text.startswith("# ")
    assert f"buddy fit --recipe {name}\n" in text


@pytest.mark.parametrize("path", STORED, ids=lambda path: "-".join(path.parts[-4:-1]))
def test_a_recipe_that_0_1_saved_loads(path):
    old, recipe = yaml.safe_load(path.read_text("utf-8")), load_recipe(path, saved=True)
    assert recipe.trainer["max_steps"] == old["trainer"]["max_steps"]
    assert recipe.checkpoint_every == old["trainer"]["checkpoint_every"]
    assert recipe.trainer["gradient_clip_val"] == old["optimizer"]["clip"]
    assert recipe.optimizer.lr == old["optimizer"]["lr"]


def test_there_are_stored_recipes():
    assert len(STORED) > 20


def test_a_recipe_may_lie_anywhere_and_an_installed_name_wins(tmp_path, monkeypatch):
    path = written(tmp_path, "seed: 7")
    assert load_recipe(path) == load_recipe(str(path)) == replace(Recipe(), seed=7)
    for name in ("quickstart", "other"):
        (tmp_path / name).write_text("seed: 7")
    monkeypatch.chdir(tmp_path)
    assert (load_recipe("quickstart").seed, load_recipe("other").seed) == (0, 7)


@pytest.mark.parametrize(
    ("source", "name"), [("qwen2.5-0.5b", "qwen2.5-0.5b"), ("a/b/mine.v2.yaml", "mine.v2"), ("x.yml", "x")]
)
def test_recipe_name(source, name):
    assert recipe_name(source) == name


@pytest.mark.parametrize("source", ["quikstart", "no/quickstart.yaml"])
def test_an_unknown_recipe_has_a_suggestion(source):
    with pytest.raises(RecipeError, match="'quickstart'"):
        load_recipe(source)


@pytest.mark.parametrize("source", ["zzz", "a\0b", "x" * 5000, "."])
def test_what_is_no_recipe(source):
    with pytest.raises(RecipeError):
        load_recipe(source)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# only a comment",
        "- 1\n- 2",
        "quickstart",
        "seed: 1\ndata: [1, 2\n",
        "seed: 1\nseed: 2\n",
        "seed: !!python/name:os.system",
        "data: {source: '${'}",
        "data: {source: '${oc.env:HOME}'}",
        "data: {source: '${missing}'}",
        "seed: ${seed}",
        "data: {source: '\\${escaped}'}",
        "seed: ???",
        "a: " + "[" * 900 + "]" * 900,
        "output: \xff",
        "x" * 2**21,
    ],
)
def test_a_file_that_cannot_be_used(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(RecipeError):
        load_recipe(path)


# References


def test_a_file_of_ones_own_may_refer_to_its_keys(tmp_path):
    path = written(tmp_path, "data: {window: 80, prompt: 8}\noutput: runs/${data.window}-${seed}\nseed: 4")
    assert load_recipe(path).output == "runs/80-4"
    assert load_recipe(path, ["data.window=96"]).output == "runs/96-4", "overrides come first"
    assert load_recipe(written(tmp_path, "data: {window: '${data.prompt}5'}"), ["data.window=90"]).data.window == 90


def test_references_are_refused_in_saved_recipes_and_overrides(tmp_path):
    path = written(tmp_path, "data: {source: '${output}'}")
    with pytest.raises(RecipeError, match=r"data\.source"):
        load_recipe(path, saved=True)
    assert "data.source" in mistake_of("data.source=${output}")
    assert "HOME" not in to_yaml(load_recipe(written(tmp_path, "seed: 1")))


# Overriding


def test_overrides_lie_over_the_file_in_order():
    recipe = load_recipe("quickstart", ["budgets=[1.0,0.5]", "seed=1", "seed=2", "data={window: 99}"])
    assert (recipe.budgets, recipe.seed, recipe.data.window) == ([1.0, 0.5], 2, 99)
    assert recipe.data.prompt == load_recipe("quickstart").data.prompt


def test_numbers_become_what_the_key_holds():
    recipe = load_recipe("quickstart", ["trainer.max_steps=1e3", "optimizer.lr=1", "budgets=[1, 0.5]"])
    assert (recipe.trainer["max_steps"], recipe.optimizer.lr, recipe.budgets[0]) == (1000, 1.0, 1.0)
    assert [type(value) for value in (recipe.trainer["max_steps"], recipe.optimizer.lr)] == [int, float]


def test_an_empty_value_is_null():
    assert load_recipe("quickstart", ["ckpt_path="]).ckpt_path is None


@pytest.mark.parametrize("spelling", ["router=uniform", "router.name=uniform", "router={name: uniform}"])
def test_another_router_starts_from_empty_options(tmp_path, spelling):
    path = written(tmp_path, "router: {name: buddy, options: {hidden: 8}}")
    assert load_recipe(path, [spelling]).router == RouterSection("uniform")
    assert load_recipe(path, ["router.options.seed=3", spelling]).router == RouterSection("uniform", {"seed": 3})


def test_the_same_router_keeps_its_options(tmp_path):
    path = written(tmp_path, "router: {name: buddy, options: {hidden: 8}}")
    recipe = load_recipe(path, ["router=buddy", "router.options.a.b=1"])
    assert recipe.router.options == {"hidden": 8, "a": {"b": 1}}


def test_short_forms(tmp_path):
    recipe = load_recipe(written(tmp_path, "router: uniform\nadapter: {targets: q_proj}\nrivals: [full]"))
    assert (recipe.router, recipe.adapter.targets) == (RouterSection("uniform"), ["q_proj"])
    assert recipe.rivals == [Rival("full")]


def test_the_adapter_may_be_left_out_and_come_back():
    assert load_recipe("quickstart").adapter is None
    recipe = load_recipe("quickstart", ["adapter.rank=3"])
    assert recipe.adapter == AdapterSection(rank=3)
    assert override(recipe, ["adapter=null"], "it").adapter is None


# Rivals


def test_a_rival_has_overrides_of_its_own():
    rival = Rival("first", ("optimizer.lr=1e-2", "router.options.hidden=8", "trainer.max_steps=7"))
    recipe = replace(load_recipe("quickstart", ["router.options.hidden=4"]), rivals=[rival])
    other = with_router(recipe, rival)
    assert (other.router, other.optimizer.lr) == (RouterSection("first", {"hidden": 8}), 1e-2)
    assert (other.trainer["max_steps"], other.rivals) == (7, [rival])
    assert rival.label == "first[optimizer.lr=1e-2;hidden=8;trainer.max_steps=7]"
    assert with_router(recipe, "first") == replace(recipe, router=RouterSection("first"))
    assert with_router(recipe, "buddy") == recipe
    same = with_router(recipe, Rival("buddy", ("router.options.prior=none",)))
    assert same.router.options == {"hidden": 4, "prior": "none"}


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


def test_one_router_may_be_its_own_rival_at_another_rate():
    recipe = load_recipe("quickstart", ["rivals=[{name: buddy, overrides: [optimizer.lr=1e-3]}, buddy]"])
    assert [with_router(recipe, rival).optimizer.lr for rival in recipe.rivals] == [1e-3, 6e-3]


# Spellings of 0.1


def test_old_keys_are_read_under_their_new_names(tmp_path):
    old = "trainer: {nodes: 2, log_every: 3, checkpoint_every: 4, ckpt_path: a.ckpt}\noptimizer: {clip: 0}"
    for recipe in (
        load_recipe(written(tmp_path, old)),
        load_recipe(
            written(tmp_path, "seed: 0"),
            [
                "trainer={nodes: 2, log_every: 3}",
                "trainer.checkpoint_every=4",
                "trainer.ckpt_path=a.ckpt",
                "optimizer.clip=0",
            ],
        ),
    ):
        assert (recipe.trainer["num_nodes"], recipe.trainer["log_every_n_steps"]) == (2, 3)
        assert (recipe.checkpoint_every, recipe.ckpt_path) == (4, "a.ckpt")
        assert recipe.trainer["gradient_clip_val"] is None
        assert not {"nodes", "log_every", "checkpoint_every", "ckpt_path"} & {*recipe.trainer}
    assert load_recipe(written(tmp_path, old), ["trainer.num_nodes=5"]).trainer["num_nodes"] == 5
    assert load_recipe(written(tmp_path, "optimizer: {clip: 2}")).trainer["gradient_clip_val"] == 2.0


def test_a_rate_by_router_becomes_overrides_of_the_rivals(tmp_path):
    path = written(tmp_path, "rivals: [first, full]\noptimizer: {lr: 1.0e-3, lr_by_router: {first: 5.0e-3}}")

    def rates(*overrides: str) -> list[float]:
        recipe = load_recipe(path, overrides)
        return [recipe.optimizer.lr, *(with_router(recipe, rival).optimizer.lr for rival in recipe.rivals)]

    assert rates() == [1e-3, 5e-3, 1e-3]
    assert rates("optimizer.lr_by_router.buddy=2e-3") == [2e-3, 5e-3, 1e-3]
    assert rates("optimizer.lr=4e-3") == [4e-3, 4e-3, 4e-3], "a rate that is asked for holds for all"
    assert rates("optimizer.lr=4e-3", "optimizer.lr_by_router.buddy=2e-3") == [2e-3, 4e-3, 4e-3]
    assert rates("router=first", "rivals=[]") == [5e-3]


def test_several_rates_of_an_adapter_are_refused_with_the_way_out():
    assert load_recipe("quickstart", ["adapter={rank: 4, rates: []}"]).adapter == AdapterSection(rank=4)
    said = mistake_of("adapter.rates=[1e-2, 3e-3]")
    assert "adapter.rates" in said
    assert "rivals" in said


# The trainer


def test_a_trainer_takes_what_lightning_takes():
    overrides = ["trainer.precision=bf16-mixed", "trainer.accumulate_grad_batches=2", "trainer.val_check_interval=0.5"]
    recipe = load_recipe("quickstart", [*overrides, "trainer.max_time=00:01:00:00", "trainer.limit_val_batches=3"])
    assert recipe.trainer["precision"] == "bf16-mixed"
    assert (recipe.trainer["max_steps"], recipe.trainer["devices"]) == (100, 1), "beside what every recipe has"
    assert flatten(recipe)["trainer.accumulate_grad_batches"] == 2


@pytest.mark.parametrize(
    ("override", "words"),
    [
        *((f"trainer.{key}=1", f"trainer.{key}") for key in RESERVED),
        ("trainer.acumulate_grad_batches=2", "'accumulate_grad_batches'"),
        ("trainer.accumulate_grad_batches=many", "trainer.accumulate_grad_batches"),
        ("trainer.accumulate_grad_batches=true", "trainer.accumulate_grad_batches"),
        ("trainer.limit_val_batches=[1]", "trainer.limit_val_batches"),
        ("trainer.precision=16-true", "trainer.precision"),
        ("trainer.precision=eight", "trainer.precision"),
        ("trainer.max_step=4", "'max_steps'"),
        ("trainer.max_steps=0", "trainer.max_steps"),
        ("trainer.max_steps=1.5", "trainer.max_steps"),
        ("trainer.gradient_clip_val=-1", "trainer.gradient_clip_val"),
        ("trainer=4", "trainer"),
    ],
)
def test_what_no_trainer_takes(override, words):
    assert words in mistake_of(override)


def test_a_recipe_loads_without_lightning():
    code = "import sys; from buddy.config import load_recipe; load_recipe('quickstart'); print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert not {"lightning", "torch", "transformers"} & {*found.stdout.split()}


def test_callbacks_and_logger_are_classes_by_their_path():
    recipe = load_recipe(
        "quickstart",
        [
            "callbacks=[{class_path: a.B, init_args: {monitor: val/kl}}, {class_path: a.B}]",
            "logger.class_path=lightning.pytorch.loggers.CSVLogger",
        ],
    )
    assert recipe.callbacks == [ClassSpec("a.B", {"monitor": "val/kl"}), ClassSpec("a.B")]
    assert recipe.logger == ClassSpec("lightning.pytorch.loggers.CSVLogger")
    for wrong in ("callbacks=[a.B]", "callbacks=[{class_path: B}]", "callbacks=[{class_path: a.B, args: {}}]"):
        assert "callbacks" in mistake_of(wrong)
    for wrong in ("logger={}", "logger.init_args={}", "logger=csv", "logger={class_path: a.B, init_args: [1]}"):
        assert "logger" in mistake_of(wrong)


# Checking


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("window=4", "'data.window'"),
        ("windw=4", "'data.window'"),
        ("data.promt=4", "'prompt'"),
        ("zzz=4", "'zzz'"),
        ("data=4", "data"),
        ("data=[4]", "data"),
        ("data.window=abc", "data.window"),
        ("data.window=true", "data.window"),
        ("data.window='12'", "data.window"),
        ("data.window=1.5", "data.window"),
        ("backbone.trust_remote_code=perhaps", "backbone.trust_remote_code"),
        ("optimizer.lr=fast", "optimizer.lr"),
        ("optimizer.lr=" + "1" * 400, "optimizer.lr"),
        ("optimizer.lr=.nan", "optimizer.lr"),
        ("optimizer.lr=.inf", "optimizer.lr"),
        ("optimizer.lr=0", "optimizer.lr"),
        ("seed=null", "seed"),
        ("seed=-1", "seed"),
        ("seed=4294967296", "seed"),
        ("seed=" + "1" * 5000, "seed"),
        ("seed=0x" + "f" * 4000, "seed"),
        ("seed=[1", "seed"),
        ("seed=" + "[" * 5000, "nested"),
        ("backbone.name=on", "backbone.name"),
        ("backbone.revision=1e5", "backbone.revision"),
        ("backbone.dtype=float61", "'float16'"),
        ("routing.pool=valu", "'value'"),
        ("objective.estimator=perturbd", "'perturbed'"),
        ("routing.sink_tokens=-1", "routing.sink_tokens"),
        ("routing.sink_tokens=256", "data.window"),
        ("data.prompt=256", "data.window"),
        ("data.source=' '", "data.source"),
        ("data.train_sources=a", "data.train_sources"),
        ("data.train_sources=['']", "data.train_sources"),
        ('output="a\\0b"', "output"),
        ('router.options.a="\\ud800"', "router.options"),
        ("objective.plans=3", "objective.plans"),
        ("objective.plans=0", "objective.plans"),
        ("objective.kl=0", "objective.ce"),
        ("predictor={name: regress, cap: 0.2}", "predictor.cap"),
        ("predictor={name: grpo, quality: 0, cost: 0}", "predictor.cost"),
        ("budgets=[]", "budgets"),
        ("budgets=[1.5]", "budgets"),
        ("budgets=[0]", "budgets"),
        ("budgets=[.nan]", "budgets"),
        ("budgets=[0.5,0.5]", "budgets"),
        ("budgets=0.5", "budgets"),
        ("budgets=[a]", "budgets"),
        ("budgets[0]=0.5", "budgets[0]"),
        ("budgets.0=0.5", "budgets"),
        ("adapter.targets=[1]", "adapter.targets"),
        ("adapter.targets=[]", "adapter.targets"),
        ("adapter.dropout=0.95", "adapter.dropout"),
        ("router.options=[1]", "router.options"),
        ("router.options={1: 2}", "router.options"),
        ("router.options.hidden=???", "hidden"),
        ("data.window", "data.window"),
        ("=3", "key=value"),
        ("", "key=value"),
        ("data..window=3", "key=value"),
    ],
)
def test_one_mistake_is_one_line_that_names_the_key(override, words):
    message = mistake_of(override)
    assert words in message
    assert "\n" not in message


def test_all_mistakes_at_once(tmp_path):
    path = written(tmp_path, "sed: 1\ndata: {window: wide, promt: 3}\nobjective: {plans: 5}")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, ["trainer.devices=0", "data"])
    lines = str(caught.value).split("\n  - ")[1:]
    assert len(lines) == 6
    for key in ("'sed'", "data.window", "'data.promt'", "'data'", "trainer.devices", "objective.plans"):
        assert sum(key in line for line in lines) == 1


def test_a_value_of_the_wrong_type_raises_no_second_complaint():
    assert "data.window must be" in mistake_of("data.window=wide", "data.prompt=999")


def test_problems_of_a_recipe_made_in_python():
    wrong = replace(Recipe(), seed="x", budgets=[2.0], data=DataSection(window=True), callbacks=[ClassSpec("B")])
    found = problems(wrong)
    assert [sum(key in text for text in found) for key in ("seed", "budgets", "data.window", "callbacks")] == [1] * 4


# Saving


def test_flatten_gives_scalars_under_dotted_keys():
    flat = flatten(load_recipe("quickstart", ["router.options={hidden: 8, parts: [a, b], bound: null}"]))
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
BOUNDS = {"ge": "min_value", "gt": "min_value", "le": "max_value"}
PATHS = st.from_regex(r"[a-z_]{1,5}(\.[A-Za-z_]{1,5}){1,2}", fullmatch=True)
CLASSES = st.builds(ClassSpec, PATHS, OPTIONS)
RATES = st.floats(1e-9, 1e9).map(lambda rate: (f"optimizer.lr={rate}",))
RIVALS = st.lists(st.builds(Rival, WORD, st.just(()) | RATES), max_size=3, unique=True)


def values_of(item) -> st.SearchStrategy:
    """What a field accepts, by the bounds of its declaration."""
    bounds, kind = item.metadata, item.type
    if "choices" in bounds:
        return st.sampled_from(bounds["choices"])
    limits = {BOUNDS[name]: value for name, value in bounds.items() if name in BOUNDS}
    if kind in (int, int | None):
        whole = st.integers(**{"max_value": 2**40, **limits})
        return whole if kind is int else st.none() | whole
    if kind in (float, float | None):
        return st.floats(**{"max_value": 1e300, **limits}, exclude_min="gt" in bounds)
    if item.name == "options":
        return OPTIONS
    if item.name == "estimator":
        return st.sampled_from(["perturbed", "straight-through", "my_module:MyEstimator"])
    if kind == list[str]:
        return st.lists(WORD, min_size=bounds.get("least_items", 0), max_size=3, unique=True)
    return {bool: st.booleans(), str: WORD}.get(kind, st.none() | WORD)


def section(cls) -> st.SearchStrategy:
    return st.builds(cls, **{item.name: values_of(item) for item in fields(cls)})


RECIPES = st.builds(
    Recipe,
    backbone=section(BackboneSection),
    data=section(DataSection).map(lambda data: replace(data, window=data.window + data.prompt)),
    budgets=st.lists(st.floats(0, 1, exclude_min=True), min_size=1, max_size=5, unique=True),
    routing=section(RoutingSection).map(lambda r: replace(r, sink_tokens=r.sink_tokens % 2, policy="fill")),
    router=section(RouterSection),
    rivals=RIVALS,
    objective=section(ObjectiveSection).map(lambda o: replace(o, kl=o.kl + 0.5, plans=2 * o.plans)),
    optimizer=section(OptimizerSection),
    adapter=st.none() | section(AdapterSection),
    predictor=section(PredictorSection).map(lambda p: replace(p, cap=1.0, quality=p.quality + 1)),
    trainer=section(TrainerKeywords).map(vars),
    callbacks=st.lists(CLASSES, max_size=2),
    logger=st.none() | CLASSES,
    ckpt_path=st.none() | WORD,
    checkpoint_every=st.integers(1, 2**40),
    seed=st.integers(0, 2**32 - 1),
    output=WORD,
)


# hypothesis sometimes says of OPTIONS, wrongly, that it does not recurse
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisDeprecationWarning")
@settings(deadline=None, max_examples=25)
@given(recipe=RECIPES)
def test_a_saved_recipe_reads_back_equal(tmp_path_factory, recipe):
    path = tmp_path_factory.getbasetemp() / "saved.yaml"
    path.write_text(to_yaml(recipe), "utf-8")
    assert load_recipe(path, saved=True) == load_recipe(path) == recipe


KEYS = st.sampled_from(
    [key for key, *_ in leaves(Recipe(adapter=AdapterSection()))]
    + ["router", "data", "adapter", "trainer", "logger", "budgets[0]", "router.options.a", "optimizer.lr_by_router"]
    + ["rivals", "adapter.rates", "optimizer.clip", "trainer.nodes", "trainer.ckpt_path"]
)
VALUES = st.text(max_size=20) | st.text(alphabet="[]{}:,&*!|>-?'\"#%@`$.0123e ~=", max_size=12)


@settings(deadline=None, max_examples=100)
@example(overrides=["router.options.a=" + "[" * 200 + "]" * 200])
@example(overrides=["router.options={<<: 3}"])
@example(overrides=["router.options.a=&a [*a]"])
@example(overrides=["router.options.a=!!timestamp 2001-99-99"])
@example(overrides=["router.options.a=!!set {a}"])
@example(overrides=["router=3", "router.options.a=1"])
@example(overrides=["optimizer=3", "optimizer.lr=1", "optimizer.lr_by_router={a: 1}"])
@example(overrides=["trainer=[3]", "optimizer.clip=1"])
@given(overrides=st.lists(st.text(max_size=30) | st.builds("{}={}".format, KEYS, VALUES), max_size=4))
def test_any_override_gives_a_recipe_or_a_recipe_error(overrides):
    try:
        recipe = load_recipe("quickstart", overrides)
    except RecipeError as error:
        assert str(error).startswith("The recipe quickstart ")  # noqa: PT017 - both outcomes are checked
    else:
        assert isinstance(recipe, Recipe)
        assert flatten(recipe)
        assert to_yaml(recipe)
