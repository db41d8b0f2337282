"""`buddy push` and `buddy pull`: a run goes to a folder or the hub and comes back to the bit, and nothing else does."""

import json
import shutil
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import ModelCard

import buddy
from buddy.errors import BackboneError, DamagedError, RunError
from buddy.hub.push_pull import hub_name, pull, push
from buddy.run import read_run
from buddy.run_files import read_metrics, update_checksums, write_metrics
from tests.asking import ask, call, refused
from tests.hub.fake import FakeHub
from tests.small import contents, rewrite

RUN = {"recipe.yaml", "run.json", "router.safetensors", "metrics.json", "inputs.json"}
SHARED = RUN | {"README.md", "config.json"}


@pytest.fixture(scope="module")
def original(finished, tmp_path_factory):
    """What `push` makes of a run; read it, never write into it."""
    folder = tmp_path_factory.mktemp("original") / "pushed"
    push(finished / "buddy", to=str(folder))
    return folder


@pytest.fixture
def pushed(original, tmp_path):
    """A copy to damage."""
    return shutil.copytree(original, tmp_path / "pushed")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    return FakeHub(tmp_path / "hub", monkeypatch)


def test_the_files_of_a_run_are_pushed_as_they_are(finished, original):
    held = contents(original)
    assert held.keys() == SHARED
    assert {name: held[name] for name in RUN} == {name: (finished / "buddy" / name).read_bytes() for name in RUN}
    config, run = json.loads(held["config.json"]), read_run(original)
    assert config["recipe"] == json.loads(json.dumps(asdict(run.recipe)))
    assert (config["router"], config["fingerprint"]) == ("buddy", run.fingerprint)


def test_the_card_has_results_and_use(finished, original):
    card = ModelCard.load(original / "README.md")
    assert card.data.library_name == "buddy-depth"
    assert {"buddy-depth", "buddy"} <= {*card.data.tags}
    assert (card.data.license, card.data.base_model) == (None, None)
    for entry in json.loads((finished / "buddy" / "metrics.json").read_text())["results"]:
        assert f"| {entry['budget']:g} | {entry['executed']['mean']:.2f} | {entry['perplexity']:.2f} |" in card.text
    assert 'buddy.load("./pushed", backbone="FOLDER")' in card.text
    assert str(original.parent) not in card.text


def test_the_card_names_a_budget_that_the_router_takes_and_the_package_that_has_it(finished, tmp_path, install):
    push(finished / "full", to=str(tmp_path / "full"))
    card = (tmp_path / "full" / "README.md").read_text()
    assert "budget=1)" in card
    assert "0.75" not in card
    install("buddy-router-mine", {"mine": "mine:Mine"})
    run = shutil.copytree(finished / "buddy", tmp_path / "run")
    forge(run, router_name="mine")
    update_checksums(run)
    push(run, to=str(tmp_path / "mine"))
    assert "`buddy-router-mine`" in (tmp_path / "mine" / "README.md").read_text()


def test_the_card_of_gates_that_decide_alone_promises_no_count(pushed, tmp_path):
    metrics = read_metrics(pushed)
    for entry in metrics["results"]:
        entry["executed"]["mean"] = 3.3
    write_metrics(pushed, metrics)
    rewrite(pushed, "mean_over: 1", "mean_over: 64")
    push(pushed, to=str(tmp_path / "again"))
    card = (tmp_path / "again" / "README.md").read_text()
    assert "aims at round(0.75" in card
    assert "exactly" not in card


def test_a_licence_and_the_embedded_backbone_are_named(original, tmp_path):
    run = shutil.copytree(original, tmp_path / "run")
    forge(run, backbone="smollm2-135m")
    update_checksums(run)
    push(run, to=str(tmp_path / "again"), licence="mit")
    card = ModelCard.load(tmp_path / "again" / "README.md")
    assert (card.data.license, card.data.base_model) == ("mit", "HuggingFaceTB/SmolLM2-135M-Instruct")
    assert "SmolLM2-135M-Instruct (Q4_1, dequantised)" in card.text
    assert "Gemma" not in card.text
    assert "backbone=" not in card.text
    forge(run, backbone="gemma3-270m")
    update_checksums(run)
    push(run, to=str(tmp_path / "gemma"))
    card = ModelCard.load(tmp_path / "gemma" / "README.md")
    assert card.data.base_model == "google/gemma-3-270m"
    assert "for Gemma 3 270M (Q4_K_M, dequantised)" in card.text
    assert "provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms" in card.text


def test_local_paths_of_the_recipe_are_named(pushed, tmp_path, capsys):
    rewrite(pushed, "train_sources: []", "train_sources: [mine.jsonl, owner/name]")
    push(pushed, to=str(tmp_path / "again"))
    assert "data.train_sources [mine.jsonl, owner/name]" in (said := capsys.readouterr().out), said


