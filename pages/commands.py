"""The reference of the command line, made from the commands themselves as `--help` describes them."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import typer

from buddy.cli import app

HEAD = """\
# Commands

What `buddy --help` and `buddy VERB --help` say, on one page. A command ends with 0 where all went well, with 1 where
something failed on the way (a check of a router, a run of a comparison), with 2 and a sentence where what was asked
cannot be ([what to do then](../faq.md)), and with 130 after Ctrl-C.

<!-- Made by `make reference` from the commands in buddy/cli/; change those. -->
"""


@dataclass(frozen=True)
class Said:
    """What `--help` says of one argument or option: how it is spelt, whether it has to be given, what it does."""

    spelling: str
    default: str
    meaning: str


def commands() -> Iterator[tuple[str, Any]]:
    """(words, command) of `buddy`, of every verb and of every verb below one, in the order of `--help`."""
    yield from _below("buddy", typer.main.get_command(app))


def said(words: str, command: Any) -> list[Said]:
    """The arguments and options of a command, in the order in which they are declared."""
    context = typer.Context(command, info_name=words)
    records = [parameter.get_help_record(context) for parameter in command.get_params(context)]
    return [_said(*record) for record in records if record is not None and "--help" not in record[0]]


def reference() -> str:
    """The page: for each command what it does, its arguments and options, and an example."""
    return "\n".join([HEAD, *(_section(words, command) for words, command in commands())])


def _below(words: str, command: Any) -> Iterator[tuple[str, Any]]:
    yield words, command
    if hasattr(command, "commands"):
        for name in command.list_commands(typer.Context(command)):
            yield from _below(f"{words} {name}", command.commands[name])


def _said(spelling: str, text: str) -> Said:
    """Typer appends what it knows as in `Words.  [default: 7; x>=1]`, and to an argument its type."""
    meaning, bracket, facts = re.sub(r"\s+", " ", text).rpartition("[")
    if not bracket or not facts.endswith("]"):
        meaning, facts = text, ""
    known = dict(fact.strip().partition(": ")[::2] for fact in facts.rstrip("]").split(";"))
    default = "required" if "required" in known else known.get("default", "").strip("()")
    bounds = [fact.replace("x>=", "at least ") for fact in known if fact.startswith("x>=")]
    name = re.sub(r"(?<!^)\s+<[\w\[\]]+>$", "", spelling) if not spelling.startswith("-") else spelling
    return Said(name, default, f"{meaning.strip().rstrip('.')}; {bounds[0]}." if bounds else meaning.strip())


def _section(words: str, command: Any) -> str:
    parts = [f"{'###' if words.count(' ') > 1 else '##'} {words}", command.help.strip()]
    rows = [f"| `{_cell(s.spelling)}` | {_default(s.default)} | {_cell(s.meaning)} |" for s in said(words, command)]
    if rows:
        parts.append("\n".join(["| argument or option | default | what it does |", "|---|---|---|", *rows]))
    if command.epilog and not hasattr(command, "commands"):
        parts.append(f"```bash\n{command.epilog.partition('Example: ')[2].strip()}\n```")
    return "\n\n".join(parts) + "\n"


def _default(text: str) -> str:
    return text if text in ("", "required") else f"`{_cell(text)}`"


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|").strip()
