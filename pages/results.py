"""`make results`: write the pages of results, with their figures, from the comparisons stored in docs/comparison."""

from buddy.evaluation.record import show_files
from pages.reference import DOCS

# Page → its folder in docs/comparison, and the names of its JSON files there, in the order of the rows.
PAGES = {
    "results": (
        "bridges",
        "comparison comparison-skipgpt comparison-skipgpt-1-2 comparison-first comparison-first-1-2 "
        "comparison-flexidepth comparison-flexidepth-1-2 comparison-mindskip comparison-mindskip-1 "
        "comparison-mindskip-2 comparison-token-table-1 comparison-token-table-2 comparison-dr-llm-1 "
        "comparison-dr-llm-2 mean/comparison-buddy mean/comparison-mindskip mean/comparison-token-table "
        "mean/comparison comparison-fixed comparison-evopress-1 comparison-evopress-2 comparison-random-1 "
        "comparison-random-2 comparison-pudding-1 comparison-pudding-2",
    ),
    "results-without-bridges": (
        "without-bridges",
        "comparison comparison-buddy-1 comparison-buddy-2 comparison-evopress comparison-evopress-1 "
        "comparison-evopress-2 comparison-sleb comparison-pudding comparison-token-table "
        "comparison-token-table-1 comparison-token-table-2 comparison-dr-llm comparison-dr-llm-1 comparison-dr-llm-2 "
        "comparison-skipgpt comparison-skipgpt-1 comparison-skipgpt-2 comparison-first comparison-first-1 "
        "comparison-first-2 comparison-flexidepth comparison-flexidepth-1 comparison-flexidepth-2 comparison-mindskip "
        "comparison-mindskip-1 comparison-mindskip-2 comparison-mean comparison-fixed comparison-reverse-order "
        "comparison-random-1 comparison-random-2 comparison-pudding-1 comparison-pudding-2",
    ),
    "results-bridges-healed": (
        "bridges/healed",
        "comparison-buddy comparison-mean comparison comparison-skipgpt comparison-first comparison-flexidepth "
        "comparison-mindskip comparison-token-table comparison-prior comparison-evopress comparison-sleb "
        "comparison-shortgpt comparison-fixed comparison-2 comparison-dr-llm comparison-random-1 "
        "comparison-random-2 comparison-buddy-2 comparison-token-table-2 comparison-pudding-1 comparison-evopress-1",
    ),
    "results-healed": ("healed", "comparison-buddy comparison comparison-2 comparison-3 comparison-4"),
    "results-tasks": ("tasks", "comparison-buddy comparison comparison-2"),
    "results-gemma": (
        "gemma3-270m",
        "comparison-buddy comparison-buddy-1 comparison-buddy-2 comparison-prior comparison-token-table "
        "comparison-sleb comparison-evopress comparison-pudding comparison",
    ),
}


def main() -> None:
    """Write every page, and print its tables."""
    for page, (folder, names) in PAGES.items():
        show_files([DOCS / "comparison" / folder / f"{name}.json" for name in names.split()], DOCS / f"{page}.md")


if __name__ == "__main__":
    main()
