"""The texts of the stored comparison with bridges, from FineWeb-Edu as one file and Wikipedia as JSON lines.

`python -m studies.comparison_texts fineweb_edu.txt wikipedia.jsonl OUT`

Writes OUT/fineweb.jsonl, stretches of about 4 kB that end with a line, and OUT/test/wikipedia.jsonl, without the
articles whose validation windows chose settings (`studies.bridges`), so that no test window was seen.
"""

import argparse
import json
import re
from pathlib import Path

from buddy.builders.model import build_backbone
from buddy.config import load_recipe
from studies.bridges import part_of

STRETCH = 4200  # characters
SEEN = 16  # validation windows
BEFORE = ("data.calibration_windows=32", "data.test_windows=32")  # of the recipe while settings were chosen


def stretches(text: str) -> list[str]:
    """Consecutive whole lines of at least `STRETCH` characters together; what is left at the end is dropped."""
    found, current = [], ""
    for line in text.split("\n"):
        current += line + "\n"
        if len(current) >= STRETCH:
            found.append(current.strip())
            current = ""
    return found


def without_spaces(text: str) -> str:
    return re.sub(r"\s+", "", text)


def unseen(path: Path) -> list[str]:
    """The lines of a JSONL file whose articles gave no validation window."""
    recipe = load_recipe("comparison", BEFORE)
    backbone = build_backbone(recipe)
    windows = part_of(recipe, backbone, str(path), "validation", SEEN)
    seen = [without_spaces(backbone.tokenizer.decode(ids))[20:120] for ids in windows.input_ids]
    lines = [line for line in path.read_text("utf-8").split("\n") if line]
    return [line for line in lines if not any(each in without_spaces(json.loads(line)["text"]) for each in seen)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fineweb", type=Path)
    parser.add_argument("wikipedia", type=Path)
    parser.add_argument("out", type=Path)
    asked = parser.parse_args()
    (asked.out / "test").mkdir(parents=True, exist_ok=True)
    rows = [json.dumps({"text": text}) for text in stretches(asked.fineweb.read_text("utf-8"))]
    (asked.out / "fineweb.jsonl").write_text("\n".join(rows), "utf-8")
    kept = [json.dumps(json.loads(line)) for line in unseen(asked.wikipedia)]
    (asked.out / "test" / "wikipedia.jsonl").write_text("\n".join(kept) + "\n", "utf-8")


if __name__ == "__main__":
    main()
