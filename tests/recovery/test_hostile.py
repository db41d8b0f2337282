"""Files that were made to do harm: what is pickled in them is never run, nor is Python that lies beside a model."""

import json
import os
import pickle
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from buddy.backbone.load import load_backbone
from buddy.errors import BackboneError
from buddy.run_files import update_checksums
from tests.asking import refused
from tests.recovery.conftest import TRAINED
from tests.recovery.damage import copied


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


@pytest.fixture
def mark(tmp_path) -> Path:
    """What would be there if a payload had run."""
    return tmp_path / "ran"


@pytest.fixture
def pickled(mark, tmp_path) -> Path:
    """A file as `torch.save` writes it, with a payload; what would run if it were loaded carelessly."""
    path = tmp_path / "planted.ckpt"
    torch.save({"state_dict": {}, "global_step": 3, "loops": {}, "payload": Payload(mark)}, path)
    torch.load(path, weights_only=False)
    mark.rmdir()  # so it does
    return path


# Pickles


@pytest.mark.parametrize("how", ["pickle", "behind all that a checkpoint must have"])
def test_in_a_checkpoint_that_is_asked_for(small, run, tmp_path, mark, pickled, how):
    if how == "pickle":
        pickled.write_bytes(pickle.dumps(Payload(mark)))
    else:
        real = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
        torch.save({**real, "callbacks": Payload(mark)}, pickled)
    said = refused("fit", "--recipe", small.file, f"output={tmp_path}/runs", f"ckpt_path={pickled}", *TRAINED)
    assert str(pickled) in said
    assert not mark.exists()
    assert not (tmp_path / "runs").exists()


def test_in_the_checkpoint_of_an_unfinished_run(small, run, tmp_path, mark, pickled):
    folder = copied(run, tmp_path / "small" / "buddy" / "seed-0")
    (folder / "metrics.json").unlink()
    shutil.copy(pickled, folder / "checkpoints" / "last.ckpt")
    said = refused("fit", "--recipe", small.file, f"output={tmp_path}", *TRAINED)
    assert f"{folder}/checkpoints/last.ckpt" in said
    assert not mark.exists()


@pytest.mark.parametrize("sums", [True, False])
def test_in_the_place_of_the_router(run, tmp_path, mark, pickled, sums):
    folder = copied(run, tmp_path / "buddy")
    shutil.copy(pickled, folder / "router.safetensors")
    if not sums:
        update_checksums(folder)
    for verb, words in {"evaluate": [], "generate": ["--budget", "0.5", "text"]}.items():
        assert f"{folder}/router.safetensors" in refused(verb, "--run", folder, *words)
    assert not mark.exists()


def in_place(folder: Path, pickled: Path) -> None:
    shutil.copy(pickled, folder / "model.safetensors")


def alone(folder: Path, pickled: Path) -> None:
    (folder / "model.safetensors").unlink()
    shutil.copy(pickled, folder / "pytorch_model.bin")


def behind_an_index(folder: Path, pickled: Path) -> None:
    names = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    shutil.copy(pickled, folder / "planted.bin")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "planted.bin")}
    for name in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        (folder / name).write_text(json.dumps(index))


@pytest.mark.parametrize("plant", [in_place, alone, behind_an_index])
def test_in_the_place_of_a_models_weights(small, tmp_path, mark, pickled, plant):
    folder = copied(small.model, tmp_path / "model")
    plant(folder, pickled)
    with pytest.raises(BackboneError, match=r"safetensors|cannot be loaded"):
        load_backbone(str(folder), "float32")
    assert not mark.exists()


def test_beside_a_models_weights(small, tmp_path, mark, pickled):
    """transformers would load an adapter with the model, and the model from where the adapter says."""
    folder = copied(small.model, tmp_path / "model")
    for name in ("pytorch_model.bin", "adapter_model.bin"):
        shutil.copy(pickled, folder / name)
    load_backbone(str(folder), "float32")
    config = {"peft_type": "LORA", "base_model_name_or_path": str(small.model), "target_modules": ["q_proj"], "r": 2}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with suppress(BackboneError):
        names = dict(load_backbone(str(folder), "float32").model.named_parameters())
        assert not any("lora" in name for name in names)
    assert not mark.exists()


# Python beside a model

CODE = "import os\nos.mkdir({mark!r})\n"


def with_code(small, folder: Path, mark: Path) -> Path:
    """A model whose configurations name classes in files beside it."""
    copied(small.model, folder)
    (folder / "custom.py").write_text(
        CODE.format(mark=str(mark))
        + "from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
        "class Config(LlamaConfig): pass\nclass Model(LlamaForCausalLM): pass\n"
        "class Words(PreTrainedTokenizerFast): pass\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "custom.Config", "AutoModelForCausalLM": "custom.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(CODE.format(mark=str(mark)) + "def generate(**_): pass\n")
    return folder


@pytest.fixture(autouse=True)
def modules(tmp_path, monkeypatch):
    """Where transformers copies code to before it runs it."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


@pytest.mark.parametrize("trust", [False, True])
def test_a_models_own_code_never_makes_the_model(small, tmp_path, mark, trust):
    folder = with_code(small, tmp_path / "model", mark)
    backbone = load_backbone(str(folder), "float32", trust_remote_code=trust)
    assert type(backbone.model).__module__ == "transformers.models.llama.modeling_llama"
    assert trust or not mark.exists()  # with the flag, the tokenizer may look into it


def test_a_tokenizers_code_runs_by_the_flag_alone(small, tmp_path, mark):
    folder = with_code(small, tmp_path / "model", mark)
    path = folder / "tokenizer_config.json"
    named = {"auto_map": {"AutoTokenizer": ["custom.Words", "custom.Words"]}, "tokenizer_class": "Words"}
    path.write_text(json.dumps(json.loads(path.read_text()) | named))
    with suppress(BackboneError):  # it may also be made without the code
        load_backbone(str(folder), "float32")
    assert not mark.exists()
    load_backbone(str(folder), "float32", trust_remote_code=True)
    assert mark.exists(), "the flag does nothing"
