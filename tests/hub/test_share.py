"""`buddy push` and `buddy pull`: a run goes to a folder or the hub and comes back to the bit, and nothing else does."""

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from buddy.cli import app
from buddy.errors import RunError
from buddy.evaluation.evaluate import evaluate_run
from buddy.fit import fit
from buddy.hub.load import generate
from buddy.hub.push_pull import FILES, pull, push
from buddy.io import checksum
from buddy.run import read_run
from tests.small import write_text

KEPT = {"recipe.yaml", "run.json", "router.safetensors", "metrics.json", "inputs.json"}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def pushed(finished, tmp_path):
    push(finished / "buddy", to=str(tmp_path / "pushed"))
    return tmp_path / "pushed"


class Hub:
    """Stands in for the hub's client: repositories are folders."""

    def __init__(self, root: Path) -> None:
        self.root, self.made = root, []

    def create_repo(self, repo_id, *, private=None, exist_ok=False):
        assert exist_ok
        self.made.append((repo_id, private))

    def upload_folder(self, *, repo_id, folder_path, commit_message, delete_patterns):
        assert commit_message
        for name in contents(self.root / repo_id).keys() & {*delete_patterns}:
            (self.root / repo_id / name).unlink()
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)

    def snapshot_download(self, repo_id, *, revision=None, allow_patterns=None, local_dir=None):
        if not (self.root / repo_id).is_dir():
            raise OSError(f"404 Client Error.\nRepository Not Found for {repo_id}.")
        target = Path(local_dir or self.root / "cache")
        for path in (self.root / repo_id).rglob("*"):
            name = str(path.relative_to(self.root / repo_id))
            if name in allow_patterns:
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target / name)
        return str(target)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.snapshot_download)
    return hub


def test_what_is_pushed(finished, pushed, small, capsys):
    held = contents(pushed)
    assert held.keys() == KEPT | {"README.md", "config.json"}
    assert {name: held[name] for name in KEPT} == {n: (finished / "buddy" / n).read_bytes() for n in KEPT}
    run = read_run(pushed)
    config = json.loads(held["config.json"])
    assert config["recipe"] == json.loads(json.dumps(asdict(run.recipe)))
    assert (config["router"], config["fingerprint"]) == ("buddy", run.fingerprint)


def test_the_card_has_results_and_use(pushed, finished):
    text = (pushed / "README.md").read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["library_name"] == "buddy-depth"
    assert "license" not in front
    for entry in json.loads((finished / "buddy" / "metrics.json").read_text())["results"]:
        assert f"| {entry['budget']:g} | {entry['executed']['mean']:.2f} | {entry['perplexity']:.2f} |" in text
    assert 'buddy.load("./pushed", backbone="FOLDER")' in text
    assert str(pushed.parent) not in text
    assert "keeps its own licence" in text


def test_a_licence_and_a_backbone_of_the_hub_are_named(finished, tmp_path):
    shutil.copytree(finished / "buddy", tmp_path / "run")
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps(facts | {"backbone": "smollm2-135m"}))
    push(tmp_path / "run", to=str(tmp_path / "pushed"), licence="mit")
    text = (tmp_path / "pushed" / "README.md").read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    assert (front["license"], front["base_model"]) == ("mit", "HuggingFaceTB/SmolLM2-135M-Instruct")
    assert "The router's weights: mit." in text
    assert "backbone=" not in text


def test_a_round_trip_is_the_same_to_the_bit_and_works(finished, pushed, tmp_path, capsys):
    pull(str(pushed), out=tmp_path / "pulled")
    assert contents(tmp_path / "pulled") == contents(pushed)
    texts = []
    for folder in (finished / "buddy", tmp_path / "pulled"):
        capsys.readouterr()
        generate(folder, prompt="budget depth", budget="0.5", max_new_tokens=8)
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != ""
    evaluate_run(tmp_path / "pulled", budgets=["0.5"], json_file=tmp_path / "e.json")
    (entry,) = json.loads((tmp_path / "e.json").read_text())["results"]
    saved = json.loads((finished / "buddy" / "metrics.json").read_text())["results"]
    assert entry["perplexity"] == pytest.approx(next(e["perplexity"] for e in saved if e["budget"] == 0.5), rel=1e-5)
    push(tmp_path / "pulled", to=str(tmp_path / "again"))
    assert {n: contents(tmp_path / "again")[n] for n in KEPT} == {n: contents(pushed)[n] for n in KEPT}


