"""What `buddy routers new` writes, and when it writes nothing."""

import re
import tomllib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from buddy.config import override
from buddy.errors import RegistryError
from buddy.scaffold import NAME, check_name, new_router, package
from buddy.schema import Recipe
from tests.asking import call, refused

NAMES = st.from_regex(r"[a-z][a-z0-9]{0,8}(-[a-z0-9]{1,8}){0,2}", fullmatch=True)


def test_it_writes_a_package_and_what_to_type(tmp_path):
    (tmp_path / "my routers").mkdir()
    result = call("routers", "new", "my-own", "--out", tmp_path / "my routers")
    assert result.exit_code == 0
    assert f"pip install -e '{tmp_path}/my routers/buddy-router-my-own'\n" in result.stdout
    folder = tmp_path / "my routers" / "buddy-router-my-own"
    written = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    module = "buddy_router_my_own.py"
    assert written == {"README.md", module, "pyproject.toml", f"tests/test_{module}"}


@given(name=NAMES)
@settings(max_examples=15, deadline=None)
def test_every_good_name_gives_a_package_that_fits_together(name):
    try:
        check_name(name)
    except RegistryError:
        return  # taken, or a word of YAML
    files = package(name)
    read = tomllib.loads(files["pyproject.toml"])
    assert read["project"]["name"] == f"buddy-router-{name}"
    module, _, cls = read["project"]["entry-points"]["buddy.routers"][name].partition(":")
    assert read["tool"]["setuptools"]["py-modules"] == [module]
    assert f"class {cls}(Router):" in files[f"{module}.py"]
    for path, text in files.items():
        assert "$" not in text
        if path.endswith(".py"):
            compile(text, path, "exec")
    assert override(Recipe(), [f"router={name}"], "it").router.name == name


@given(name=st.text().filter(lambda name: not re.fullmatch(NAME, name)))
def test_any_other_name_is_refused(name):
    with pytest.raises(RegistryError):
        check_name(name)


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("MyRouter", "'my-router'"),
        ("", "'my-router'"),
        ("../evil", "'evil'"),
        ("a" * 41, "41"),
        ("null", "'null'"),
        ("sleb", "'sleb'"),
    ],
)
def test_a_name_that_cannot_be_used_writes_nothing(name, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert named in refused("routers", "new", name)
    assert not list(tmp_path.iterdir())


def test_a_module_that_exists_is_not_written_again(tmp_path, monkeypatch):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "buddy_router_tide.py").touch()
    monkeypatch.syspath_prepend(tmp_path / "site")
    with pytest.raises(RegistryError, match="buddy-router-tide"):
        new_router("tide", tmp_path)


@pytest.mark.parametrize("out", ["file", "nowhere", "x" * 300, "taken"])
def test_a_folder_that_cannot_be_used(out, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "taken" / "buddy-router-mine").mkdir(parents=True)
    assert out in refused("routers", "new", "mine", "--out", tmp_path / out)
    assert not list((tmp_path / "taken" / "buddy-router-mine").iterdir())
