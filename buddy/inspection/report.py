"""What was seen, in a terminal: the numbers as a table, and one text token by token."""

from __future__ import annotations

from rich.table import Table

from buddy.console import results
from buddy.inspection.domains import Domain
from buddy.inspection.measures import Measures
from buddy.inspection.result import Inspection
from buddy.inspection.terminal import legend, share_line, token_lines


def show(inspection: Inspection) -> None:
    """Print the numbers and, as a line of signs for each text at each budget, how many tokens ran each layer."""
    table = Table(title=f"Plans of {inspection.router}, by budget and text")
    span = f"in {_span(inspection)} tokens"
    table.add_column("budget\n(layers)", no_wrap=True)
    table.add_column("text")
    for heading in ("plan changes", "layers apart", "plans", span, "most frequent", "off it"):
        table.add_column(heading, justify="right")
    shares = Table(title=f"Share of tokens that ran each layer, 0 to {inspection.geometry.layers - 1}")
    for heading in ("budget (layers)", "text", "▁ few … █ all, · none"):
        shares.add_column(heading)
    for budget, count in inspection.asked.items():
        for label, found in inspection.measures[count].items():
            asked = f"{budget} ({_executed(found)})"
            table.add_row(asked, label, *_cells(found))
            shares.add_row(asked, label, share_line(found.share))
    results.print(table)
    results.print(_explained(inspection))
    results.print(shares)


def show_tokens(inspection: Inspection, budget: str) -> None:
    """Print the first text token by token at one budget."""
    count, layers = inspection.asked[budget], inspection.geometry.layers
    routing = inspection.routings[inspection.domains[0].label, count]
    results.print(f"\nBudget {budget}: {count} of {layers} layers. {legend(layers)}", soft_wrap=True)
    for line in token_lines(routing.runs[0], inspection.words, sinks=routing.sinks, always=inspection.always):
        results.print(line, soft_wrap=True)


def _executed(found: Measures) -> str:
    """The layers that tokens ran: one number, as long as plans are exact."""
    least, _, most = found.executed
    return str(least) if least == most else f"{least} to {most}"


def _cells(found: Measures) -> list[str]:
    return [
        "–" if found.changes is None else _percent(found.changes),
        "–" if found.apart is None else f"{found.apart:.2f}",
        str(found.plans),
        f"{found.distinct:.1f}",
        _percent(found.commonest),
        _percent(found.off_commonest),
    ]


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _span(inspection: Inspection) -> int:
    """Tokens of a stretch in which distinct plans are counted; the texts share it, for their windows are alike."""
    count = next(iter(inspection.asked.values()))
    return next(iter(inspection.measures[count].values())).span


def _explained(inspection: Inspection) -> str:
    sinks = next(iter(inspection.routings.values())).sinks
    counted = "; ".join(_size(domain, sinks) for domain in inspection.domains)
    left_out = f"; sink tokens, run at full depth and left out: {sinks} a window" if sinks else ""
    return (
        "Plan changes: tokens whose plan is not that of the token before; layers apart: in how many layers these two "
        f"differ, on average. Plans: distinct ones, in all and in {_span(inspection)} tokens. Most frequent: tokens "
        "with the text's most frequent plan; off it: chosen layers that the most frequent plan of all texts does not "
        "run.\n"
        f"{counted}{left_out}."
    )


def _size(domain: Domain, sinks: int) -> str:
    windows = len(domain.windows)
    tokens = _counted(domain.windows.input_ids.numel() - sinks * windows, "token")
    documents = _counted(len(domain.windows.documents.unique()), "document")
    return f"{domain.label}: {tokens} in {_counted(windows, 'window')} of {documents}"


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
