"""`python -m studies.hindsight`: what better plans could still win, found with the answers in hand.

For each window and budget one correction of the router's scores, the same for all its tokens, is searched: of random
steps away from the best one so far, that whose plans come closest (KL) to the dense model is kept. No router could
choose so, since the whole window was read, and a longer search finds more: it bounds from below what is left to win.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from buddy.builders.model import load_model
from buddy.console import print_titled_table, status, stdout, tracker
from buddy.engine.model import RoutedLM
from buddy.errors import BuddyError, BudgetError, RunError
from buddy.evaluation.evaluate import windows_for
from buddy.io import check_output_path, within_memory, write_json
from buddy.losses import DenseDistribution, kl_to_dense
from buddy.router import LayerwiseRouter, available_budgets
from buddy.run import read_run

STEP = 0.4  # of a correction, in standard deviations of a token's scores over the layers


@torch.no_grad()
def search(
    routed: RoutedLM, ids: Tensor, executed: int, *, prompt: int, rounds: int, tries: int, generator: torch.Generator
) -> Tensor:
    """(1 + rounds, B): mean KL to the dense model in nats per token, of the router and of the best after each round.

    Args:
        routed: a router that has scores.
        ids: (B, T) long.
        executed: K.
        prompt: tokens at the start that are not scored.
        rounds: how often the best correction so far is the start of new ones.
        tries: corrections tried for each window in a round.
        generator: the only source of randomness.
    """
    count, routable = torch.full((len(ids),), executed, device=ids.device), routed.geometry.routable
    scored = torch.arange(prompt - 1, ids.shape[1] - 1, device=ids.device)
    seen = routed(ids, logits_to_keep=scored)
    dense = DenseDistribution(seen.logits)
    asked = count[:, None].expand(ids.shape).to(ids.device)
    scores = routed.router.score(replace(seen.context, executed=asked))
    sigma = STEP * float(scores.std(-1).mean())

    def measured(corrections: Tensor) -> Tensor:
        """(M, B) of corrections (M, B, R)."""
        moved = (scores + corrections[:, :, None].to(scores)).flatten(0, 1)
        rows, counts = ids.repeat(len(corrections), 1), count.repeat(len(corrections))
        logits = routed(rows, runs=routed.plan(moved, counts, prompt), logits_to_keep=scored).logits
        parts = logits.unflatten(0, (len(corrections), -1))
        return torch.stack([kl_to_dense(dense, part).mean(-1) for part in parts])

    best = torch.zeros(len(ids), routable)
    found = [measured(best[None])[0]]
    for _ in range(rounds):
        steps = best + sigma * torch.randn(tries, len(ids), routable, generator=generator)
        values, least = measured(steps).min(0)
        better = values < found[-1]
        best = torch.where(better[:, None].cpu(), steps[least.cpu(), torch.arange(len(ids))], best)
        found.append(torch.where(better, values, found[-1]))
    return torch.stack(found)


def hindsight(
    folder: Path,
    *,
    windows: int = 8,
    rounds: int = 4,
    tries: int = 8,
    data: str | None = None,
    json_file: Path | None = None,
) -> None:
    """Search for each budget of a run below full depth, and print KL of the router and of the best plans found.

    Args:
        folder: a finished run; nothing is written there.
        windows: the first of the validation windows or of `data`.
        json_file: where the numbers go, if anywhere.

    Raises:
        BuddyError: the run or the text cannot be used, or there is nothing to search.
    """
    run = read_run(folder)
    if json_file:
        check_output_path(json_file)
    with status(f"Loading {run.backbone} …"):
        routed = load_model(run)
        routed.settings = replace(routed.settings, mean_over=1)  # plans of a mean would depend on later tokens
    if isinstance(routed.router, LayerwiseRouter):
        raise RunError(f"The router {run.router_name} has no scores to correct; name a run of another router.")
    asked = {routed.executed_layers(budget) for budget in available_budgets(routed.router, run.recipe.budgets)} - {
        routed.geometry.layers
    }
    if not asked:
        raise BudgetError("The run has no budget below full depth, so there is nothing to search; name another run.")
    with status("Reading text …"):
        ids = windows_for(run, routed, data, "validation").input_ids[:windows].to(routed.backbone.device)
    batches = [(count, part) for count in sorted(asked, reverse=True) for part in ids.split(run.recipe.data.batch_size)]
    found: dict[int, list[Tensor]] = {count: [] for count in asked}
    how = {"prompt": run.recipe.data.prompt, "rounds": rounds, "tries": tries}
    with within_memory(f"{tries} plans for each of {len(batches[0][1])} windows", "free some, or lower --tries"):
        for count, part in tracker("Searching in hindsight")(batches):
            generator = torch.Generator().manual_seed(run.recipe.seed)
            found[count].append(search(routed, part, count, generator=generator, **how))
    rows = [_row(count, torch.cat(parts, 1)) for count, parts in sorted(found.items(), reverse=True)]
    title = f"{run.router_name} on {len(ids)} windows of {data or run.recipe.data.source}"
    _show(rows, title, rounds // 2 * tries, rounds * tries)
    if json_file:
        write_json(json_file, {"results": rows, "plans": rounds * tries})
        stdout.print(f"JSON: {json_file}")


def _row(count: int, kl: Tensor) -> dict[str, float]:
    """Means over the windows of (1 + rounds, N): at the start, after half of the rounds, and after all."""
    half, (first, last) = kl[(len(kl) - 1) // 2].mean(), (kl[0].mean(), kl[-1].mean())
    return {"layers": count, "router": float(first), "half": float(half), "best": float(last)}


def _show(rows: list[dict[str, float]], title: str, half: int, plans: int) -> None:
    cells = []
    for row in rows:
        left = f"{row['router'] - row['best']:.3f} ({1 - row['best'] / row['router']:.0%})"
        cells.append((str(row["layers"]), *(f"{row[name]:.3f}" for name in ("router", "half", "best")), left))
    head = ["layers", "router", f"best of {half}", f"best of {plans}", "left to win"]
    print_titled_table(f"{title}: KL to the dense model, nats per token", head, cells)


def main(
    run: Annotated[Path, typer.Option("--run", metavar="DIR", help="A run folder.")],
    windows: Annotated[int, typer.Option(min=1, metavar="N", help="Windows at most.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, metavar="N", help="Rounds of the search.")] = 4,
    tries: Annotated[int, typer.Option(min=1, metavar="N", help="Plans for each window in a round.")] = 8,
    data: Annotated[str | None, typer.Option(metavar="SOURCE", help="A text instead of the run's validation.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the numbers there.")] = None,
) -> None:
    """Show what better plans could still win at each budget, found with the answers in hand."""
    try:
        hindsight(run, windows=windows, rounds=rounds, tries=tries, data=data, json_file=json_file)
    except BuddyError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from error


if __name__ == "__main__":
    typer.run(main)