def test_a_folder_of_a_plain_name_is_a_local_path(pushed, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    name = read_run(pushed).recipe.backbone.name
    (tmp_path / "model").symlink_to(name)
    rewrite(pushed, name, "model")
    push(pushed, to="./again")
    assert "backbone.name model" in capsys.readouterr().out


def test_a_round_trip_through_a_folder(finished, pushed, tmp_path):
    pull(str(pushed), out=tmp_path / "pulled")
    assert contents(tmp_path / "pulled") == contents(pushed)
    folders = finished / "buddy", tmp_path / "pulled"
    texts = [buddy.load(folder).generate("budget depth", 0.5, max_new_tokens=8) for folder in folders]
    assert texts[0] == texts[1]
    push(tmp_path / "pulled", to=str(tmp_path / "again"))
    assert {name: contents(tmp_path / "again")[name] for name in RUN} == {name: contents(pushed)[name] for name in RUN}


def test_a_round_trip_through_the_hub(finished, hub, tmp_path):
    repository = hub.root / "someone" / "router"
    (repository / "adapter").mkdir(parents=True)
    (repository / "adapter" / "backbone.json").write_text("{}")  # of an earlier run
    (repository / "evil.pkl").write_text("x")
    push(finished / "buddy", to="someone/router", private=True)
    assert hub.created == [("someone/router", True)]
    assert contents(repository).keys() == SHARED | {"evil.pkl"}
    assert 'buddy.load("someone/router"' in (repository / "README.md").read_text()
    pull("hf://someone/router", out=tmp_path / "pulled")
    pulled = contents(tmp_path / "pulled")
    assert pulled.keys() == SHARED
    assert all(pulled[name] == (finished / "buddy" / name).read_bytes() for name in RUN)


def test_nothing_is_pushed_to_a_public_repository_as_private(finished, hub):
    hub.public.add("someone/public")
    with pytest.raises(RunError, match="public"):
        push(finished / "buddy", to="someone/public", private=True)
    assert not (hub.root / "someone" / "public").exists()


def test_a_link_to_a_device_is_no_file_of_a_run(pushed, tmp_path):
    shutil.copytree(pushed, tmp_path / "copy")
    (tmp_path / "copy" / "router.safetensors").unlink()
    (tmp_path / "copy" / "router.safetensors").symlink_to("/dev/zero")
    with pytest.raises(DamagedError):
        pull(str(tmp_path / "copy"), out=tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()


def test_a_revision_of_a_repository(finished, hub, tmp_path):
    push(finished / "buddy", to="someone/router")
    (hub.root / "someone" / "router").rename(hub.root / "someone" / "router@v2")
    for read in (
        lambda **which: pull("someone/router", out=tmp_path / "pulled", **which),
        partial(buddy.load, "someone/router"),
    ):
        with pytest.raises(RunError, match="someone/router"):
            read()
        read(revision="v2")
    assert contents(tmp_path / "pulled").keys() == SHARED


def test_without_a_network(finished, tmp_path):
    with pytest.raises(RunError, match="someone/router"):
        pull("someone/router", out=tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()
    with pytest.raises(RunError, match="someone/router"):
        push(finished / "buddy", to="someone/router")


def test_a_backbone_that_is_elsewhere(pushed, small, tmp_path):
    shutil.copytree(small.model, tmp_path / "model")
    pull(str(pushed), out=tmp_path / "pulled", backbone=str(tmp_path / "model"))
    run = read_run(tmp_path / "pulled")
    assert run.recipe.backbone.name == run.backbone == str(tmp_path / "model")
    config = json.loads((tmp_path / "pulled" / "config.json").read_text())
    assert (config["backbone"], config["recipe"]) == (run.backbone, json.loads(json.dumps(asdict(run.recipe))))
    assert buddy.load(tmp_path / "pulled").routed.backbone.name == run.backbone


def test_a_folder_without_a_model_is_no_backbone(pushed, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(BackboneError, match="empty"):
        pull(str(pushed), out=tmp_path / "pulled", backbone=str(tmp_path / "empty"))
    assert not (tmp_path / "pulled").exists()


def test_a_backbone_of_another_size_is_refused(pushed, small, tmp_path):
    other = shutil.copytree(small.model, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"num_hidden_layers": config["num_hidden_layers"] - 1}))
    with pytest.raises(BackboneError, match="num_hidden_layers"):
        pull(str(pushed), out=tmp_path / "pulled", backbone=str(other))
    assert not (tmp_path / "pulled").exists()


# Folders of strangers


def forge(folder: Path, **facts) -> None:
    held = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(held | facts))


def refusal(folder: Path, tmp_path: Path) -> str:
    """The sentence with which a folder is refused, which it must be; nothing is written."""
    with pytest.raises(RunError) as caught:
        pull(str(folder), out=tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()
    return str(caught.value)


def test_other_files_stay_behind(pushed, tmp_path):
    for name in ("router.py", "checkpoints/last.ckpt", "adapter/evil.bin"):
        (pushed / name).parent.mkdir(exist_ok=True)
        (pushed / name).write_bytes(b"x")
    pull(str(pushed), out=tmp_path / "pulled")
    assert contents(tmp_path / "pulled").keys() == SHARED


@pytest.mark.parametrize("name", ["metrics.json", "README.md", "adapter/backbone.json", "adapter"])
def test_links_are_refused(pushed, tmp_path, name):
    (tmp_path / "elsewhere").mkdir()
    file = tmp_path / "elsewhere" / "backbone.json"
    file.write_text("{}")
    (pushed / name).parent.mkdir(exist_ok=True)
    (pushed / name).unlink(missing_ok=True)
    (pushed / name).symlink_to(file.parent if name == "adapter" else file)
    assert name in refusal(pushed, tmp_path)


@pytest.mark.parametrize("name", ["../../secret", "/etc/hostname", "other.json"])
def test_names_that_lead_outside_are_refused(pushed, tmp_path, name):
    forge(pushed, checksums={name: "0"})
    assert ("run.json" if "/" in name else "other.json") in refusal(pushed, tmp_path)


@pytest.mark.parametrize("sums", [True, False])
@pytest.mark.parametrize("name", sorted({*RUN, "predictor.json", "adapter/adapter_model.safetensors"}))
def test_damage_is_found_with_and_without_checksums(pushed, tmp_path, name, sums):
    if not sums:
        forge(pushed, checksums={})
    (pushed / name).parent.mkdir(exist_ok=True)
    (pushed / name).write_bytes(b"[1")
    assert name in refusal(pushed, tmp_path)


@pytest.mark.parametrize("name", ["recipe.yaml", "run.json", "router.safetensors"])
def test_a_missing_file_is_named(pushed, tmp_path, name):
    (pushed / name).unlink()
    assert name in refusal(pushed, tmp_path)


def test_a_run_that_lacks_a_file_is_not_pushed(finished, tmp_path):
    shutil.copytree(finished / "buddy", tmp_path / "run")
    (tmp_path / "run" / "metrics.json").unlink()
    with pytest.raises(RunError, match=r"metrics\.json"):
        push(tmp_path / "run", to=str(tmp_path / "pushed"))
    assert not (tmp_path / "pushed").exists()


def test_nobody_accepts_a_licence_by_pulling_a_run(pushed, tmp_path):
    rewrite(pushed, "accept_license: false", "accept_license: true")
    pull(str(pushed), out=tmp_path / "pulled")
    assert not read_run(tmp_path / "pulled").recipe.backbone.accept_license


def test_a_run_that_is_replaced_meanwhile_is_not_pushed(finished, tmp_path, monkeypatch):
    shutil.copytree(finished / "buddy", tmp_path / "run")

    def copy(source, target):
        shutil.copyfile(finished / "uniform" / source.name if source.name == "router.safetensors" else source, target)

    monkeypatch.setattr("buddy.hub.push_pull.shutil", SimpleNamespace(**{**vars(shutil), "copyfile": copy}))
    with pytest.raises(RunError):
        push(tmp_path / "run", to=str(tmp_path / "pushed"))
    assert not (tmp_path / "pushed").exists()


def test_code_of_a_repository_has_to_be_allowed(pushed, tmp_path):
    rewrite(pushed, "trust_remote_code: false", "trust_remote_code: true")
    assert "--trust-remote-code" in refusal(pushed, tmp_path)
    pull(str(pushed), out=tmp_path / "pulled", trust_remote_code=True)
    assert read_run(tmp_path / "pulled").recipe.backbone.trust_remote_code


# Names and commands


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("owner/name", "owner/name"),
        ("hf://here/name", "here/name"),
        ("My-Org_2/some.router-v1", "My-Org_2/some.router-v1"),
        ("./owner/name", None),
        ("~/name", None),
        ("a/b/c", None),
        ("name", None),
        ("owner/..", None),
        ("owner/a--b", None),
        ("here/run", None),
    ],
)
def test_what_is_a_name_on_the_hub(text, name, tmp_path, monkeypatch):
    (tmp_path / "here" / "run").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub_name(text) == name


