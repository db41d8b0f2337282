"""What the hooks change in the text of a page."""

import re
from collections.abc import Callable

LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(((?:\.\./)+[^)\s]*)\)")
ANY_LINK = re.compile(r"(!?\[[^\]]*\])\(([^)\s]+)\)")
CODE = re.compile(r"`[^`\n]+`")
FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)


def from_docs(readme: str) -> str:
    """The README with its links as docs/ sees them: `docs/concepts.md` is beside it, all else above."""
    return _outside_fences(readme, lambda part: ANY_LINK.sub(_moved, part))


def as_page(markdown: str, folders: int) -> str:
    """A page without links out of docs/, and as Python-Markdown wants a bar in a table's code: without a backslash.

    Args:
        markdown: of the page.
        folders: how deep in docs/ the page lies.
    """

    def inside(link: re.Match[str]) -> str:
        return link[0] if link[2].count("../") <= folders else link[1]

    return _outside_fences(markdown, lambda part: CODE.sub(_bars, LINK.sub(inside, part)))


def _moved(link: re.Match[str]) -> str:
    target = link[2]
    within = target.removeprefix("docs/")
    return f"{link[1]}({within if within != target or target.startswith(('https:', '#')) else f'../{target}'})"


def _bars(code: re.Match[str]) -> str:
    return code[0].replace("\\|", "|")


def _outside_fences(text: str, change: Callable[[str], str]) -> str:
    return "".join(part if part.startswith("```") else change(part) for part in FENCE.split(text))
