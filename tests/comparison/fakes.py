"""Workers without a model, for tests of the pool; its processes import this module anew."""

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from buddy.console import Bar, errors


@dataclass(frozen=True)
class FakeStart:
    """Begins a worker that notes in a folder what it does."""

    folder: Path
    broken: bool = False

    def worker(self) -> "FakeWorker":
        if self.broken:
            raise MemoryError("no room")
        return FakeWorker(self.folder)


class FakeWorker:
    """A run is "name", "name fails", "name dies", "name sleeps" or "name tells"."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def run(self, run: str) -> str | None:
        name, _, way = run.partition(" ")
        (self._folder / name).write_text(str(os.getpid()))
        if way == "dies":
            os._exit(9)
        if way == "sleeps":
            try:
                time.sleep(60)
            except KeyboardInterrupt:
                (self._folder / f"{name}.stopped").touch()
                raise
        if way == "tells":
            with Bar("Counting", 2) as bar:
                bar.update(1, "one")
            errors.print("A word\nand another")
        return "it failed" if way == "fails" else None


if __name__ == "__main__":
    from buddy.executors import side_by_side

    try:
        side_by_side(FakeStart(Path(sys.argv[1])), sys.argv[3:], int(sys.argv[2]), print, print)
    except KeyboardInterrupt:
        sys.exit(130)
