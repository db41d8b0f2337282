"""Recipes: found, overridden, checked with all mistakes at once, and read back as they were saved."""

from dataclasses import fields, replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from buddy import config as module
from buddy.config import (
    AdapterSection,
    BackboneSection,
    DataSection,
    ObjectiveSection,
    OptimizerSection,
    Recipe,
    RouterSection,
    RoutingSection,
    TrainerSection,
    copy_recipe,
    flatten,
    leaves,
    list_recipes,
    load_recipe,
    recipe_name,
    to_yaml,
    with_router,
)
from buddy.errors import RecipeError
from tests.recovery.disks import FailingDisk


def mistakes_of(*overrides: str) -> str:
    with pytest.raises(RecipeError, match=r"mistake|nested") as caught:
        load_recipe("quickstart", overrides)
    return str(caught.value)


def written(folder, text: str):
    path = folder / "mine.yaml"
    path.write_text(text, "utf-8")
    return path


# Finding


def test_installed_recipes_load_and_say_what_they_are():
    listed = {recipe.name: recipe.summary for recipe in list_recipes()}
    assert {"quickstart", "qwen2.5-0.5b", "gpu"} <= set(listed)
    for name, summary in listed.items():
        assert summary.endswith(".")
        assert load_recipe(name).budgets[0] == 1.0
        assert f"buddy fit --recipe {name}\n" in module.recipe_path(name).read_text("utf-8")


def test_quickstart_has_its_rivals():
    assert load_recipe("quickstart").rivals == ["shortgpt", "uniform", "random", "full"]


def test_recipe_may_lie_anywhere(tmp_path):
    path = written(tmp_path, "seed: 7")
    assert load_recipe(path) == load_recipe(str(path)) == replace(Recipe(), seed=7)


def test_an_installed_name_wins_over_a_file_in_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "quickstart").write_text("seed: 7")
    (tmp_path / "other").write_text("seed: 7")
    monkeypatch.chdir(tmp_path)
    assert load_recipe("quickstart").seed == 0
    assert load_recipe("other").seed == 7


@pytest.mark.parametrize(
    ("source", "name"), [("qwen2.5-0.5b", "qwen2.5-0.5b"), ("a/b/mine.v2.yaml", "mine.v2"), ("x.yml", "x")]
)
def test_recipe_name(source, name):
    assert recipe_name(source) == name


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("quikstart", "no recipe named 'quikstart' .*gpu, quickstart, .*did you mean 'quickstart'"),
        ("no/quickstart.yaml", "no recipe file 'no/quickstart.yaml' .*did you mean 'quickstart'"),
        ("zzz", "no recipe named 'zzz' .installed are .*YAML file.\\.$"),
        ("a\0b", "no recipe named"),
        ("x" * 5000, "no recipe named"),
    ],
)
def test_unknown_recipe(source, words):
    with pytest.raises(RecipeError, match=words):
        load_recipe(source)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty; start from `buddy recipes copy quickstart`"),
        ("# nothing but words", "is empty"),
        ("- 1\n- 2", "is not a mapping"),
        ("quickstart", "is not a mapping"),
        ("seed: 1\ndata: [1, 2\n", "not valid YAML: line [23]:"),
        ("seed: 1\nseed: 2\n", "not valid YAML: line 2: .*duplicate key"),
        ("seed: !!python/name:os.system", "not valid YAML: line 1:"),
        ("data: {source: '${seed}'}", "data.source holds"),
        ("data: {source: '${'}", "takes plain values only"),
        ("1: 2", "key '1' is unknown"),
        ("a: " + "[" * 900 + "]" * 900, r"nested|nesting"),
    ],
)
def test_unreadable_file(tmp_path, text, words):
    with pytest.raises(RecipeError, match=words):
        load_recipe(written(tmp_path, text))


def test_file_that_is_no_text(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="cannot be read as text"):
        load_recipe(path)
    with pytest.raises(RecipeError, match="is a folder"):
        load_recipe(tmp_path)


# Overriding


def test_overrides_lie_over_the_file_in_order():
    recipe = load_recipe("quickstart", ["budgets=[1.0,0.5]", "seed=1", "seed=2", "data={window: 99}"])
    assert (recipe.budgets, recipe.seed, recipe.data.window) == ([1.0, 0.5], 2, 99)
    assert recipe.data.prompt == load_recipe("quickstart").data.prompt


def test_whole_numbers_may_be_written_as_floats():
    assert load_recipe("quickstart", ["trainer.max_steps=1e3"]).trainer.max_steps == 1000
    assert "trainer.max_steps must be a whole number, not 1.5" in mistakes_of("trainer.max_steps=1.5")


