"""What all tests share: no network, one thread, and models that are made or loaded once."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports the hub's client, which reads it once

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_llama_folder(tmp_path_factory):
    """A tiny Llama in the hub's layout; read it, never write into it."""
    from tests.tiny import tiny_folder

    return tiny_folder(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def smollm2():
    """The embedded model in float32, shared by the tests marked `real`: never change its weights or classes."""
    from buddy.backbone import load_backbone

    return load_backbone("smollm2-135m", "float32")