def test_a_round_trip_over_the_hub(finished, hub, tmp_path, capsys):
    push(finished / "buddy", to="someone/router", private=True)
    assert hub.made == [("someone/router", True)]
    assert contents(hub.root / "someone" / "router").keys() == KEPT | {"README.md", "config.json"}
    assert 'buddy.load("someone/router"' in (hub.root / "someone" / "router" / "README.md").read_text()
    (hub.root / "someone" / "router" / "evil.pkl").write_text("x")
    pull("hf://someone/router", out=tmp_path / "pulled")
    assert contents(tmp_path / "pulled").keys() == KEPT | {"README.md", "config.json"}
    assert {n: contents(tmp_path / "pulled")[n] for n in KEPT} == {
        n: (finished / "buddy" / n).read_bytes() for n in KEPT
    }


def test_nothing_of_an_earlier_run_is_left_on_the_hub(finished, hub, tmp_path):
    repository = hub.root / "someone" / "router"
    (repository / "adapter").mkdir(parents=True)
    (repository / "adapter" / "backbone.json").write_text("{}")
    (repository / "predictor.json").write_text("{}")
    (repository / "NOTES.md").write_text("mine")
    push(finished / "buddy", to="someone/router")
    assert contents(repository).keys() == KEPT | {"README.md", "config.json", "NOTES.md"}


