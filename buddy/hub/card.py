"""Model cards: README.md with the front matter that the hub reads, results, and how to use what it lies beside."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from buddy.backbone import embedded
from buddy.errors import DamagedError
from buddy.inspection.routing import Choice
from buddy.run import ADAPTER, METRICS, PREDICTOR, Run
from buddy.scoring.perplexity import Scores

ORIGINS = {embedded.NAME: "HuggingFaceTB/SmolLM2-135M-Instruct"}  # the hub's names of embedded models
SINKS = (
    "The engine runs the first {count} of each text through all layers whatever the budget; the "
    "checkpoint lacks some, and so treats sinks like any other token."
)


def run_card(run: Run, metrics: Mapping[str, Any] | None, name: str, licence: str | None) -> str:
    """The card of a run.

    Args:
        run: what is handed over.
        metrics: its results as in metrics.json; None where there are none.
        name: by which others load it.
        licence: the hub's word for a licence of the router's weights; None where none was chosen.

    Raises:
        RunError: the results have another form.
    """
    layers = run.geometry.get("layers", "its")
    parts = [
        _front_matter(run, licence),
        f"# {run.router_name} for {title(run.backbone)}\n",
        f"A router that decides for every token which of {layers} layers of {title(run.backbone)} run: one router, "
        f"every compute budget. A budget of 0.75 means exactly round(0.75 · {layers}) layers a token. Made by Buddy "
        f"{run.versions.get('buddy', '')} from the recipe `{run.recipe_name}` on the text "
        f"`{title(run.recipe.data.source)}`. It holds no weights of the backbone (fingerprint `{run.fingerprint}`)."
        f"{_beside(run)}\n",
        "## Results\n",
        _results(run, metrics),
        "## Use\n",
        _use(run, name),
        "## Licence\n",
        f"The router's weights: {licence or 'no licence was chosen by those who made it; ask them'}. The backbone is "
        "not part of this and keeps its own licence. Buddy itself is under Apache-2.0.\n",
    ]
    return "\n".join(parts)


def export_card(
    run: Run,
    choice: Choice,
    budget: str,
    name: str,
    scores: Sequence[Scores],
    mind: Sequence[str],
    checked: float | None,
) -> str:
    """The card of an exported checkpoint.

    Args:
        run: of the router that chose the plan.
        choice: the plan.
        budget: as asked.
        name: of the folder.
        scores: of the run as it routes, and of the checkpoint, on held-out windows.
        mind: what whoever uses it should know.
        checked: largest difference of a logit to the engine's; None where that was not looked at.
    """
    kept = ", ".join(map(str, choice.kept))
    front = {"library_name": "transformers", "pipeline_tag": "text-generation"} | _base_model(run)
    proof = "" if checked is None else f" Largest difference of a logit to the engine's, in float32: {checked:.2g}."
    parts = [
        _yaml(front | {"tags": ["buddy-depth", "pruned"]}),
        f"# {title(run.backbone)}, {len(choice.kept)} of {choice.layers} layers\n",
        f"The layers {kept} of {title(run.backbone)} (counted from 0), as the router `{run.router_name}` chose them at "
        f"budget {budget}. An ordinary checkpoint: it needs transformers and nothing of Buddy.{proof}\n",
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{name}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n```\n',
        "## What it is not\n",
        *(f"- {sentence}\n" for sentence in mind),
        "## Results\n",
        "On held-out windows of the text that the plan was chosen on:\n",
        comparison(scores),
        "## Licence\n",
        "These are weights of the backbone, under the backbone's licence.\n",
    ]
    return "\n".join(parts)


def cautions(run: Run, choice: Choice, mixed: bool) -> list[str]:
    """What whoever uses a checkpoint should know; `mixed` where its layers are of several kinds."""
    found = []
    if choice.plans == 1:
        found.append(f"All {choice.tokens} routed tokens that were looked at ask for this plan.")
    else:
        found.append(
            f"The run has many plans and the checkpoint one, the most frequent: {choice.share:.1%} of {choice.tokens} "
            f"routed tokens ask for this very plan, out of {choice.plans} distinct ones; of the layers that tokens "
            f"choose it has {choice.overlap:.1%}."
        )
    sinks = run.recipe.routing.sink_tokens
    if sinks and choice.removed:
        found.append(
            SINKS.format(count="token (an attention sink)" if sinks == 1 else f"{sinks} tokens (attention sinks)")
        )
    if mixed:
        found.append(
            "Its layers are of several kinds, which config.json lists one by one. Loaders and converters that tell the "
            "kind from a layer's place instead compute something else."
        )
    if heals(run):
        found.append("The run is healed: its adapter is merged into these weights.")
    return found


def heals(run: Run) -> bool:
    """Whether a run has an adapter."""
    return (run.folder / ADAPTER).is_dir()


def comparison(scores: Sequence[Scores]) -> str:
    """The run beside the checkpoint, as a Markdown table."""
    rows = ["| | perplexity | 95 % interval | KL to dense |", "|---|---:|---:|---:|"]
    for label, each in zip(("the run, as it routes", "this checkpoint"), scores, strict=True):
        low, high = each.interval()
        rows.append(f"| {label} | {each.perplexity:.2f} | {low:.2f} – {high:.2f} | {max(each.mean_kl, 0.0):.4f} |")
    tokens, documents = int(scores[0].tokens.sum()), len(scores[0].tokens)
    return "\n".join([*rows, "", f"{tokens} scored tokens of {_documents(documents)}.\n"])


def _front_matter(run: Run, licence: str | None) -> str:
    front: dict[str, Any] = {"library_name": "buddy-depth", "pipeline_tag": "text-generation"} | _base_model(run)
    if licence:
        front["license"] = licence
    return _yaml(front | {"tags": ["buddy-depth", "dynamic-depth", run.router_name]})


def _base_model(run: Run) -> dict[str, str]:
    origin = ORIGINS.get(run.backbone, run.backbone)
    return {} if is_local(run.backbone) or origin.count("/") > 1 else {"base_model": origin}


def is_local(backbone: str) -> bool:
    """Whether a backbone is a folder, which others do not have."""
    if backbone in ORIGINS:
        return False
    return backbone.startswith(("/", ".", "~")) or os.path.isdir(backbone)


def title(backbone: str) -> str:
    """What a backbone is called among others: the name of its folder, not the path to it."""
    return os.path.basename(backbone.rstrip("/")) if is_local(backbone) else backbone


def _documents(number: int) -> str:
    return "1 document" if number == 1 else f"{number} documents"


def _yaml(values: Mapping[str, Any]) -> str:
    return f"---\n{yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)}---\n"


def _results(run: Run, metrics: Mapping[str, Any] | None) -> str:
    if metrics is None:
        return "None were saved with the run.\n"
    try:
        rows = [_row(entry) for entry in metrics["results"]]
        first = metrics["results"][0]
        note = f"{first['tokens']} scored tokens of {_documents(first['documents'])} of held-out text"
        sinks = first["sink_tokens"]
    except (LookupError, TypeError, ValueError) as error:
        raise DamagedError(run.folder / METRICS, "its results have another form") from error
    if sinks:
        note += f"; first tokens of a window at full depth, counted apart: {sinks}"
    heads = ["| budget | layers a token | perplexity | 95 % interval | KL to dense |", "|---|---:|---:|---:|---:|"]
    return "\n".join([*heads, *rows, "", f"{note}.\n"])


def _beside(run: Run) -> str:
    """What there is beside the router."""
    text = " An adapter in `adapter/`, in the format of peft, heals the backbone." if heals(run) else ""
    if (run.folder / PREDICTOR).is_file():
        text += " A budget predictor chooses the budget of a request where it is asked for `auto`."
    return text


def _row(entry: Mapping[str, Any]) -> str:
    low, high = entry["interval"]
    mean = entry["executed"]["mean"]
    return (
        f"| {entry['budget']:g} | {mean:.2f} | {entry['perplexity']:.2f} | {low:.2f} – {high:.2f} | "
        f"{max(entry['kl'], 0.0):.4f} |"
    )


def _use(run: Run, name: str) -> str:
    local = is_local(run.backbone)
    loading = f'buddy.load("{name}", backbone="FOLDER")' if local else f'buddy.load("{name}")'
    text = (
        f'```python\nimport buddy\n\nmodel = {loading}\nprint(model.generate("The state of the union is", '
        f"budget=0.75))\n```\n\n```bash\npip install buddy-depth\nbuddy pull {name} --out pulled\n"
        'buddy generate --run pulled --budget 0.75 "The state of the union is"\n```\n'
    )
    if local:
        text += (
            "\nIts backbone lay in a folder. Name yours: it has to have the same weights, which the "
            "fingerprint tells. For the commands, write it into `recipe.yaml` by `buddy pull --backbone FOLDER`.\n"
        )
    if ":" in run.router_name:
        text += f"\nThe router's class is `{run.router_name}`, a module that you need too.\n"
    return text
