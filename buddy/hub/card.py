"""Model cards: the README.md of a run or of an exported checkpoint, with the metadata that the hub reads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from shlex import quote
from typing import Any

from buddy.backbone import embedded
from buddy.backbone.load import is_local, title_of
from buddy.console import counted, quality_cells
from buddy.evaluation.record import shown_path
from buddy.evaluation.tables import UNEVEN, markdown
from buddy.metrics.perplexity import Scores
from buddy.registry import installed, owner
from buddy.run import Run
from buddy.run_files import ADAPTER, BRIDGE, PREDICTOR

MEASURES = ("perplexity", "95 % interval", "KL to dense")


def run_card(run: Run, metrics: Mapping[str, Any], name: str, licence: str | None) -> str:
    """The card of a run.

    Args:
        run: the run.
        metrics: its results, as in metrics.json.
        name: the folder or hub name to load it by.
        licence: the hub's identifier of a licence for the router's weights; None where none was chosen.
    """
    layers, backbone = run.geometry["layers"], title(run.backbone)
    extras = ""
    if (run.folder / BRIDGE).is_file():
        extras += " Bridges in `bridge.safetensors` correct the hidden state of tokens that skip a layer."
    if (run.folder / ADAPTER).is_dir():
        extras += " An adapter in `adapter/`, in the format of peft, heals the backbone."
    if (run.folder / PREDICTOR).is_file():
        extras += " A budget predictor chooses the budget of a request at budget `auto`."
    over, results = run.recipe.routing.mean_over, metrics["results"]
    budget = min((each["budget"] for each in results), key=lambda budget: abs(budget - 0.75))
    exact = all(set(each["executed"].values()) == {each["layers"]} for each in results)  # scope prompt
    count = f"round({budget:g} · {layers}) layers per token"
    if any(abs(each["executed"]["mean"] - each["layers"]) > UNEVEN for each in results):  # gates that decide alone
        meaning = f"aims at {count} in the mean, and the table shows what ran"
    else:
        meaning = f"means {'exactly' if over == 1 or exact else f'in the mean over {over} tokens'} {count}"
    body = f"""\
# {run.router_name} for {backbone}

A router that decides for every token which of {layers} layers of {backbone} run: one router, every compute budget. \
A budget of {budget:g} {meaning}. Made by Buddy {run.versions.get("buddy", "")} from the recipe \
`{run.recipe_name}` on the text `{title(run.recipe.data.source)}`. It holds no weights of the backbone (fingerprint \
`{run.fingerprint}`).{extras}

## Results

{_results(metrics)}
## Use

{_usage(run, name, budget)}
## Licence

The router's weights: {licence or "its authors chose no licence; ask them"}. The backbone is not part of \
this and keeps its own licence{_terms(run)}. Buddy itself is under Apache-2.0.
"""
    tags = ["buddy-depth", "dynamic-depth", run.router_name]
    return _card(run, body, library_name="buddy-depth", license=licence, tags=tags)


def export_card(run: Run, record: Mapping[str, Any], name: str, scores: Sequence[Scores], *, mixed: bool) -> str:
    """The card of an exported checkpoint.

    Args:
        run: the run whose router chose the plan.
        record: the content of buddy_export.json.
        name: of the checkpoint's folder.
        scores: of the run as it routes, and of the checkpoint, on held-out windows.
        mixed: whether its layers are of several kinds.
    """
    kept, difference, proof = record["kept"], record["largest_logit_difference"], ""
    if difference is not None:
        proof = f" Largest difference of a logit to the engine's, in float32: {difference:.2g}."
    differences = "\n".join(f"- {sentence}\n" for sentence in _differences(run, record, mixed))
    body = f"""\
# {title(run.backbone)}, {len(kept)} of {record["layers"]} layers

The layers {", ".join(map(str, kept))} of {title(run.backbone)} (counted from 0), as the router \
`{run.router_name}` chose them at budget {record["budget"]}. An ordinary checkpoint: it needs transformers and nothing \
of Buddy.{proof}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

## Differences from the run

{differences}
## Results

On held-out windows of the text that the plan was chosen on:

{_comparison(scores)}
## Licence