@pytest.mark.parametrize("text", ["", "  ", "hf://", "hf://owner", "hf://owner/../x", "here/other"])
def test_what_is_neither(text, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError, match="hf://owner/name" if "here" not in text else "hf://here/other"):
        hub_name(text)


def test_the_commands(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = finished / "uniform"
    out = call("push", "--run", run, "--to", "./to share").stdout
    assert ("backbone.name /" in out, "output /" in out, "'./to share'" in out) == (True, True, True)
    assert ask("pull", "./to share", "--out", "pulled") is None
    for named, *words in (
        ("to share", "push", "--run", run, "--to", "./to share"),
        ("pulled", "pull", "./to share", "--out", "pulled"),
        ("hf://pulled/x", "push", "--run", run, "--to", "pulled/x"),
        ("--private", "push", "--run", run, "--to", "./x", "--private"),
        ("licence", "push", "--run", run, "--to", "./x", "--license", ""),
        ("nowhere", "push", "--run", "nowhere", "--to", "./x"),
        ("nowhere", "pull", "./nowhere", "--out", "new"),
        ("main", "pull", "pulled", "--out", "new", "--revision", "main"),
        ("backbone", "pull", "pulled", "--out", "new", "--backbone", " "),
        ("/no", "pull", "pulled", "--out", "new", "--backbone", "/no"),
    ):
        assert named in refused(*words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pulled", "to share"]
