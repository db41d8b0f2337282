"""`buddy export`: the plan of a run at one budget as a checkpoint that stock transformers loads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig

from buddy.backbone.embedded import quiet_transformers
from buddy.backbone.load import ATTENTION, Backbone
from buddy.budget import fraction_of
from buddy.build import build_held_out, build_windows, load_model
from buddy.console import results, status, tracker
from buddy.data.windows import Windows
from buddy.engine.model import RoutedLM
from buddy.errors import DataError, RunError
from buddy.hub.card import cautions, export_card
from buddy.hub.push_pull import CARD, finished, whole_folder
from buddy.inspection.routing import Choice, most_frequent
from buddy.io import within_memory, write_json, write_text, writing
from buddy.router import Context, Geometry, Router
from buddy.run import Run
from buddy.scoring.perplexity import Reference, Scores
from buddy.scoring.timing import PER_LAYER, pruned_model
from buddy.training.module import evaluate

RECORD = "buddy_export.json"
CHECKED = 2  # windows whose logits are held against the engine's


@dataclass(frozen=True)
class Texts:
    """Windows that the plan is chosen on, and others that run and checkpoint are measured on."""

    choosing: Windows
    measuring: Windows


def export_run(folder: Path, *, budget: str, out: Path, data: str | None = None, check: bool = True) -> None:
    """Write the checkpoint into a new folder and say what it is and is not.

    Args:
        folder: a finished run.
        budget: a fraction or a count such as "22layers".
        out: the folder to make.
        data: a text to choose the plan on, instead of the recipe's calibration windows.
        check: load what was written and hold its logits against the engine's, both in float32.

    Raises:
        BuddyError: the run, the budget, the text or the place cannot be used. Nothing is left at `out` then.
    """
    run = finished(folder)
    if data is not None and not data.strip():
        raise DataError("The text to choose the plan on has no name; name one, or leave --data out.")
    with whole_folder(out) as made:
        with status(f"Loading {run.backbone} …"):
            routed = load_model(run)
        executed = routed.executed_layers(budget)
        with status("Reading text …"):
            texts = _texts(run, routed, data)
        sizes = f"a batch of {run.recipe.data.batch_size} × {texts.choosing.input_ids.shape[1]} tokens"
        with within_memory(sizes, "free some, or use a machine with more"):
            choice = _choose(run, routed, texts.choosing, executed)
            scores, cut = _measure(run, routed, texts.measuring, choice, budget)
        with status(f"Writing {out} …"):
            if cut.adapter is not None:
                cut.merge()
            write_checkpoint(made, cut.backbone, choice.kept)
        checked = _check(made, cut, choice, texts) if check else None
        mind = cautions(run, choice, mixed(cut.backbone.model.config, choice.kept))
        write_json(made / RECORD, _record(run, choice, budget, scores, checked))
        write_text(made / CARD, export_card(run, choice, budget, out.name, scores, mind, checked))
    _show(run, choice, scores, mind, checked, out)


def _texts(run: Run, routed: RoutedLM, data: str | None) -> Texts:
    section = run.recipe.data
    if data is None:
        text = build_held_out(run.recipe, routed.backbone, calibration=True)
        return Texts(text.calibration, text.validation)
    count = section.calibration_windows + section.validation_windows
    found = build_windows(run.recipe, routed.backbone.tokenizer, data, count=count)
    if len(found) < 2:
        raise DataError(
            f"The text in {data} gives one window of {section.window} tokens, and two are needed, one to choose the "
            "plan on and one to measure it on; give more text."
        )
    first = max(1, len(found) * section.calibration_windows // count)
    return Texts(
        Windows(found.input_ids[:first], found.documents[:first]),
        Windows(found.input_ids[first:], found.documents[first:]),
    )


def _choose(run: Run, routed: RoutedLM, windows: Windows, executed: int) -> Choice:
    section = run.recipe.data
    return most_frequent(
        routed,
        windows,
        executed,
        prompt=section.prompt,
        batch_size=section.batch_size,
        track=tracker(f"Looking at the plans of {run.router_name}"),
    )


def _measure(
    run: Run, routed: RoutedLM, windows: Windows, choice: Choice, budget: str
) -> tuple[list[Scores], RoutedLM]:
    """Scores of the run and of the plan for every token, sinks included; and the model that runs it so."""
    backbone, layers = routed.backbone, routed.geometry.layers
    asked = fraction_of(budget, len(choice.kept), layers)
    how: dict[str, Any] = {
        "prompt": run.recipe.data.prompt,
        "batch_size": run.recipe.data.batch_size,
        "reference": Reference(),
    }
    (ours,) = evaluate(routed, windows, [asked], description="Measuring the run", **how)
    adapter, routed.adapter = routed.adapter, None  # so that it stays on the backbone
    routed.detach()
    cut = RoutedLM(backbone, OnePlan(routed.geometry, choice.kept), sink_tokens=0)
    if adapter is not None:
        cut.adapt(adapter)
    (theirs,) = evaluate(cut, windows, [asked], description="Measuring the checkpoint's plan", **how)
    return [ours, theirs], cut


def _check(made: Path, cut: RoutedLM, choice: Choice, texts: Texts) -> float:
    sizes = f"two copies of {cut.backbone.name} in float32"
    with status("Holding its logits against the engine's …"), within_memory(sizes, "free some, or give --no-check"):
        ids = texts.measuring.input_ids[:CHECKED].to(cut.backbone.device)
        return largest_difference(made, cut, choice.kept, ids)


def _record(run: Run, choice: Choice, budget: str, scores: Sequence[Scores], checked: float | None) -> dict[str, Any]:
    return {
        "router": run.router_name,
        "backbone": run.backbone,
        "fingerprint": run.fingerprint,
        "budget": budget,
        "layers": choice.layers,
        "kept": list(choice.kept),
        "tokens": choice.tokens,
        "plans": choice.plans,
        "share": choice.share,
        "overlap": choice.overlap,
        "sink_tokens": run.recipe.routing.sink_tokens,
        "perplexity": {"run": scores[0].perplexity, "checkpoint": scores[1].perplexity},
        "largest_logit_difference": checked,
    }


def _show(
    run: Run, choice: Choice, scores: Sequence[Scores], mind: Sequence[str], checked: float | None, out: Path
) -> None:
    kept, layers = len(choice.kept), choice.layers
    table = Table(title=f"{run.backbone} cut to {kept} of {layers} layers, on held-out text")
    for heading in ("", "perplexity", "95 % interval", "KL to dense"):
        table.add_column(heading, justify="right" if heading else "left")
    for label, each in zip(("the run, as it routes", "the checkpoint"), scores, strict=True):
        low, high = each.interval()
        table.add_row(label, f"{each.perplexity:.2f}", f"{low:.2f} – {high:.2f}", f"{max(each.mean_kl, 0.0):.4f}")
    results.print(table)
    lines = [f"Layers:     {_ranges(choice.kept)}; removed: {_ranges(choice.removed) or 'none'}"]
    lines += [f"Mind:       {sentence}" for sentence in mind]
    if checked is not None:
        lines.append(f"Checked:    logits are at most {checked:.2g} from the engine's, in float32")
    lines.append(f'Checkpoint: {out}; load it with AutoModelForCausalLM.from_pretrained("{out}")')
    for line in lines:
        results.print(line, soft_wrap=True)


def _ranges(numbers: Sequence[int]) -> str:
    """ "0–3, 5" for 0, 1, 2, 3 and 5."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{part[0]}–{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)