These are weights of the backbone, changed by leaving out layers, under the backbone's licence{_terms(run)}.
"""
    model = embedded.find(run.backbone)
    licence = model.licence if model else None
    return _card(run, body, library_name="transformers", license=licence, tags=["buddy-depth", "pruned"])


def _differences(run: Run, record: Mapping[str, Any], mixed: bool) -> list[str]:
    """Sentences on how a checkpoint differs from its run."""
    found = [f"All {record['tokens']} routed tokens of the text have this plan."]
    if record["plans"] > 1:
        found = [
            f"The run has many plans and the checkpoint one, the most frequent: {record['share']:.1%} of "
            f"{record['tokens']} routed tokens have this plan, out of {record['plans']} distinct ones; it contains "
            f"{record['overlap']:.1%} of the layers that tokens choose."
        ]
    if record["mean_over"] > 1:
        found.append(
            f"The run holds the budget in the mean over {record['mean_over']} tokens. The plan, and its share, are of "
            f"exactly {len(record['kept'])} layers for each token; the run's tokens ran {record['executed_mean']:.2f} "
            "in the mean on the text of the results."
        )
    sinks = run.recipe.routing.sink_tokens
    if sinks and len(record["kept"]) < record["layers"]:
        first = "token (an attention sink)" if sinks == 1 else f"{sinks} tokens (attention sinks)"
        found.append(
            f"The engine runs the first {first} of each text through all layers at every budget; the checkpoint lacks "
            "some of them, and treats sinks like any other token."
        )
    if mixed:
        found.append(
            "Its layers are of several kinds, which config.json lists one by one. Loaders and converters that derive "
            "the kind from a layer's index compute wrong results."
        )
    if (run.folder / ADAPTER).is_dir():
        found.append("The run is healed: its adapter is merged into these weights.")
    return found


def title(name: str) -> str:
    """The name of a backbone or text in prose: an embedded model's full name, the last part of a folder's path."""
    return title_of(shown_path(name))


def _terms(run: Run) -> str:
    """The terms of an embedded backbone in brackets; nothing for another backbone."""
    model = embedded.find(run.backbone)
    return f" ({model.notice})" if model and model.notice else ""


def _card(run: Run, body: str, **metadata: Any) -> str:
    from huggingface_hub import ModelCard, ModelCardData

    model = embedded.find(run.backbone)
    origin = model.origin if model else run.backbone
    known = origin.count("/") <= 1 and not is_local(run.backbone)
    data = ModelCardData(base_model=origin if known else None, pipeline_tag="text-generation", **metadata)
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}"))


def _comparison(scores: Sequence[Scores]) -> str:
    """Run and checkpoint as a Markdown table."""
    names = ("the run, as it routes", "this checkpoint")
    rows = [
        [name, *quality_cells(each.perplexity, each.interval(), each.mean_kl)]
        for name, each in zip(names, scores, strict=True)
    ]
    documents = counted(len(scores[0].tokens), "document")
    return f"{markdown(['', *MEASURES], rows)}\n{int(scores[0].tokens.sum())} scored tokens of {documents}.\n"


def _results(metrics: Mapping[str, Any]) -> str:
    """The results of a run at each budget as a Markdown table."""
    rows = [
        [f"{e['budget']:g}", f"{e['executed']['mean']:.2f}", *quality_cells(e["perplexity"], e["interval"], e["kl"])]
        for e in metrics["results"]
    ]
    first = metrics["results"][0]
    note = f"{first['tokens']} scored tokens of {counted(first['documents'], 'document')} of held-out text"
    if first["sink_tokens"]:
        note += f"; first tokens of a window at full depth, counted apart: {first['sink_tokens']}"
    return f"{markdown(['budget', 'layers per token', *MEASURES], rows)}\n{note}.\n"


def _usage(run: Run, name: str, budget: float) -> str:
    local = is_local(run.backbone)
    backbone = ', backbone="FOLDER"' if local else ""
    text = f"""\
```python
import buddy

model = buddy.load({json.dumps(name, ensure_ascii=False)}{backbone})
print(model.generate("The state of the union is", budget={budget:g}))
```

```bash
buddy pull {quote(name)} --out pulled
buddy generate --run pulled --budget {budget:g} "The state of the union is"
```
"""
    if local:
        text += (
            "\nIts backbone is a local folder. Name yours: it must have the same weights, which the fingerprint "
            "checks. For the commands, write it into `recipe.yaml` by `buddy pull --backbone FOLDER`.\n"
        )
    package = next((owner(each) for each in installed() if each.name == run.router_name), "")
    if ":" in run.router_name:
        text += f"\nThe router's class is `{run.router_name}`, a module that you need too.\n"
    elif package not in ("", "buddy-depth"):
        text += f"\nThe router is in the package `{package}`, which you need too.\n"
    return text
