"""Blocks of code in Markdown, and the ways to run each kind of line on a tiny model."""

import configparser
import importlib.metadata
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

from buddy.cli import app
from buddy.config import load_recipe
from tests.small import Forked, fork_buddy, pip_install

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
MOST_STEPS = 2  # trainer.max_steps, adapter.steps and bridge.steps of a command are cut to this


@dataclass(frozen=True)
class Block:
    """A fenced block: where it is, its language, its text."""

    place: str
    language: str
    text: str


def blocks(document: Path) -> Iterator[Block]:
    """All fenced blocks of a Markdown file, in order."""
    text = document.read_text("utf-8")
    assert text.count("```") % 2 == 0, f"{document.name} leaves a block open"
    for match in re.finditer(r"^```(\S*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        line = text[: match.start()].count("\n") + 1
        yield Block(f"{document.name}:{line}", match[1], match[2])


def run(block: Block) -> None:
    """Run a block in the current folder; what does not work raises."""
    RUNNERS[block.language](block)


def setup_cfg() -> configparser.ConfigParser:
    """The project's metadata."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", "utf-8")
    return parser


def _bash(block: Block) -> None:
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            assert words[0] in COMMANDS, f"{block.place}: there is no way to run {words[0]!r} here"
            COMMANDS[words[0]](words, f"{block.place}: {line}")


def _python(block: Block) -> None:
    if name := re.match(r"# (\w+\.py)\n", block.text):
        Path(name[1]).write_text(block.text)
    exec(compile(block.text, block.place, "exec", dont_inherit=True), {"__name__": "__document__"})


def _yaml(block: Block) -> None:
    Path("block.yaml").write_text(block.text)
    load_recipe("block.yaml")


def _serve(words: list[str], place: str) -> None:
    """A server that comes up, and ends when it is asked to."""
    if importlib.util.find_spec("uvicorn") is None:
        return
    with fork_buddy(*words[1:], "--port", "0", folder=Path()) as process:
        lines = iter(process.stderr.readline, "")
        said = next((line for line in lines if "http://127.0.0.1:" in line), None)
        time.sleep(1.0)
        process.terminate()
        assert said, place
        assert process.wait(timeout=60) == 0, place


def _buddy(words: list[str], place: str) -> None:
    if words[1] == "serve":
        return _serve(words, place)
    words = [re.sub(r"^((?:trainer\.max_steps|adapter\.steps|bridge\.steps)=)(\d+)$", _cut, word) for word in words]
    words = [re.sub(r"^(trainer\.(?:devices|num_nodes)=)\d+$", r"\g<1>1", word) for word in words]  # one process
    if words[1] == "evaluate" and "--devices" in words:
        words[words.index("--devices") + 1] = "1"
    if "--seeds" in words:
        words[words.index("--seeds") + 1] = "1"
    if "--rounds" in words:
        words[words.index("--rounds") + 1] = "1"
    elif words[1] == "bench":
        words += ["--rounds", "1"]
    result = CliRunner().invoke(app, words[1:])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, f"{place}\n{result.output}"


def _cut(match: re.Match[str]) -> str:
    return f"{match[1]}{min(int(match[2]), MOST_STEPS)}"


def _make(words: list[str], place: str) -> None:
    plain = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, env=plain, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{place}\n{done.stderr}"


def _tensorboard(words: list[str], place: str) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert words[1] == "--logdir", place
    assert importlib.metadata.entry_points(group="console_scripts", name="tensorboard")
    folders = {path.parent for path in Path(words[2]).glob("*/seed-*/events.out.tfevents.*")}
    assert folders, place
    for folder in folders:
        tags = set(EventAccumulator(str(folder)).Reload().Tags()["scalars"])
        assert {f"test/{name}_by_layers" for name in ("perplexity", "loss", "kl")} <= tags, folder


def _pip(words: list[str], place: str) -> None:
    """What is installed with -e is installed into a folder of the tests."""
    assert words[1:3] == ["install", "-e"], place
    site = Path("site-packages").resolve()
    pip_install(Path(words[3].partition("[")[0]), site=site, work=Path("build").resolve())
    sys.path.insert(0, str(site))


def _pytest(words: list[str], place: str) -> None:
    def tested() -> None:
        warnings.resetwarnings()  # here they are errors, and one says that modules are imported already
        sys.exit(pytest.main(["-q", *words[1:]]))

    process = Forked(tested)
    out, _ = process.communicate()
    assert process.returncode == 0, f"{place}\n{out}"


def _source(words: list[str], place: str) -> None:
    assert words[1:] == [".venv/bin/activate"], place
    assert Path(sys.executable).name.startswith("python")


def _torchrun(words: list[str], place: str) -> None:
    """One process does what several would do; `tests/scale` runs torchrun itself."""
    from torch.distributed.run import get_args_parser

    given = get_args_parser().parse_args(words[1:])
    assert (given.module, given.training_script) == (True, "buddy"), place
    _buddy(["buddy", *given.training_script_args], place)


COMMANDS = {
    "buddy": _buddy,
    "torchrun": _torchrun,
    "make": _make,
    "tensorboard": _tensorboard,
    "pip": _pip,
    "pytest": _pytest,
    "source": _source,
}
RUNNERS = {"bash": _bash, "python": _python, "yaml": _yaml}
