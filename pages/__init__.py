"""Generated parts of the documents: references from the code, the picture of a plan, and hooks of mkdocs."""
