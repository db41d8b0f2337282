"""What all tests share: no network, one thread, and models that are made or loaded once."""

import gc
import os
import signal
import sys

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports the hub's client, which reads it once
os.environ["BUDDY_CALIBRATION_CACHE"] = os.environ["BUDDY_LATENCY_CACHE"] = ""  # nothing that tests measure is kept

import pytest
import torch

torch.set_num_threads(1)
gc.set_threshold(50_000, 20, 20)  # each search through all that is imported takes a fifth of a second
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what it starts in the background ignore it


@pytest.fixture(scope="session", autouse=True)
def savefig():
    """Figures are small and black, since every fit has some; the value is matplotlib's own function, which draws."""
    from matplotlib.figure import Figure
    from PIL import Image

    own = Figure.savefig
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda _, file, **options: Image.new("RGB", (8, 8)).save(file, "png"))
        yield own


@pytest.fixture(scope="module")
def drawn_figures(savefig):
    """Figures of this module are drawn."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("matplotlib.figure.Figure.savefig", savefig)
        yield


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Installs a distribution that announces routers, as pip leaves it: metadata beside its modules."""
    monkeypatch.syspath_prepend(tmp_path)

    def install(distribution: str, entries: dict[str, str], **modules: str) -> None:
        metadata = tmp_path / f"{distribution}-1.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        lines = "".join(f"{name} = {value}\n" for name, value in entries.items())
        (metadata / "entry_points.txt").write_text(f"[buddy.routers]\n{lines}")
        for name, text in modules.items():
            (tmp_path / f"{name}.py").write_text(text)
            monkeypatch.delitem(sys.modules, name, raising=False)

    return install


@pytest.fixture(scope="session")
def tiny_llama_folder(tmp_path_factory):
    """A tiny Llama in the hub's layout; read it, never write into it."""
    from tests.tiny import tiny_folder

    return tiny_folder(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def datasets_cache(tmp_path_factory):
    """The folder in which `datasets` keeps what the tests read, instead of the user's."""
    import datasets

    folder = tmp_path_factory.mktemp("datasets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        patch.setenv("HF_DATASETS_CACHE", str(folder))  # for processes that tests start
        yield folder


@pytest.fixture(scope="session")
def small(tiny_llama_folder, datasets_cache, tmp_path_factory):
    """Writes recipes of seconds: `small(output, "key=value", …)` is a recipe for the tiny model and a tiny text."""
    from tests.small import Small, write_text

    folder = tmp_path_factory.mktemp("small")
    return Small(folder, tiny_llama_folder, write_text(folder / "text.jsonl"))


@pytest.fixture(scope="session")
def finished(small, tmp_path_factory):
    """A folder with the complete run of each of five routers under its name; read it, never write into it."""
    from buddy.compare import fit
    from tests.small import only_seeds

    output = tmp_path_factory.mktemp("finished")
    fit(small(output, "rivals=[shortgpt,uniform,random,full]"), "small")
    return only_seeds(output / "small")


@pytest.fixture(scope="session")
def predicting(small, tmp_path_factory):
    """Runs of a static router by the kind of their budget predictor; read them, never write into them."""
    from buddy.compare import fit

    folders = {}
    for name in ("regress", "grpo"):
        output = tmp_path_factory.mktemp(name)
        options = ["predictor.windows=10", "predictor.steps=20", "predictor.lr=1e-3", "predictor.epsilon=0.3"]
        fit(small(output, "router=shortgpt", f"predictor.name={name}", *options), "small")
        folders[name] = output / "small" / "shortgpt" / "seed-0"
    return folders


@pytest.fixture(scope="session")
def smollm2():
    """The embedded model in float32, shared by the tests marked `real`: never change its weights or classes."""
    from buddy.backbone.load import load_backbone

    return load_backbone("smollm2-135m", "float32")