def test_an_empty_value_is_null():
    assert load_recipe("quickstart", ["trainer.ckpt_path="]).trainer.ckpt_path is None


@pytest.mark.parametrize("spelling", ["router=uniform", "router.name=uniform", "router={name: uniform}"])
def test_another_router_starts_from_empty_options(tmp_path, spelling):
    path = written(tmp_path, "router: {name: buddy, options: {hidden: 8}}")
    assert load_recipe(path, [spelling]).router == RouterSection("uniform")
    assert load_recipe(path, ["router.options.seed=3", spelling]).router == RouterSection("uniform", {"seed": 3})


def test_the_same_router_keeps_its_options(tmp_path):
    path = written(tmp_path, "router: {name: buddy, options: {hidden: 8}}")
    assert load_recipe(path, ["router=buddy", "router.options.a.b=1"]).router.options == {
        "hidden": 8,
        "a": {"b": 1},
    }


def test_a_file_may_name_its_router_in_short(tmp_path):
    assert load_recipe(written(tmp_path, "router: uniform")).router == RouterSection("uniform")


def test_with_router_changes_nothing_else():
    recipe = load_recipe("quickstart", ["router.options.hidden=8"])
    assert with_router(recipe, "buddy") == recipe
    assert with_router(recipe, "full") == replace(recipe, router=RouterSection("full"))


def test_a_router_may_have_a_learning_rate_of_its_own(tmp_path):
    path = written(tmp_path, "optimizer: {lr: 1.0e-3, clip: 2.0, lr_by_router: {first: 5.0e-3}}")
    recipe = load_recipe(path)
    rates = {name: with_router(recipe, name).optimizer for name in ("first", "buddy")}
    assert rates == {name: OptimizerSection(lr=lr, clip=2.0) for name, lr in (("first", 5e-3), ("buddy", 1e-3))}
    own = load_recipe(path, ["optimizer.lr_by_router.buddy=2e-3"])
    assert own.optimizer.lr_by_router == {"first": 5e-3, "buddy": 2e-3}
    asked = load_recipe(path, ["optimizer.lr=4e-3"])
    assert with_router(asked, "first").optimizer.lr == 4e-3, "a rate that is asked for is for all"
    both = load_recipe(path, ["optimizer.lr=4e-3", "optimizer.lr_by_router.buddy=2e-3"])
    assert both.optimizer.lr_by_router == {"buddy": 2e-3}


