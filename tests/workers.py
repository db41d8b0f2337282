"""Units of work without a model, for tests of executors; their worker processes import this module."""

import os
import random
import signal
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_state: dict[Path, int] = {}  # calls in this process
_memory: list[bytearray] = []


class Unpicklable(Exception):
    """An error that no other process can make again from its message."""

    def __init__(self, name: str, what: str) -> None:
        super().__init__(f"{name} {what}")


@dataclass(frozen=True)
class Step:
    """A unit: "name", or "name WAY", where the way says what becomes of it."""

    folder: Path
    words: str

    @property
    def name(self) -> str:
        return self.words.partition(" ")[0]

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.log"


@dataclass(frozen=True)
class Work:
    """Notes the process of a unit, and gives back what a serial run gives back too."""

    folder: Path

    def __call__(self, unit: Step) -> tuple[str, float]:
        import torch  # in a worker perhaps what stands in for it

        way = unit.words.partition(" ")[2]
        _state[self.folder] = _state.get(self.folder, 0) + 1
        (self.folder / unit.name).write_text(str(os.getpid()))
        print(f"call {_state[self.folder]} in this process, {torch.get_num_threads()} threads")
        marker = self.folder / f"{unit.name}.died"
        if way == "dies" or (way == "dies-once" and not marker.exists()):
            with marker.open("a") as file:
                file.write("x")
            os.kill(os.getpid(), signal.SIGKILL)
        if way == "kills-a" and not marker.exists():  # once its process has nothing to do
            time.sleep(2)
            marker.touch()
            for process in (int((self.folder / "a").read_text()), os.getpid()):
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
        if way == "dies-later":
            threading.Timer(0.4, os._exit, [1]).start()
        if way == "grows":
            _memory.append(bytearray(os.urandom(1)) * 350_000_000)
            time.sleep(1.1)  # loky looks at a worker's memory once a second
        if way == "fails":
            raise ValueError(f"{unit.name} failed")
        if way == "fails-oddly":
            raise Unpicklable(unit.name, "failed")
        if way == "imports":
            import plugged

            return plugged.NAME, 0.0
        if way == "sleeps":
            try:
                time.sleep(60)
            except KeyboardInterrupt:
                (self.folder / f"{unit.name}.stopped").touch()
                raise
        time.sleep(0.1)
        return unit.name, random.Random(unit.name).random()


def run(place: Path, *units: str) -> None:
    """Units in two workers, as a command runs them: an interrupt ends it with 130."""
    from buddy.executors import run_in_processes

    try:
        run_in_processes(Work(place), [Step(place, words) for words in units], print, jobs=2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    run(Path(sys.argv[1]), *sys.argv[2:])
