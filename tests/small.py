"""Recipes that fit in seconds, text to go with them, and the `buddy` command in processes of their own."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

from buddy.cli import main
from buddy.config import load_recipe
from buddy.run_files import update_checksums
from buddy.schema import Recipe

RECIPE = """
backbone: {{name: {model}, dtype: float32}}
data: {{source: {text}, window: 48, prompt: 12, calibration_windows: 6, validation_windows: 2, test_windows: 6}}
budgets: [1.0, 0.75, 0.5]
trainer: {{accelerator: cpu, max_steps: 8, log_every_n_steps: 2}}
checkpoint_every: 3
"""
WORDS = "budget depth layer router token plan text model order learn skip run measure"
COMMAND = Path(sys.executable).with_name("buddy")


class Small:
    """A recipe file for one model and text; calling it gives the recipe with overrides."""

    def __init__(self, folder: Path, model: Path, text: Path) -> None:
        self.model, self.text, self.file = model, text, folder / "small.yaml"
        self.file.write_text(RECIPE.format(model=model, text=text))

    def __call__(self, output: Path, *overrides: str) -> Recipe:
        return load_recipe(self.file, [f"output={output}", *overrides])


def write_text(path: Path, documents: int = 32, seed: int = 0) -> Path:
    """A .jsonl file of documents of 20 to 60 words; returns its path."""
    draw = random.Random(seed)
    texts = (" ".join(draw.choices(WORDS.split(), k=draw.randint(20, 60))) for _ in range(documents))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def only_seeds(folder: Path) -> Path:
    """Put each run `<folder>/<router>/seed-0` in the place of the router's folder, for tests that have no others."""
    for run in list(folder.glob("*/seed-0")):
        router, moved = run.parent, run.rename(folder / ".moved")
        shutil.rmtree(router)
        moved.rename(router)
    return folder


def rewrite(run: Path, old: str, new: str) -> Path:
    """Change the recipe in a run folder, with checksums that fit; returns the folder."""
    recipe, text = run / "recipe.yaml", (run / "recipe.yaml").read_text()
    assert old in text
    recipe.write_text(text.replace(old, new))
    update_checksums(run)
    return run


def start_buddy(*words: str, folder: Path) -> subprocess.Popen:
    """The command begun in `folder`, on one thread so that it computes what this process computes."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([COMMAND, *words], cwd=folder, env=environment, **pipes)


def pip_install(*packages: Path, site: Path, work: Path) -> None:
    """Install source folders into `site` offline, from copies in `work`, since building leaves files beside them."""
    copies = [shutil.copytree(package, work / package.name) for package in packages]
    flags = ["--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--target", site]
    command = [sys.executable, "-m", "pip", "install", *flags, *copies]
    plain = os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}
    done = subprocess.run(command, env=plain, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


class Forked(get_context("fork").Process):
    """Work in a fork of this process, which has imported what takes seconds; used as a `subprocess.Popen`.

    What it writes to stdout and stderr must fit into pipes.
    """

    returncode = property(lambda self: self.exitcode)

    def __init__(self, work: Callable[..., object], *given: object) -> None:
        super().__init__(target=work, args=given)
        self._ends = [os.pipe(), os.pipe()]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads; from Python 3.12 on
            self.start()
        for _, end in self._ends:
            os.close(end)
        self.stdout, self.stderr = (os.fdopen(end) for end, _ in self._ends)

    def run(self) -> None:
        for number, (_, end) in enumerate(self._ends, start=1):
            os.dup2(end, number)
            os.close(end)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", 1, closefd=False) for number in (1, 2))
        super().run()

    def __enter__(self) -> "Forked":
        return self

    def __exit__(self, *_: object) -> None:
        self.communicate()

    def poll(self) -> int | None:
        return self.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout: float | None = None) -> int:
        self.join(timeout)
        if self.exitcode is None:
            self.kill()
            raise TimeoutError
        return self.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        with self.stdout, self.stderr:
            return self.stdout.read(), self.stderr.read()


def fork_buddy(*words: str, folder: Path) -> Forked:
    """The command begun in `folder`, without the seconds in which a new process imports its libraries."""
    return Forked(_buddy, words, folder)


def _buddy(words: tuple[str, ...], folder: Path) -> None:
    os.chdir(folder)
    sys.argv = [str(COMMAND), *words]
    main()


def wait_until(
    holds: Callable[[], bool], seconds: float = 60.0, process: subprocess.Popen | Forked | None = None
) -> None:
    """Wait for something that a thread, or a process that must not end before, brings about; else kill the process."""
    end = time.monotonic() + seconds
    while not holds():
        assert process is None or process.poll() is None, process.stderr.read()
        if time.monotonic() > end:
            if process is not None:
                process.kill()
            raise AssertionError("waited too long")
        time.sleep(0.02)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its relative name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