# Checking


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("trainer.max_step=4", "The key 'trainer.max_step' is unknown; did you mean 'max_steps'?"),
        ("window=4", "The key 'window' is unknown; did you mean 'data.window'?"),
        ("windw=4", "The key 'windw' is unknown; did you mean 'data.window'?"),
        ("zzz=4", "The key 'zzz' is unknown; accepted here are backbone, data, budgets"),
        ("data=4", "data is a section with the keys source, text_field,"),
        ("data.window=abc", "data.window must be a whole number, not abc."),
        ("data.window=true", "data.window must be a whole number, not true."),
        ("backbone.trust_remote_code=perhaps", "must be true or false, not perhaps."),
        ("optimizer.lr=fast", "optimizer.lr must be a number, not fast."),
        ("optimizer.lr=" + "1" * 400, "optimizer.lr must be a number, not 111"),
        ("optimizer.lr=nan", "optimizer.lr is nan, but must be a finite number."),
        ("optimizer.lr=0", "optimizer.lr is 0.0, but must be above 0."),
        ("optimizer.lr_by_router=[1]", "lr_by_router must be a mapping of routers to numbers such as {buddy: 0.003},"),
        ("optimizer.lr_by_router.first=fast", "must be a mapping of routers to numbers such as {buddy: 0.003}, not"),
        ("optimizer.lr_by_router.first=0", "optimizer.lr_by_router.first is 0.0, but must be a number above 0."),
        ("optimizer.lr_by_router.first=nan", "optimizer.lr_by_router.first is nan, but must be a number above 0."),
        ("seed=null", "seed must be a whole number, not null."),
        ("seed=-1", "seed is -1, but must be at least 0."),
        ("seed=4294967296", "seed is 4294967296, but must be at most 4294967295."),
        ("seed=" + "1" * 5000, "The value of seed cannot be read"),
        ("seed=[1", "The value of seed cannot be read (line"),
        ("seed=" + "[" * 5000, "nest"),
        ("backbone.name=on", "backbone.name must be text, not true; put it in quotes."),
        ("backbone.revision=1e5", "backbone.revision must be text or null, not 100000.0; put it in quotes."),
        ("backbone.dtype=float61", "(accepted: bfloat16, float32, float16); did you mean 'float16'"),
        ("routing.pool=valu", "routing.pool cannot be 'valu' (accepted: value, key, both); did you mean 'value'?"),
        ("routing.prompt_plan=x", "routing.prompt_plan cannot be 'x' (accepted: token, shared)."),
        ("objective.estimator=perturbd", "did you mean 'perturbed'?"),
        ("routing.sink_tokens=-1", "routing.sink_tokens is -1, but must be at least 0."),
        ("routing.sink_tokens=256", "routing.sink_tokens is 256, but must be below data.window, which is 256."),
        ("data.prompt=256", "data.prompt is 256, but must be below data.window, which is 256."),
        ("data.batch_size=0", "data.batch_size is 0, but must be at least 1."),
        ("data.source=' '", "data.source is empty;"),
        ("objective.plans=3", "objective.plans is 3, but must be even"),
        ("objective.plans=0", "objective.plans is 0, but must be at least 2."),
        ("objective.sigma=0", "objective.sigma is 0.0, but must be above 0."),
        ("objective.kl=0", "objective.kl and objective.ce are both 0"),
        ("budgets=[]", "budgets is empty; list at least one"),
        ("budgets=[1.5]", "budgets holds 1.5, but each must be above 0 and at most 1."),
        ("budgets=[0]", "budgets holds 0.0, but"),
        ("budgets=[nan]", "budgets holds nan, but"),
        ("budgets=[0.5,0.5]", "budgets holds 0.5 more than once"),
        ("budgets=0.5", "budgets must be a list of numbers such as [1.0, 0.5], not 0.5."),
        ("budgets=[a]", "budgets must be a list of numbers such as [1.0, 0.5], not [a]."),
        ("budgets[0]=0.5", "'budgets[0]=0.5' reaches into a list; give the whole list, as in budgets=[1.0,0.5]."),
        ("budgets.0=0.5", "budgets must be a list of numbers"),
        ("adapter.rates=3e-3", "adapter.rates must be a list of numbers such as [1.0e-2, 3.0e-3], not 0.003."),
        ("adapter.targets=[1]", "adapter.targets must be a list of names such as [q_proj, v_proj], not [1]."),
        ("data.train_sources=a", "data.train_sources must be a list of names such as [more.jsonl, notes.txt], not a."),
        ("rivals=[1]", "rivals must be a list of names such as [uniform, random], not [1]."),
        ("rivals=[full,full]", "rivals holds full more than once"),
        ("rivals=['']", "rivals holds an empty name"),
        ("router.options=[1]", "router.options must be a mapping such as {hidden: 64}, not [1]."),
        ("router.options={1: 2}", "router.options must be a mapping such as {hidden: 64}, not {1: 2}."),
        ("router.options.hidden=???", "router.options.hidden holds ???; write its value."),
        ("seed=???", "seed holds ???; write its value."),
        ("data.source=${seed}", "data.source holds ${…}, but a recipe takes plain values only"),
        ("data.window", "'data.window' has no value; write data.window=VALUE."),
        ("=3", "'=3' is not an override; write key=value"),
        ("", "'' is not an override; write key=value"),
        ("data..window=3", "'data..window=3' is not an override"),
    ],
)
def test_one_mistake_is_one_sentence(override, words):
    message = mistakes_of(override)
    assert words in message
    assert "\n" not in message


def test_all_mistakes_at_once(tmp_path):
    path = written(tmp_path, "sed: 1\ndata: {window: wide, promt: 3}\nobjective: {plans: 5}")
    with pytest.raises(RecipeError, match="has 6 mistakes:") as caught:
        load_recipe(path, ["trainer.devices=0", "data"])
    assert str(caught.value).split("\n  - ")[1:] == [
        "The key 'sed' is unknown; did you mean 'seed'?",
        "data.window must be a whole number, not wide.",
        "The key 'data.promt' is unknown; did you mean 'prompt'?",
        "'data' has no value; write data=VALUE.",
        "trainer.devices is 0, but must be at least 1.",
        "objective.plans is 5, but must be even: plans are drawn in pairs.",
    ]


def test_a_value_of_the_wrong_type_raises_no_second_complaint():
    message = mistakes_of("data.window=wide", "data.prompt=999")
    assert message.endswith("has a mistake: data.window must be a whole number, not wide.")


# Saving


def test_copy_never_overwrites(tmp_path):
    target = copy_recipe("quickstart", tmp_path)
    assert target.read_text("utf-8") == module.recipe_path("quickstart").read_text("utf-8")
    target.write_text("mine")
    with pytest.raises(RecipeError, match="exists and is not overwritten"):
        copy_recipe("quickstart", target)
    assert target.read_text() == "mine"
    with pytest.raises(RecipeError, match="cannot be written"):
        copy_recipe("quickstart", tmp_path / "missing" / "mine.yaml")