Track = Callable[[Sequence[Any]], Iterable[Any]]


class OnePlan(Router):
    """Runs the same layers for every token.

    Args:
        geometry: sizes of the backbone.
        kept: indices of the layers that run, always-on ones included.
    """

    def __init__(self, geometry: Geometry, kept: Sequence[int]) -> None:
        super().__init__(geometry)
        runs = torch.zeros(geometry.layers)
        runs[list(kept)] = 1.0
        first = geometry.context_layer
        self.register_buffer("order", runs[first : first + geometry.routable])

    def score(self, context: Context) -> Tensor:
        """(..., R): 1 for a layer of the plan, 0 for another."""
        return self.order.expand(*context.executed.shape, -1)


CLOSE = 1e-4  # how far logits in float32 may lie apart


def write_checkpoint(folder: Path, backbone: Backbone, kept: Sequence[int]) -> None:
    """Write config.json, generation_config.json, model.safetensors and the tokenizer into an empty folder.

    Args:
        folder: where.
        backbone: the whole model, routed or not; it stays as it is.
        kept: indices of the layers to keep, rising.

    Raises:
        RunError: the folder cannot be written.
    """
    small = pruned_model(backbone.model, kept)
    small.generation_config = backbone.model.generation_config
    with quiet_transformers(), writing(folder):
        try:
            small.save_pretrained(folder)
        except SafetensorError as error:  # how a full disk shows
            raise OSError(str(error)) from error
        backbone.tokenizer.save_pretrained(folder)
        for path in folder.glob("*.safetensors"):  # written for their owner alone
            path.chmod((folder / "config.json").stat().st_mode)


def mixed(config: PreTrainedConfig, kept: Sequence[int]) -> bool:
    """Whether these layers are of several kinds: sliding and full attention, say."""
    listed = (getattr(config, name, None) for name in PER_LAYER)
    return any(len({values[layer] for layer in kept}) > 1 for values in listed if values)


@torch.no_grad()
def largest_difference(folder: Path, routed: RoutedLM, kept: Sequence[int], ids: Tensor) -> float:
    """Largest distance between logits of the checkpoint, as stock transformers loads it, and of the engine.

    Both compute in float32; the backbone stays in it. The engine runs the plan for every token, sinks included.

    Args:
        folder: of the checkpoint.
        routed: the whole model, with any router.
        kept: the layers of the plan.
        ids: (B, T) long, a text.

    Raises:
        RunError: they are further apart than rounding explains.
    """
    backbone = routed.backbone
    backbone.model.float()
    routed.router.float()
    runs = torch.zeros(*ids.shape, routed.geometry.layers, dtype=torch.bool, device=ids.device)
    runs[..., list(kept)] = True
    with routed.changed(sink_tokens=0):
        ours = routed(ids, runs=runs).logits
    attention = ATTENTION.get(backbone.model.config.model_type, "sdpa")
    with quiet_transformers():
        small = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention)
    theirs = small.eval().to(ids.device)(ids, use_cache=False).logits
    found = (ours - theirs).abs().max().item()
    if not found <= CLOSE * max(1.0, ours.abs().max().item()):
        raise RunError(
            f"The checkpoint's logits are {found:.3g} from the engine's, which is more than rounding; nothing was "
            f"written. Report it, with the backbone {backbone.name} and the layers {list(kept)}."
        )
    return found
