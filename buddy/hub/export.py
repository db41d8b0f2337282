"""`buddy export`: the plan of a run at one budget as a checkpoint that stock transformers loads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig

from buddy.backbone.embedded import quiet_transformers
from buddy.backbone.load import FAMILIES, Backbone
from buddy.budget import fraction_of
from buddy.builders.data import build_unseen, held_out
from buddy.builders.model import load_model
from buddy.console import status, stdout, tracker
from buddy.data.text import same_source
from buddy.data.windows import Windows
from buddy.engine.model import RoutedLM
from buddy.engine.shared_weights import PER_LAYER, pruned_model
from buddy.errors import DataError, RunError
from buddy.evaluation.evaluate import evaluate
from buddy.hub.card import export_card
from buddy.hub.push_pull import CARD
from buddy.inspection.routing import most_frequent
from buddy.io import new_folder, within_memory, write_json, write_text, writing
from buddy.metrics.perplexity import Reference, Scores
from buddy.router import Context, Geometry, Router
from buddy.run import Run, read_run
from buddy.run_files import BRIDGE

RECORD = "buddy_export.json"
CHECKED = 2  # windows whose logits are compared with the engine's
TOLERANCE = 1e-4  # the largest difference of float32 logits that rounding explains


def export_run(folder: Path, *, budget: str, out: Path, data: str | None = None, check: bool = True) -> None:
    """Write the checkpoint into a new folder, and print its card.

    Args:
        folder: a finished run.
        budget: a fraction or a count such as "22layers".
        out: the folder to make.
        data: a text to choose the plan on, instead of the recipe's calibration windows.
        check: load the checkpoint and compare its logits with the engine's, both in float32.

    Raises:
        BuddyError: the run, the budget or the text cannot be used, the run has bridges, or `out` cannot be written.
            Nothing is left at `out` then.
    """
    run = read_run(folder)
    if data is not None and not data.strip():
        raise DataError("The text to choose the plan on has no name; name one, or leave --data out.")
    if (run.folder / BRIDGE).exists():
        raise RunError(
            f"{folder} has bridges where tokens skip layers, which stock transformers cannot run; fit it anew with "
            "bridge=null to export it."
        )
    section = run.recipe.data
    with new_folder(out) as made:
        with status(f"Loading {run.backbone} …"):
            routed = load_model(run)
        executed = routed.executed_layers(budget)
        with status("Reading text …"):
            choosing, measuring = _windows(run, routed, data)
        sizes = f"a batch of {section.batch_size} × {choosing.input_ids.shape[1]} tokens"
        with within_memory(sizes):
            with routed.changed(mean_over=1):  # a plan of K layers, where the run has K in the mean
                kept, plans = most_frequent(
                    routed,
                    choosing,
                    executed,
                    prompt=section.prompt,
                    batch_size=section.batch_size,
                    track=tracker(f"Counting the plans of {run.router_name}"),
                )
            scores = _measure(run, routed, measuring, kept, budget)
        with status(f"Writing {out} …"):
            if routed.adapter is not None:
                routed.merge()
            write_checkpoint(made, routed.backbone, kept)
        difference = None
        if check:
            sizes = f"two copies of {run.backbone} in float32"
            advice = "free some, or give --no-check"
            with status("Comparing its logits with the engine's …"), within_memory(sizes, advice):
                ids = measuring.input_ids[:CHECKED].to(routed.backbone.device)
                difference = largest_difference(made, routed, kept, ids)
        record = {
            "router": run.router_name,
            "backbone": run.backbone,
            "fingerprint": run.fingerprint,
            "budget": budget,
            "layers": routed.geometry.layers,
            "kept": list(kept),
            "tokens": plans.tokens,
            "plans": plans.plans,
            "share": plans.commonest,
            "overlap": 1 - plans.off_commonest,
            "sink_tokens": run.recipe.routing.sink_tokens,
            "mean_over": routed.mean_over,
            "executed_mean": scores[0].executed.mean,
            "perplexity": {"run": scores[0].perplexity, "checkpoint": scores[1].perplexity},
            "largest_logit_difference": difference,
        }
        write_json(made / RECORD, record)
        card = export_card(run, record, out.name, scores, mixed=is_mixed(routed.backbone.model.config, kept))
        write_text(made / CARD, card)
    stdout.print(card.partition("\n---\n")[2].strip())  # without the metadata
    stdout.print(f'\nCheckpoint: {out}; load it with AutoModelForCausalLM.from_pretrained("{out}")')


def write_checkpoint(folder: Path, backbone: Backbone, kept: Sequence[int]) -> None:
    """Write config.json, generation_config.json, model.safetensors and the tokenizer into an empty folder.

    Args:
        folder: an empty folder.
        backbone: the whole model, routed or not; it is not changed.
        kept: indices of the layers to keep, rising.

    Raises:
        RunError: the folder cannot be written.
    """
    small = pruned_model(backbone.model, kept)
    small.generation_config = backbone.model.generation_config
    with quiet_transformers(), writing(folder):
        try:
            small.save_pretrained(folder)
        except SafetensorError as error:  # safetensors' error for a full disk
            raise OSError(str(error)) from error
        backbone.tokenizer.save_pretrained(folder)
        for path in folder.glob("*.safetensors"):  # safetensors makes them readable by their owner alone
            path.chmod((folder / "config.json").stat().st_mode)


def is_mixed(config: PreTrainedConfig, kept: Sequence[int]) -> bool:
    """Whether these layers are of several kinds, such as sliding and full attention."""
    listed = (getattr(config, name, None) for name in PER_LAYER)
    return any(len({values[layer] for layer in kept}) > 1 for values in listed if values)


@torch.no_grad()
def largest_difference(folder: Path, routed: RoutedLM, kept: Sequence[int], ids: Tensor) -> float:
    """Largest difference between logits of the checkpoint, as stock transformers loads it, and of the engine.

    Both compute in float32, to which the backbone is converted for good. The engine runs the plan for every token,
    sinks included.

    Args:
        folder: of the checkpoint.
        routed: the whole model, with any router.
        kept: the layers of the plan.
        ids: (B, T) long, a text.

    Raises:
        RunError: the difference is larger than rounding explains.
    """
    backbone = routed.backbone
    dtype = backbone.dtype  # Gemma rounds its embeddings' scale to the type in which it is loaded
    backbone.model.float()
    routed.router.float()
    runs = torch.zeros(*ids.shape, routed.geometry.layers, dtype=torch.bool, device=ids.device)
    runs[..., list(kept)] = True
    with routed.changed(sink_tokens=0):
        ours = routed(ids, runs=runs).logits
    attention = FAMILIES[backbone.model.config.model_type]
    with quiet_transformers():
        small = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention).float()
    theirs = small.eval().to(ids.device)(ids, use_cache=False).logits
    found = (ours - theirs).abs().max().item()
    if not found <= TOLERANCE * max(1.0, ours.abs().max().item()):
        raise RunError(
            f"The checkpoint's logits are {found:.3g} from the engine's, which is more than rounding; nothing was "
            f"written. Report it, with the backbone {backbone.name} and the layers {list(kept)}."
        )
    return found


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


def _windows(run: Run, routed: RoutedLM, data: str | None) -> tuple[Windows, Windows]:
    """Windows that the plan is chosen on, and others that run and checkpoint are measured on."""
    section = run.recipe.data
    if data is None or same_source(data, section.source):
        text = held_out(run, routed.backbone, calibration=True)
        return text.calibration, text.validation
    count = section.calibration_windows + section.validation_windows
    found = build_unseen(run, routed.backbone.tokenizer, data, count=count)
    if len(found) < 2:
        raise DataError(
            f"The text in {data} gives one window of {section.window} tokens, and two are needed, one to choose the "
            "plan on and one to measure it on; give more text."
        )
    first = max(1, len(found) * section.calibration_windows // count)
    return found[:first], found[first:]


def _measure(run: Run, routed: RoutedLM, windows: Windows, kept: Sequence[int], budget: str) -> list[Scores]:
    """Scores of the run, and of the plan for every token, sinks included."""
    section = run.recipe.data
    options: dict[str, Any] = {"prompt": section.prompt, "batch_size": section.batch_size, "reference": Reference()}
    budgets = [fraction_of(budget, len(kept), routed.geometry.layers)]
    (ours,) = evaluate(routed, windows, budgets, description="Measuring the run", **options)
    plan = OnePlan(routed.geometry, kept).to(routed.backbone.device)
    with routed.changed(plan, sink_tokens=0, mean_over=1):
        (theirs,) = evaluate(routed, windows, budgets, description="Measuring the checkpoint's plan", **options)
    return [ours, theirs]
