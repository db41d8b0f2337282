"""`make reference`: write what the documents say of keys and commands anew from the code."""

import sys
from collections.abc import Callable
from pathlib import Path

from pages import commands, keys, way

DOCS = Path(__file__).parent.parent / "docs"
RECIPES = DOCS / "recipes.md"
MADE: dict[Path, Callable[[], str]] = {  # each made file of the documents → what it has to be
    RECIPES: lambda: keys.written(RECIPES.read_text("utf-8")),
    DOCS / "reference" / "commands.md": commands.reference,
    DOCS / "layers.svg": way.picture,
}


def main() -> None:
    """Write what is not as it has to be, and say which."""
    for path, make in reversed(MADE.items()):
        try:
            text = make()
        except ValueError as error:
            sys.exit(str(error))
        if not path.is_file() or path.read_text("utf-8") != text:
            path.write_text(text, "utf-8")
            print(f"Wrote {path.relative_to(DOCS.parent)}")


if __name__ == "__main__":
    main()
