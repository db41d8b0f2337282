"""What is killed: a fit, a calibration, a comparison, a conversion, an export. Each is one call, repeated till it ends.

A job knows three things: the call, what must hold after a kill, and what must hold in the end.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
import tempfile
from abc import ABC, abstractmethod
from contextlib import closing
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load

from buddy.backbone import embedded
from buddy.config import load_recipe
from buddy.io import load_tensors, read_json
from buddy.run import load_router, read_metrics, read_run
from buddy.training.callbacks import check_checkpoint
from tests.small import Small, write_text
from tests.soak.victim import run
from tests.tiny import tiny_folder

STEPS = ["trainer.max_steps=40", "checkpoint_every=4", "rivals=[shortgpt]"]
KEPT = (".lock", embedded.STAMP)  # ends of hidden files that stay: a lock that nobody holds blocks nobody


class Job(ABC):
    """One call that is killed.

    Args:
        work: a folder of the job's own.

    Attributes:
        place: the folder of the present round.
    """

    name: ClassVar[str]

    def __init__(self, work: Path) -> None:
        work.mkdir(parents=True)
        self.work, self.place, self.furthest = work, work / "none", 0

    def prepare(self, log: Path) -> None:  # noqa: B027  most have nothing to prepare
        """Make what has to be there before the first kill."""

    def begin(self, place: Path) -> None:
        """A new round in a new folder."""
        self.place, self.furthest = place, 0
        (place / "tmp").mkdir(parents=True)

    def __call__(self) -> None:
        """The call, in a process of its own, with a folder for temporary files that can be looked at afterwards."""
        tempfile.tempdir = str(self.place / "tmp")
        self.act()

    @abstractmethod
    def act(self) -> None:
        """The call."""

    @abstractmethod
    def check(self) -> str:
        """Fails where a kill left something corrupt or took something back; how far the call got, in a word or two."""

    @abstractmethod
    def result(self) -> Any:
        """What must be the same, to the bit, whether the call was killed or not; fails where it is not whole."""

    def leftovers(self) -> list[str]:
        """Temporary files and hidden ones that should not be there once the call has finished."""
        found = [*(self.place / "tmp").rglob("*"), *self.place.rglob(".*")]
        return sorted(str(path.relative_to(self.place)) for path in found if not path.name.endswith(KEPT))

    def goes_on(self, steps: int) -> None:
        """Fails where fewer steps are kept than after an earlier kill of this round."""
        assert steps >= self.furthest, f"{steps} steps are left of {self.furthest}"
        self.furthest = steps


class Fit(Job):
    """`fit` of a trained router and a rival, where an older run of the router is to be replaced."""

    name = "fit"

    def __init__(self, work: Path) -> None:
        super().__init__(work)
        self.small = small(work)
        self.before: Path | None = None

    @property
    def runs(self) -> Path:
        return self.place / "runs" / "small"

    def prepare(self, log: Path) -> None:
        from buddy.compare import fit

        run(lambda: fit(self.small(self.work / "older", *STEPS, "seed=1", "rivals=[]"), "small"), log)
        self.before = self.work / "older" / "small" / "buddy"

    def begin(self, place: Path) -> None:
        super().begin(place)
        if self.before is not None:
            shutil.copytree(self.before, self.runs / "buddy")

    def act(self) -> None:
        import datasets

        from buddy.compare import fit

        datasets.config.HF_DATASETS_CACHE = self.place / "datasets"
        fit(self.small(self.place / "runs", *STEPS), "small")

    def check(self) -> str:
        final, partial = self.runs / "buddy", self.runs / ".buddy.partial"
        if self.before is not None:  # the older run, or the new one
            load_router(read_run(final).folder)
            read_metrics(final)
        for path in partial.glob("*.json"):
            read_json(path)
        if (partial / "recipe.yaml").exists():
            load_recipe(partial / "recipe.yaml")
        last = partial / "checkpoints" / "last.ckpt"
        if not last.exists():
            assert not self.furthest or not partial.exists(), "the checkpoint is gone"
            return "before a checkpoint" if not self.furthest else "published"
        check_checkpoint(last)
        self.goes_on(torch.load(last, weights_only=True)["global_step"])
        return "in training" if self.furthest < 40 else "after training"

    def result(self) -> Any:
        final = self.runs / "buddy"
        found, last = read_run(final), torch.load(final / "checkpoints" / "last.ckpt", weights_only=True)
        assert found.status == "finished"
        assert found.recipe.seed == 0
        assert sorted(path.name for path in self.runs.iterdir() if not path.name.endswith(KEPT)) == [
            "buddy",
            "shortgpt",
        ]
        kept = {"state": last["state_dict"], "optimizer": last["optimizer_states"], "step": last["global_step"]}
        metrics = {name: _timeless(read_metrics(self.runs / name)) for name in ("buddy", "shortgpt")}
        comparison = read_json(self.runs / "comparison.json")
        return load_router(final), load_router(self.runs / "shortgpt"), kept, metrics, comparison


class Calibration(Job):
    """A static search through a `Probe` whose values are kept on disk."""

    name = "calibration"

    def __init__(self, work: Path) -> None:
        super().__init__(work)
        self.model = tiny_folder(work / "model", num_hidden_layers=12)

    def act(self) -> None:
        from buddy.backbone.load import load_backbone
        from buddy.calibration import store
        from buddy.calibration.probe import CalibrationProbe
        from buddy.engine.model import RoutedLM, geometry_of
        from buddy.io import save_tensors
        from routers.sleb import SLEB

        store.WRITE_EVERY = 0.02  # seconds: many writes, for kills to fall into
        backbone = load_backbone(str(self.model), "float32")
        routed = RoutedLM(backbone, SLEB(geometry_of(backbone, 1, "value")))
        windows = torch.randint(3, 259, (4, 48), generator=torch.Generator().manual_seed(0))
        routed.router.calibrate(CalibrationProbe(routed, windows, 1, asked=[5], store=self.place / "store"))
        save_tensors(self.place / "order.safetensors", routed.router.state_dict(), {})

    def check(self) -> str:
        measured = len(self._measured())
        self.goes_on(measured)
        return "nothing measured" if not measured else "in the search"

    def result(self) -> Any:
        return load_tensors(self.place / "order.safetensors"), self._measured()

    def _measured(self) -> dict[str, torch.Tensor]:
        """What is in the store, read from a copy, so that the next call finds the file as the kill left it."""
        with tempfile.TemporaryDirectory() as copy:
            for path in (self.place / "store").glob("*.sqlite*"):
                shutil.copy(path, copy)
            files = list(Path(copy).glob("*.sqlite"))
            assert len(files) <= 1, files
            if not files:
                return {}
            with closing(sqlite3.connect(files[0])) as file:
                assert file.execute("PRAGMA integrity_check").fetchone() == ("ok",)
                there = file.execute("SELECT name FROM sqlite_master WHERE name = 'measured'").fetchone()
                rows = file.execute("SELECT key, value FROM measured").fetchall() if there else []
        return {key: load(value)[""] for key, value in sorted(rows)}


class Compare(Job):
    """`compare` of three routers on two texts."""

    name = "compare"

    def __init__(self, work: Path) -> None:
        super().__init__(work)
        self.small = small(work)
        self.other = write_text(work / "other.jsonl", 40, seed=5)

    @property
    def out(self) -> Path:
        return self.place / "out"

    def act(self) -> None:
        from buddy.compare import CompareConfig, compare
        from buddy.config import Rival

        recipe = self.small(self.work / "runs", "trainer.max_steps=12")  # its output is told in the results
        routers = [Rival(name) for name in ("buddy", "shortgpt", "random")]
        options = {"routers": routers, "seeds": 1, "texts": str(self.other), "speed": False}
        assert compare(CompareConfig(recipe, "small", out=self.out, **options)) == 0

    def check(self) -> str:
        whole = 0
        for folder in (facts.parent for facts in self.out.glob("runs/*/[!.]*/run.json")):
            load_router(read_run(folder).folder)
            read_metrics(folder)
            whole += 1 + sum(bool(read_json(path)) for path in folder.glob("evaluations/*.json"))
        if (self.out / "comparison.json").exists():
            read_json(self.out / "comparison.json")
        for last in self.out.glob("runs/*/.*.partial/checkpoints/last.ckpt"):
            check_checkpoint(last)
        self.goes_on(whole)
        return f"{whole} of 6 results"

    def result(self) -> Any:
        record = read_json(self.out / "comparison.json")
        runs = [{**each, "fit": each["fit"]["parameters"]} for each in record["runs"]]
        weights = {str(path.relative_to(self.out)): load_tensors(path) for path in self.out.rglob("router.safetensors")}
        assert (self.out / "tensorboard" / "_figures").is_dir()
        return {**record, "runs": runs, "created": None}, weights


class Conversion(Job):
    """The embedded model's conversion, of a model that is small and of no wheel."""

    name = "conversion"

    def __init__(self, work: Path) -> None:
        super().__init__(work)
        self.model = tiny_folder(work / "model", num_hidden_layers=12, hidden_size=256, intermediate_size=512)

    @property
    def folder(self) -> Path:
        return self.place / "cache" / embedded.NAME

    def act(self) -> None:
        import os

        os.environ["BUDDY_CACHE"] = str(self.folder.parent)
        embedded._wheel_file = lambda: self.model
        embedded._write_model = _convert
        assert embedded.smollm2_folder() == self.folder

    def check(self) -> str:
        fault = embedded.fault(self.folder)
        assert fault in (None, "absent"), fault
        begun = any(self.folder.parent.glob(f".{embedded.NAME}-*"))
        return "converted" if fault is None else "in the conversion" if begun else "before it"

    def result(self) -> Any:
        assert embedded.fault(self.folder) is None
        return read_json(self.folder / embedded.RECORD), load_tensors(self.folder / "model.safetensors")


