"""The `buddy` command as a person sees it end: well, or with one sentence."""

from __future__ import annotations

from typer.testing import CliRunner

from buddy.cli import app


def ask(*words: object) -> str | None:
    """Run the command; None where it went well, else the sentence with which it ended.

    Fails where it ended in any other way: with a traceback, another status, or more than one sentence.
    """
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    if result.exit_code == 0:
        return None
    assert result.exit_code == 2, (result.exit_code, result.stderr)
    assert "Traceback" not in result.output
    said = result.stderr.splitlines()
    assert said, result.output
    first = next(i for i, line in enumerate(said) if line.startswith("Error: "))
    several = " mistakes:" in said[first]
    assert all(line.startswith("  - ") for line in said[first + 1 :]) if several else len(said) == first + 1, said
    return "\n".join(said[first:]).removeprefix("Error: ")


def refused(*words: object) -> str:
    """The sentence with which the command ends, which it must."""
    said = ask(*words)
    assert said is not None, f"{words} went well"
    return said
