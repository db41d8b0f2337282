"""Names with options: how they are split, told apart, and turned into recipes."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from buddy.cli.fitting import parse_routers
from buddy.config import load_recipe, with_router
from buddy.errors import RecipeError, RegistryError
from buddy.registry import describe
from buddy.run import label_folder
from buddy.schema import Recipe, Rival, RouterSection

NAMES = st.from_regex(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", fullmatch=True).filter(lambda name: name != "all")
KEYS = st.from_regex(r"[a-z_][a-z0-9_]*", fullmatch=True)
VALUES = st.one_of(
    st.integers().map(str),
    st.sampled_from(["taylor", "[pooled,newest]", "{a: 1, b: [2;3]}", "null", "0.5", "'a b'", "a=b"]),
)
OPTIONS = st.lists(st.tuples(KEYS, VALUES).map(lambda pair: "router.options." + "=".join(pair)), max_size=3)
CONTESTANTS = st.builds(Rival, NAMES, OPTIONS.map(tuple))
BLANKS = st.sampled_from(["", " ", "\t"])


@settings(max_examples=30, deadline=None)
@given(st.lists(CONTESTANTS, min_size=1, max_size=5, unique_by=lambda each: each.label), BLANKS)
def test_what_is_joined_is_taken_apart_again(who, blank):
    text = f"{blank},{blank}".join(each.label for each in who)
    assert parse_routers(text, Recipe()) == who


@settings(max_examples=30, deadline=None)
@given(st.lists(CONTESTANTS, min_size=2, max_size=6, unique_by=lambda each: each.label))
def test_no_two_labels_share_a_folder(who):
    folders = [label_folder(each.label) for each in who]
    assert len(set(folders)) == len(who)
    assert all(re.fullmatch(r"[\w.=,-]+", folder) and not folder.startswith(".") for folder in folders)


@pytest.mark.parametrize(
    ("label", "folder"),
    [
        ("shortened-llama", "shortened-llama"),
        ("shortened-llama[criterion=taylor]", "shortened-llama_criterion=taylor"),
        (" buddy [ hidden = 8 ; prior = none ] ", "buddy_hidden=8,prior=none"),
    ],
)
def test_folders_can_be_read(label, folder):
    (who,) = parse_routers(label, Recipe())
    assert (who.label, label_folder(who.label)) == (label.replace(" ", ""), folder)


def test_long_labels_differ_in_short_folders():
    one, other = (label_folder(f"buddy[{'é' * 200}{last}]") for last in "ab")
    assert one != other
    assert len(one.encode()) <= 255


def test_all_are_those_that_can_be_used():
    usable = {each.name for each in describe() if not each.problem}
    found = [each.label for each in parse_routers("all", Recipe(router=RouterSection("uniform")))]
    assert found[0] == "uniform"
    assert sorted(found) == sorted(usable)
    both = [each.label for each in parse_routers("random[per=input],full,all", Recipe())]
    assert both[:2] == ["random[per=input]", "full"]
    assert sorted(both[1:]) == sorted(usable)


def test_options_are_laid_over_those_of_the_recipe():
    recipe = load_recipe("quickstart", ["router.options.hidden=64", "router.options.prior=taylor"])
    same, other, module = parse_routers("buddy[prior=none;context=[pooled,newest]],random[seed=3],a:B[on=true]", recipe)
    assert with_router(recipe, same).router.options == {"hidden": 64, "prior": "none", "context": ["pooled", "newest"]}
    assert with_router(recipe, other).router == RouterSection("random", {"seed": 3})
    assert with_router(recipe, module).router == RouterSection("a:B", {"on": True})
    assert with_router(recipe, Rival("buddy")) == recipe


def test_a_name_alone_has_the_overrides_of_the_recipes_rival():
    rival = Rival("first", ("optimizer.lr=0.01",))
    recipe = Recipe(rivals=[rival, Rival("full")])
    assert parse_routers("first,full", recipe) == [rival, Rival("full")]
    assert parse_routers("first[optimizer.lr=0.02]", recipe) == [Rival("first", ("optimizer.lr=0.02",))]
    assert rival in parse_routers("all", recipe)


@pytest.mark.parametrize(
    "text",
    [" , ", "a,b,a", "a[x=1],a[ x = 1 ]", "a[x=1", "a]x", "a[x=(1]", "[x=1]", "a[x=1]b", "a[x]", "a[x=]", "a[=1]"],
)
def test_what_cannot_be_read_is_refused(text):
    with pytest.raises(RegistryError):
        parse_routers(text, Recipe())


def test_values_that_no_recipe_holds_are_refused():
    (who,) = parse_routers("buddy[prior=${seed}]", Recipe())
    with pytest.raises(RecipeError, match="prior"):
        with_router(Recipe(), who)
