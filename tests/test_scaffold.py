"""What `buddy routers new` writes, and when it writes nothing."""

import configparser
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from buddy.cli import app
from buddy.config import Recipe, override
from buddy.errors import RegistryError
from buddy.scaffold import NAME, check_name, new_router, package

NAMES = st.from_regex(r"[a-z][a-z0-9]{0,8}(-[a-z0-9]{1,8}){0,2}", fullmatch=True)


def new(*words: object):
    return CliRunner().invoke(app, ["routers", "new", *map(str, words)])


def test_it_says_what_comes_next(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = new("my-own")
    assert result.exit_code == 0
    assert result.stdout == (
        "Wrote buddy-router-my-own; install it with: pip install -e ./buddy-router-my-own\n"
        "Then check it with: buddy routers check my-own\n"
    )
    written = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    inside = ["README.md", "buddy_router_my_own.py", "pyproject.toml", "setup.cfg"]
    assert written == {
        *(f"buddy-router-my-own/{name}" for name in inside),
        "buddy-router-my-own/tests/test_buddy_router_my_own.py",
    }


@given(name=NAMES)
@settings(max_examples=40, deadline=None)
def test_every_good_name_gives_a_package_that_fits_together(name):
    try:
        check_name(name)
    except RegistryError:
        return  # taken, or a word of YAML
    files = package(name)
    parser = configparser.ConfigParser()
    parser.read_string(files["setup.cfg"])
    module = parser["options"]["py_modules"]
    assert parser["metadata"]["name"] == f"buddy-router-{name}"
    line = parser["options.entry_points"]["buddy.routers"].strip()
    cls = line.removeprefix(f"{name} = {module}:")
    assert cls.isidentifier()
    assert f"class {cls}(Router):" in files[f"{module}.py"]
    for path, text in files.items():
        assert "$" not in text
        if path.endswith(".py"):
            compile(text, path, "exec")
            assert max(map(len, text.splitlines())) <= 120
    assert override(Recipe(), [f"router={name}"], "it").router.name == name


@given(name=st.text().filter(lambda name: not re.fullmatch(NAME, name)))
def test_any_other_name_is_refused_in_a_sentence(name):
    with pytest.raises(RegistryError, match=r"is no name for a router; take lower-case letters .*'\.$"):
        check_name(name)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "MyRouter",
            "'MyRouter' is no name for a router; take lower-case letters and digits, joined by hyphens, such as",
        ),
        ("my_router", "such as 'my-router'"),
        ("", "such as 'my-router'"),
        ("../evil", "such as 'evil'"),
        ("9", "such as 'my-router'"),
        ("a" * 41, "has 41 letters; take at most 40"),
        ("null", "'null' means something else on the command line; choose another name"),
        ("all", "means something else"),
        ("sleb", "A router named 'sleb' is installed already, by 'buddy-depth'; choose another name"),
    ],
)
def test_a_name_that_will_not_do_writes_nothing(name, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = new(name)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert said in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_package_that_can_be_imported_is_not_written_again(tmp_path, monkeypatch):
    site = tmp_path / "site"
    site.mkdir()
    (site / "buddy_router_tide.py").touch()
    monkeypatch.syspath_prepend(site)
    with pytest.raises(RegistryError, match="A package buddy-router-tide is installed already; choose another name"):
        new_router("tide", tmp_path)


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "buddy-router-mine").mkdir()
    result = new("mine", "--out", tmp_path)
    assert result.exit_code == 2
    assert "buddy-router-mine exists and is not overwritten; choose another name, or another --out" in result.stderr
    assert not list((tmp_path / "buddy-router-mine").iterdir())


def test_a_place_with_a_space_is_quoted_in_what_to_type(tmp_path):
    (tmp_path / "my routers").mkdir()
    result = new("mine", "--out", tmp_path / "my routers")
    assert f"pip install -e '{tmp_path}/my routers/buddy-router-mine'\n" in result.stdout


def test_a_place_of_a_name_too_long_is_a_sentence(tmp_path):
    result = new("mine", "--out", tmp_path / ("x" * 300))
    assert (result.exit_code, result.stdout) == (2, "")
    assert "xx is not there; name a folder that is, with --out" in result.stderr


@pytest.mark.parametrize(("made", "said"), [(False, "is not there"), (True, "is a file")])
def test_a_place_that_is_no_folder(made, said, tmp_path):
    place = tmp_path / "place"
    if made:
        place.touch()
    result = new("mine", "--out", place)
    assert result.exit_code == 2
    assert f"The folder {place} {said}; name a folder that is, with --out" in result.stderr


def test_nothing_is_left_of_what_could_not_be_written_whole(tmp_path, monkeypatch):
    write, count = Path.write_text, iter(range(9))

    def full_disk(path: Path, *rest: object) -> int:
        if next(count) == 3:
            raise OSError(28, "No space left on device")
        return write(path, *rest)

    monkeypatch.setattr(Path, "write_text", full_disk)
    result = new("mine", "--out", tmp_path)
    assert result.exit_code == 2
    assert "cannot be written (No space left on device)" in result.stderr
    assert not list(tmp_path.iterdir())
