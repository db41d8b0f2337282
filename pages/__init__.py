"""Generated parts of the documents: references from the code, and hooks of mkdocs."""
