"""The commands as they are typed: two devices, and two nodes of torchrun."""

import json
import os
import subprocess
import sys
from pathlib import Path

from buddy.run import read_run
from tests.scale.curves import assert_alike, curves
from tests.scale.forked import free_port
from tests.small import start_buddy

RIVALS = "rivals=[shortgpt,uniform,random,full]"  # those of `finished`
PATIENCE = 240  # seconds


def assert_as_finished(folder: Path, finished: Path) -> None:
    """The runs of five routers, as one process made them."""
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {
        "buddy",
        "shortgpt",
        "uniform",
        "random",
        "full",
    }
    assert_alike(finished / "buddy", folder / "buddy")
    assert [step for step, _ in curves(folder / "buddy")["train/objective"]] == [1, 3, 5, 7]
    for name in ("shortgpt", "uniform", "random", "full"):  # nothing is rounded anew in these
        ours, theirs = (json.loads((place / name / "metrics.json").read_text()) for place in (folder, finished))
        assert ours["documents"] == theirs["documents"]


def test_two_devices_train_one_router(small, finished, tmp_path):
    words = ("fit", "--recipe", str(small.file), f"output={tmp_path}", "trainer.devices=2", RIVALS)
    process = start_buddy(*words, folder=tmp_path)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    assert out.count("Perplexity on text") == 1
    assert [line.split(":")[0] for line in err.splitlines()].count("Training buddy") == 1
    assert_as_finished(tmp_path / "small", finished)
    assert read_run(tmp_path / "small" / "buddy" / "seed-0").recipe.trainer["devices"] == 2


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
    assert "" in [out for out, _ in said]  # one of them says nothing at all
    assert_as_finished(tmp_path / "small", finished)
