"""Hooks of mkdocs: the README is the site's first page, and links that leave docs/ become plain words.

The documents are written to be read in the repository, where a link to a file of the code leads somewhere. The site has
no code, so such a link keeps its words alone.
"""

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from pages.links import as_page, from_docs

README = Path(__file__).parent.parent / "README.md"


def on_files(files: Files, config: Any) -> Files:
    """Put the README in as index.md."""
    files.append(File.generated(config, "index.md", content=from_docs(README.read_text("utf-8"))))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Change what reads otherwise on the site."""
    return as_page(markdown, folders=page.file.src_uri.count("/"))
