"""Hooks of mkdocs: the README is the site's first page, and links that leave docs/ become plain text.

The documents are written to be read in the repository, where a link to a source file works. The site has no source
files, so such a link keeps its text alone.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

README = Path(__file__).parent.parent / "README.md"
LINK_UPWARDS = re.compile(r"(?<!!)\[([^\]]*)\]\(((?:\.\./)+[^)\s]*)\)")
LINK = re.compile(r"(!?\[[^\]]*\])\(([^)\s]+)\)")
CODE = re.compile(r"`[^`\n]+`")
FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)


def on_files(files: Any, config: Any) -> Any:
    """Add the README as index.md."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, "index.md", content=from_docs(README.read_text("utf-8"))))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Adapt a page to the site."""
    return as_page(markdown, folders=page.file.src_uri.count("/"))


def from_docs(readme: str) -> str:
    """The README with links relative to docs/: `docs/concepts.md` is beside it, all else above."""

    def moved(link: re.Match[str]) -> str:
        target = link[2]
        within = target.removeprefix("docs/")
        return f"{link[1]}({within if within != target or target.startswith(('https:', '#')) else f'../{target}'})"

    return _outside_fences(readme, lambda part: LINK.sub(moved, part))


def as_page(markdown: str, folders: int) -> str:
    """A page without links out of docs/, and with plain bars in the code of tables, as Python-Markdown wants them.

    Args:
        markdown: of the page.
        folders: how deep in docs/ the page is.
    """

    def inside(link: re.Match[str]) -> str:
        return link[0] if link[2].count("../") <= folders else link[1]

    def bars(code: re.Match[str]) -> str:
        return code[0].replace("\\|", "|")

    return _outside_fences(markdown, lambda part: CODE.sub(bars, LINK_UPWARDS.sub(inside, part)))


def _outside_fences(text: str, change: Callable[[str], str]) -> str:
    return "".join(part if part.startswith("```") else change(part) for part in FENCE.split(text))