def test_a_full_disk_leaves_no_half_of_a_copy(tmp_path):
    with (
        FailingDisk(tmp_path, 1).under(),
        pytest.raises(RecipeError, match=r"mine.yaml cannot be written \(No space left"),
    ):
        copy_recipe("quickstart", tmp_path / "mine.yaml")
    assert not list(tmp_path.iterdir())


def test_flatten_gives_scalars_under_dotted_keys():
    flat = flatten(load_recipe("quickstart", ["router.options={hidden: 8, parts: [a, b], bound: null}"]))
    assert (flat["router.options.hidden"], flat["router.options.parts"]) == (8, "[a, b]")
    assert (flat["router.options.bound"], flat["budgets"]) == ("null", "[1.0, 0.875, 0.75, 0.625, 0.5]")
    assert flat.keys() >= {key for key, *_ in leaves(Recipe())} - {"router.options"}
    assert all(isinstance(value, bool | int | float | str) for value in flat.values())


WORD = st.text(min_size=1, max_size=12).filter(
    lambda text: text.strip() and "${" not in text and text != "???" and "\0" not in text
)
PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | WORD
OPTIONS = st.dictionaries(
    WORD, st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORD, inner, max_size=3))
)
BOUNDED = {"least": "min_value", "above": "min_value", "most": "max_value"}


def values_of(item) -> st.SearchStrategy:
    """What a field accepts, read off the schema's own bounds."""
    bounds, kind = item.metadata, item.type
    if "accepted" in bounds:
        return st.sampled_from(bounds["accepted"])
    limits = {BOUNDED[name]: value for name, value in bounds.items()}
    if kind in (int, int | None):
        whole = st.integers(**{"max_value": 2**40, **limits})
        return whole if kind is int else st.none() | whole
    if kind is float:
        return st.floats(**{"max_value": 1e300, **limits}, exclude_min="above" in bounds)
    if item.name == "options":
        return OPTIONS
    if kind == list[float]:
        return st.lists(st.floats(0, 100, exclude_min=True), max_size=3, unique=True)
    if kind == list[str]:
        return st.lists(WORD, max_size=3, unique=True)
    if kind == dict[str, float]:
        return st.dictionaries(WORD, st.floats(0, 100, exclude_min=True), max_size=3)
    return {bool: st.booleans(), str: WORD}.get(kind, st.none() | WORD)


def section(cls) -> st.SearchStrategy:
    return st.builds(cls, **{item.name: values_of(item) for item in fields(cls)})


RECIPES = st.builds(
    Recipe,
    backbone=section(BackboneSection),
    data=section(DataSection).map(lambda data: replace(data, window=data.window + data.prompt)),
    budgets=st.lists(st.floats(0, 1, exclude_min=True), min_size=1, max_size=5, unique=True),
    routing=section(RoutingSection).map(
        lambda routing: replace(routing, sink_tokens=routing.sink_tokens % 2, policy="fill")
    ),
    router=section(RouterSection),
    rivals=st.lists(WORD, max_size=3, unique=True),
    objective=section(ObjectiveSection).map(lambda o: replace(o, kl=o.kl + 0.5, plans=2 * o.plans)),
    optimizer=section(OptimizerSection),
    adapter=st.none()
    | section(AdapterSection).map(
        lambda a: replace(a, targets=a.targets or ["all-linear"], joint=a.joint and not a.rates)
    ),
    trainer=section(TrainerSection),
    seed=st.integers(0, 2**32 - 1),
    output=WORD,
)


@settings(deadline=None, max_examples=60)
@given(recipe=RECIPES)
def test_a_saved_recipe_reads_back_equal(tmp_path_factory, recipe):
    path = tmp_path_factory.getbasetemp() / "saved.yaml"
    path.write_text(to_yaml(recipe), "utf-8")
    assert load_recipe(path) == recipe


KEYS = st.sampled_from([key for key, *_ in leaves(Recipe())] + ["router", "data", "budgets[0]", "router.options.a"])
VALUES = st.text(max_size=20) | st.text(alphabet="[]{}:,&*!|>-?'\"#%@`$.0123e ~=", max_size=12)


@settings(deadline=None, max_examples=150)
@example(overrides=["router.options.a=" + "[" * 200 + "]" * 200])
@example(overrides=["router.options={<<: 3}"])
@example(overrides=["router.options.a=&a [*a]"])
@example(overrides=["router.options.a=!!timestamp 2001-99-99"])
@example(overrides=["router.options.a=!!set {a}"])
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
