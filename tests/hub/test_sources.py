"""What is a folder and what a name on the hub."""

import pytest

from buddy.errors import RunError
from buddy.hub.push_pull import folder_of, hub_name


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("owner/name", "owner/name"),
        ("hf://owner/name", "owner/name"),
        ("hf://here/name", "here/name"),
        ("My-Org_2/some.router-v1", "My-Org_2/some.router-v1"),
        ("./owner/name", None),
        ("~/name", None),
        ("/owner/name", None),
        ("a/b/c", None),
        ("name", None),
        ("owner/..", None),
        ("owner/a--b", None),
        ("here/run", None),
    ],
)
def test_names(text, name, tmp_path, monkeypatch):
    (tmp_path / "here" / "run").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub_name(text) == name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "The name is empty"),
        ("  ", "The name is empty"),
        ("hf://", "hf:// is no name on the hub; write hf://owner/name"),
        ("hf://owner", "is no name on the hub"),
        ("hf://owner/../x", "is no name on the hub"),
        ("here/other", r"here/other could be a folder or a name on the hub; write \./here/other or hf://here/other"),
    ],
)
def test_what_is_refused(text, message, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError, match=message):
        hub_name(text)


def test_a_home_is_spelt_out(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    assert str(folder_of("~/runs")) == "/somewhere/runs"
