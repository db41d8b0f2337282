"""`python -m buddy.evaluation.lm_eval …`: the command `lm_eval`, with the model `buddy` among those it knows."""

from __future__ import annotations

import sys
from importlib import import_module

from buddy.errors import BuddyError
from buddy.evaluation.task_data import require_lm_eval

WRONG_INPUT = 2


def main() -> None:
    """Run `lm_eval` with the command line's arguments; a BuddyError ends it with one sentence and exit code 2."""
    try:
        require_lm_eval()
        from lm_eval.__main__ import cli_evaluate

        import_module("buddy.evaluation.harness")  # registers the model
        cli_evaluate()
    except BuddyError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(WRONG_INPUT)


if __name__ == "__main__":
    main()
