"""The commands as they are typed: two devices, and two nodes of torchrun."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from buddy.io import read_json
from buddy.run import read_run
from tests.scale.curves import assert_alike, curves
from tests.scale.forked import free_port
from tests.small import only_seeds, start_buddy

RIVALS = "rivals=[shortgpt,random]"  # two of those of `finished`
PATIENCE = 240  # seconds
pytestmark = pytest.mark.slow


def assert_as_finished(folder: Path, finished: Path) -> None:
    """The runs of three routers, as one process made them."""
    only_seeds(folder)
    assert_alike(finished / "buddy", folder / "buddy")
    assert [step for step, _ in curves(folder / "buddy")["train/objective"]] == [1, 3, 5, 7]
    for name in ("shortgpt", "random"):  # nothing is rounded anew in these
        ours, theirs = (read_json(place / name / "metrics.json") for place in (folder, finished))
        assert ours["documents"] == theirs["documents"]


def test_two_devices_train_one_router(small, finished, tmp_path):
    words = ("fit", "--recipe", str(small.file), f"output={tmp_path}", "trainer.devices=2", RIVALS)
    process = start_buddy(*words, folder=tmp_path)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    assert out.count("Perplexity on text") == 1
    assert err.count("Training buddy: 8 of 8") == 1
    assert_as_finished(tmp_path / "small", finished)
    assert read_run(tmp_path / "small" / "buddy").recipe.trainer["devices"] == 2


def test_two_nodes_by_torchrun_with_the_weights_shared_out(small, finished, tmp_path):
    place = ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{free_port()}", "--rdzv-id", "two-nodes")
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", *place)
    words = ("fit", "--recipe", str(small.file), f"output={tmp_path}", "trainer.strategy=fsdp", RIVALS)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": tmp_path, "env": environment}
    nodes = [subprocess.Popen([*torchrun, "-m", "buddy", *words], **pipes) for _ in range(2)]
    said = [node.communicate(timeout=PATIENCE) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert sorted(out.count("Perplexity on text") for out, _ in said) == [0, 1]
    assert sorted(err.count("Training buddy: 8 of 8") for _, err in said) == [0, 1]
    assert_as_finished(tmp_path / "small", finished)
