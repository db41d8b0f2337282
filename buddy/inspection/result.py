"""What was seen of one run: the texts, the plans that ran, and the numbers of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from buddy.inspection.domains import Domain
from buddy.inspection.measures import Measures, Routing, commonest_plan, measure, pooled_share
from buddy.router import Geometry


@dataclass(frozen=True)
class Inspection:
    """All that was seen of one run.

    Attributes:
        router: its name.
        geometry: sizes of the backbone.
        asked: budget as it was asked for → K, deepest first.
        domains: the texts.
        routings: what ran, by domain label and K.
        words: short labels of the tokens of the first text's first window.
    """

    router: str
    geometry: Geometry
    asked: dict[str, int]
    domains: Sequence[Domain]
    routings: Mapping[tuple[str, int], Routing]
    words: Sequence[str]

    @property
    def always(self) -> tuple[int, int]:
        """How many layers always run at the beginning and at the end."""
        return self.geometry.context_layer, 1

    def at(self, count: int) -> list[Routing]:
        """What ran at K, text by text."""
        return [self.routings[domain.label, count] for domain in self.domains]

    @cached_property
    def measures(self) -> dict[int, dict[str, Measures]]:
        """The numbers by K and domain label."""
        return {count: self._measured(count) for count in set(self.asked.values())}

    def _measured(self, count: int) -> dict[str, Measures]:
        routings = self.at(count)
        reference = commonest_plan(routings)
        found = (measure(routing, reference, self.geometry.always_on) for routing in routings)
        return dict(zip((domain.label for domain in self.domains), found, strict=True))


def as_json(inspection: Inspection) -> dict[str, Any]:
    """Everything in numbers: domains, each budget's measures by domain, and the first text token by token.

    A token's plan is a text of L signs, "1" for a layer that ran.
    """
    first = inspection.domains[0]
    budgets = []
    for budget, count in inspection.asked.items():
        measures = {label: asdict(found) for label, found in inspection.measures[count].items()}
        runs = inspection.routings[first.label, count].runs[0]
        budgets.append(
            {
                "budget": budget,
                "layers": count,
                "share": pooled_share(inspection.at(count)).tolist(),
                "commonest_plan": commonest_plan(inspection.at(count)).nonzero()[0].tolist(),
                "domains": measures,
                "text": ["".join("01"[ran] for ran in token) for token in runs.astype(int)],
            }
        )
    return {
        "router": inspection.router,
        "layers": inspection.geometry.layers,
        "always_on": sorted({*range(inspection.geometry.context_layer), inspection.geometry.layers - 1}),
        "sink_tokens": inspection.routings[first.label, next(iter(inspection.asked.values()))].sinks,
        "domains": {domain.label: _described(domain) for domain in inspection.domains},
        "text": {"domain": first.label, "tokens": first.windows.input_ids[0].tolist(), "words": [*inspection.words]},
        "budgets": budgets,
    }


def _described(domain: Domain) -> dict[str, Any]:
    windows, tokens = domain.windows.input_ids.shape
    documents = len(domain.windows.documents.unique())
    return {"source": domain.source, "windows": windows, "tokens_a_window": tokens, "documents": documents}
