"""Pictures in a terminal: a line for each token of a text, a line for each text at each budget."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from rich.cells import cell_len, set_cell_size
from rich.text import Text

from buddy.inspection.measures import changed_layers

CHOSEN, ALWAYS, SKIPPED = "█", "▒", "·"
HEIGHTS = "▁▂▃▄▅▆▇█"


def token_lines(runs: np.ndarray, labels: Sequence[str], *, sinks: int, always: tuple[int, int]) -> Iterable[Text]:
    """A head and a line for each token: its label, a sign for each layer, and the layers changed since the last token.

    Args:
        runs: (T, L) bool.
        labels: a short word for each token.
        sinks: first tokens at full depth whatever the budget.
        always: how many layers always run at the beginning and at the end.
    """
    width = max(map(cell_len, labels), default=0)
    yield Text(" " * width + "  " + _ruler(runs.shape[1]), style="dim")
    changes = changed_layers(runs, sinks)
    for token, (label, ran) in enumerate(zip(labels, runs, strict=True)):
        line = Text(set_cell_size(label, width) + "  ")
        _add_layers(line, ran, always, token < sinks)
        if token < sinks:
            line.append("  sink", style="dim")
        elif changes[token]:
            line.append(f"  {changes[token]} changed", style="dim")
        yield line


def share_line(share: Sequence[float]) -> Text:
    """One sign for each layer, as high as its share of tokens; a dot for a layer that nobody ran."""
    signs = (HEIGHTS[min(7, int(part * 8))] if part > 0 else SKIPPED for part in share)
    return Text("".join(signs))


def legend(layers: int) -> str:
    """What the signs of `token_lines` mean."""
    return f"Layers 0 to {layers - 1} from left to right: {CHOSEN} ran, chosen  {ALWAYS} always runs  {SKIPPED} skipped"


def _add_layers(line: Text, ran: np.ndarray, always: tuple[int, int], sink: bool) -> None:
    first, last = always
    for layer, runs in enumerate(ran):
        if not runs:
            line.append(SKIPPED, style="dim")
        elif layer < first or layer >= len(ran) - last:
            line.append(ALWAYS, style="dim")
        else:
            line.append(CHOSEN, style="yellow" if sink else "blue")


def _ruler(layers: int) -> str:
    """The numbers of every fifth layer over their places."""
    ruler = ""
    for layer in range(0, layers, 5):
        ruler = ruler.ljust(layer) + str(layer)
    return ruler
