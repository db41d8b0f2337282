"""`make reference`: generate the parts of the documents that come from the code."""

import sys
from collections.abc import Callable
from pathlib import Path

from pages import commands, keys

DOCS = Path(__file__).parent.parent / "docs"
RECIPES = DOCS / "recipes.md"
GENERATED: dict[Path, Callable[[], str]] = {  # file → its content
    RECIPES: lambda: keys.written(RECIPES.read_text("utf-8")),
    DOCS / "reference" / "commands.md": commands.reference,
}


def main() -> None:
    """Write the files that are out of date, and print their names."""
    for path, generate in reversed(GENERATED.items()):
        try:
            text = generate()
        except ValueError as error:
            sys.exit(str(error))
        if not path.is_file() or path.read_text("utf-8") != text:
            path.write_text(text, "utf-8")
            print(f"Wrote {path.relative_to(DOCS.parent)}")


if __name__ == "__main__":
    main()
