"""The `buddy` command in this process, as a person sees it end: well, or with one sentence."""

from click.testing import Result
from typer.testing import CliRunner

from buddy.cli import app


def call(*words: object) -> Result:
    """Run the command."""
    return CliRunner().invoke(app, [str(word) for word in words])


def ask(*words: object) -> str | None:
    """Run the command; None where it went well, else the sentence with which it ended."""
    result = call(*words)
    return None if result.exit_code == 0 else _sentence(result)


def refused(*words: object) -> str:
    """The sentence with which the command ends, which it must, before it has printed anything."""
    result = call(*words)
    assert result.stdout == "", result.stdout
    return _sentence(result)


def _sentence(result: Result) -> str:
    """Fails where the command ended in any other way: well, with a traceback or status, with more than one sentence."""
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 2, (result.exit_code, result.output)
    assert "Traceback" not in result.output
    said = result.stderr.splitlines()
    assert said, result.output
    first = next(i for i, line in enumerate(said) if line.startswith("Error: "))
    several = " mistakes:" in said[first]
    assert all(line.startswith("  - ") for line in said[first + 1 :]) if several else len(said) == first + 1, said
    return "\n".join(said[first:]).removeprefix("Error: ")