def test_what_the_hub_refuses_is_a_sentence(finished, hub, tmp_path, monkeypatch):
    with pytest.raises(RunError, match=r"someone/else cannot be read from the hub \(404 Client Error\. Repository Not"):
        pull("someone/else", out=tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()
    monkeypatch.setattr(hub, "create_repo", lambda *_, **__: (_ for _ in ()).throw(ValueError("no token")))
    with pytest.raises(RunError, match=r"cannot be written on the hub \(no token\); log in with `hf auth login`"):
        push(finished / "buddy", to="someone/router")


def test_without_a_network_it_is_a_sentence(finished, tmp_path):
    with pytest.raises(RunError, match="someone/router cannot be read from the hub"):
        pull("someone/router", out=tmp_path / "pulled")
    with pytest.raises(RunError, match="someone/router cannot be written on the hub"):
        push(finished / "buddy", to="someone/router")


def test_a_backbone_that_lies_elsewhere(pushed, small, tmp_path, capsys):
    shutil.copytree(small.model, tmp_path / "model")
    pull(str(pushed), out=tmp_path / "pulled", backbone=str(tmp_path / "model"))
    run = read_run(tmp_path / "pulled")
    assert run.recipe.backbone.name == run.backbone == str(tmp_path / "model")
    config = json.loads((tmp_path / "pulled" / "config.json").read_text())
    assert (config["backbone"], config["recipe"]) == (run.backbone, json.loads(json.dumps(asdict(run.recipe))))
    generate(tmp_path / "pulled", prompt="budget", budget="0.5", max_new_tokens=4)


# What must not come in


def forged(pushed: Path, **facts) -> None:
    held = json.loads((pushed / "run.json").read_text())
    (pushed / "run.json").write_text(json.dumps(held | facts))


def test_other_files_stay_behind(pushed, tmp_path):
    (pushed / "router.py").write_text("raise SystemExit")
    (pushed / "checkpoints").mkdir()
    (pushed / "checkpoints" / "last.ckpt").write_bytes(b"x")
    (pushed / "adapter").mkdir()
    (pushed / "adapter" / "evil.bin").write_bytes(b"x")
    pull(str(pushed), out=tmp_path / "pulled")
    assert contents(tmp_path / "pulled").keys() == KEPT | {"README.md", "config.json"}


@pytest.mark.parametrize("name", ["metrics.json", "router.safetensors", "README.md", "adapter/backbone.json"])
def test_links_are_refused(pushed, tmp_path, name):
    (tmp_path / "secret").write_text("x")
    (pushed / name).parent.mkdir(exist_ok=True)
    (pushed / name).unlink(missing_ok=True)
    (pushed / name).symlink_to(tmp_path / "secret")
    with pytest.raises(RunError, match=f"{name} is not a plain file; put the file itself there"):
        pull(str(pushed), out=tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()


def test_a_linked_folder_is_refused(pushed, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "backbone.json").write_text("{}")
    (pushed / "adapter").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunError, match="is not a plain file"):
        pull(str(pushed), out=tmp_path / "pulled")


@pytest.mark.parametrize("name", ["../../secret", "/etc/hostname", "other.json"])
def test_names_that_lead_outside_are_refused(pushed, tmp_path, name):
    forged(pushed, checksums={name: "0"})
    with pytest.raises(RunError, match=r"run\.json is damaged \(checksums is not what Buddy writes\)"):
        pull(str(pushed), out=tmp_path / "pulled")


@pytest.mark.parametrize("name", sorted(KEPT))
def test_damage_is_found(pushed, tmp_path, name):
    (pushed / name).write_bytes((pushed / name).read_bytes()[:-9])
    with pytest.raises(RunError, match=rf"{name} is damaged"):
        pull(str(pushed), out=tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()


@pytest.mark.parametrize(
    "name", ["predictor.json", "predictor.safetensors", "adapter/adapter_model.safetensors", "adapter/backbone.json"]
)
def test_damage_is_found_without_a_checksum(pushed, tmp_path, name):
    (pushed / name).parent.mkdir(exist_ok=True)
    (pushed / name).write_bytes(b"[1")
    with pytest.raises(RunError, match=rf"{pushed}/{name} is damaged"):
        pull(str(pushed), out=tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()


def test_a_run_that_lacks_a_file_is_not_pushed(finished, tmp_path):
    shutil.copytree(finished / "buddy", tmp_path / "run")
    (tmp_path / "run" / "metrics.json").unlink()
    with pytest.raises(RunError, match=r"run/metrics\.json is damaged \(No such file or directory\)"):
        push(tmp_path / "run", to=str(tmp_path / "pushed"))
    assert not (tmp_path / "pushed").exists()


@pytest.mark.parametrize("name", ["recipe.yaml", "run.json", "router.safetensors"])
def test_what_is_missing_is_named(pushed, tmp_path, name):
    (pushed / name).unlink()
    with pytest.raises(RunError, match=rf"holds no run: {name} is missing"):
        pull(str(pushed), out=tmp_path / "pulled")


def test_pickle_is_never_loaded(pushed, tmp_path):
    (pushed / "router.safetensors").write_bytes(b"cos\nsystem\n(S'touch " + os.fsencode(tmp_path / "bad") + b"'\ntR.")
    forged(pushed, checksums={})
    with pytest.raises(RunError, match=r"router\.safetensors is damaged"):
        pull(str(pushed), out=tmp_path / "pulled")
    assert not (tmp_path / "bad").exists()


def test_code_of_a_repository_needs_a_word(pushed, tmp_path):
    recipe = pushed / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("trust_remote_code: false", "trust_remote_code: true"))
    sums = json.loads((pushed / "run.json").read_text())["checksums"]
    forged(pushed, checksums=sums | {"recipe.yaml": checksum(recipe)})
    with pytest.raises(RunError, match=r"asks to run the Python in its backbone's repository .* --trust-remote-code"):
        pull(str(pushed), out=tmp_path / "pulled")
    pull(str(pushed), out=tmp_path / "pulled", trust_remote_code=True)
    assert read_run(tmp_path / "pulled").recipe.backbone.trust_remote_code


# Through the command


def refused(*words: object) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_a_place_with_a_space_is_quoted_in_what_to_type(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["push", "--run", str(finished / "full"), "--to", "./to share"])
    assert "buddy pull './to share' --out DIR" in done.output
    done = CliRunner().invoke(app, ["pull", "./to share", "--out", "as pulled"])
    assert "buddy generate --run 'as pulled' --budget 0.75" in done.output


def test_folders_of_texts_are_named(small, tmp_path, capsys):
    more = write_text(tmp_path / "more.jsonl", 40, seed=3)
    fit(small(tmp_path / "runs", "rivals=[]", "router=uniform", f"data.train_sources=[{more}]"), "small")
    push(tmp_path / "runs" / "small" / "uniform" / "seed-0", to=str(tmp_path / "pushed"))
    assert f"data.train_sources {more}, output {tmp_path}/runs" in capsys.readouterr().out


def test_the_commands(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["push", "--run", str(finished / "uniform"), "--to", "shared"])
    assert done.exit_code == 0, done.output
    assert "which others see: backbone.name " in done.output
    assert set(done.output.splitlines()[0].partition(" to shared: ")[2].split(", ")) <= set(FILES)
    done = CliRunner().invoke(app, ["pull", "shared", "--out", "pulled"])
    assert done.exit_code == 0, done.output
    assert "exists and is not overwritten" in refused("push", "--run", finished / "uniform", "--to", "./shared")
    assert "exists and is not overwritten" in refused("pull", "shared", "--out", "pulled")
    assert "could be a folder or a name on the hub" in refused("push", "--run", finished / "full", "--to", "shared/x")
    assert "--private is for the hub" in refused("push", "--run", finished / "full", "--to", "./x", "--private")
    assert "There is no run folder" in refused("push", "--run", "nowhere", "--to", "./x")
    assert "There is no folder ./nowhere; check the path" in refused("pull", "./nowhere", "--out", "new")
    assert "has no revisions" in refused("pull", "shared", "--out", "new", "--revision", "main")
    assert "The backbone's name is empty" in refused("pull", "shared", "--out", "new", "--backbone", " ")
    assert "There is no folder /no for the backbone" in refused("pull", "shared", "--out", "n", "--backbone", "/no")
    assert "The name is empty" in refused("pull", "", "--out", "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pulled", "shared"]
