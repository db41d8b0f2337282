"""What was seen, as pictures: PNG files, and the same in TensorBoard with step = executed layers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from buddy.inspection.figures import draw_shares, draw_tokens
from buddy.inspection.measures import pooled_share
from buddy.inspection.result import Inspection
from buddy.io import writing

ENDING = ".inspect"  # of the event files written here, by which older ones are known
Pictures = Mapping[tuple[str, int], Path]


def draw_all(inspection: Inspection, folder: Path) -> dict[tuple[str, int], Path]:
    """Draw every picture into a folder that exists.

    Returns:
        File by kind and step: ("budgets", 0) with a column for each budget, ("domains", K) with one for each text
        where there are several, ("tokens", K) with the first text token by token. Of full depth, whose picture says
        nothing, the last two are drawn only where no other budget was asked for.
    """
    drawn = {("budgets", 0): _draw_budgets(inspection, folder / "budgets.png")}
    below = {name: count for name, count in inspection.asked.items() if count < inspection.geometry.layers}
    for budget, count in (below or inspection.asked).items():
        if len(inspection.domains) > 1:
            drawn["domains", count] = _draw_domains(inspection, budget, folder / f"domains-{budget}.png")
        drawn["tokens", count] = _draw_tokens(inspection, budget, folder / f"tokens-{budget}.png")
    return drawn


def write_tensorboard(inspection: Inspection, drawn: Pictures, folder: Path) -> None:
    """The pictures as images and how plans change as curves, in place of those that an earlier call left there."""
    from matplotlib.image import imread
    from torch.utils.tensorboard import SummaryWriter

    with writing(folder):
        older = list(folder.glob(f"events.out.tfevents.*{ENDING}"))
        with SummaryWriter(str(folder), filename_suffix=ENDING) as writer:
            for (kind, step), path in sorted(drawn.items()):
                writer.add_image(f"routing/{kind}", imread(path)[..., :3], step, dataformats="HWC")
            for count in sorted(set(inspection.asked.values())):
                for label, found in inspection.measures[count].items():
                    curves = {
                        "plan_changes": found.changes,
                        "layers_apart": found.apart,
                        "distinct_plans": found.distinct,
                        "commonest_plan": found.commonest,
                        "off_commonest": found.off_commonest,
                    }
                    for name, value in curves.items():
                        if value is not None:
                            writer.add_scalar(f"routing/{name}/{label}", value, count)
        for path in older:
            path.unlink(missing_ok=True)


def _draw_budgets(inspection: Inspection, path: Path) -> Path:
    columns = {f"{budget}\n({count})": pooled_share(inspection.at(count)) for budget, count in inspection.asked.items()}
    names = ", ".join(domain.label for domain in inspection.domains)
    title = f"{inspection.router}: tokens that ran each layer\n{names}"
    draw_shares(path, columns, title=title, label="budget (executed layers)")  # type: ignore[arg-type]  # arrays
    return path


def _draw_domains(inspection: Inspection, budget: str, path: Path) -> Path:
    count = inspection.asked[budget]
    columns = {label: found.share for label, found in inspection.measures[count].items()}
    title = f"{inspection.router}: tokens that ran each layer\n{_spelt(inspection, budget)}"
    draw_shares(path, columns, title=title, label="text")
    return path


def _draw_tokens(inspection: Inspection, budget: str, path: Path) -> Path:
    first = inspection.domains[0]
    routing = inspection.routings[first.label, inspection.asked[budget]]
    title = f"{inspection.router} on {first.label}: layers that each token ran, {_spelt(inspection, budget)}"
    draw_tokens(path, routing.runs[0], inspection.words, sinks=routing.sinks, always=inspection.always, title=title)
    return path


def _spelt(inspection: Inspection, budget: str) -> str:
    return f"budget {budget} ({inspection.asked[budget]} of {inspection.geometry.layers} layers)"