class Export(Job):
    """A checkpoint of one plan of a run, cut out of the backbone."""

    name = "export"

    def __init__(self, work: Path) -> None:
        super().__init__(work)
        self.small = small(work)

    @property
    def out(self) -> Path:
        return self.place / "out"

    def begin(self, place: Path) -> None:
        super().begin(place)
        if not (self.work / "runs").exists():
            self.prepare(self.work / "log")

    def prepare(self, log: Path) -> None:
        from buddy.compare import fit

        if not (self.work / "runs").exists():
            run(lambda: fit(self.small(self.work / "runs", "router=shortgpt", "rivals=[]"), "small"), log)

    def act(self) -> None:
        from buddy.hub.export import export_run

        if not self.out.exists():  # one that is there is whole, and is refused
            export_run(self.work / "runs" / "small" / "shortgpt", budget="0.5", out=self.out)

    def check(self) -> str:
        if self.out.exists():
            self.result()
            return "exported"
        return "in the export" if any(self.place.glob(".out.*")) else "before it"

    def result(self) -> Any:
        names = sorted(path.name for path in self.out.iterdir())
        return names, json.loads((self.out / "config.json").read_text()), load_tensors(self.out / "model.safetensors")


def _convert(source: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(source).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)


def small(work: Path) -> Small:
    """The recipe of seconds, with a model and a text of its own."""
    return Small(work, tiny_folder(work / "model"), write_text(work / "text.jsonl"))


def _timeless(metrics: dict[str, Any]) -> dict[str, Any]:
    assert metrics["fit"]["seconds"] > 0
    return {**metrics, "fit": {**metrics["fit"], "seconds": None}}


def same(one: Any, other: Any) -> bool:
    """Whether two results are equal to the bit."""
    if isinstance(one, torch.Tensor):
        return torch.is_tensor(other) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and json.dumps(one) == json.dumps(other)


JOBS: dict[str, type[Job]] = {job.name: job for job in (Fit, Calibration, Compare, Conversion, Export)}
