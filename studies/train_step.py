"""`python -m studies.train_step`: a training step of Buddy against a bare PyTorch loop of the same passes.

The bare loop is written for Llama by hand: no Lightning, no routed layers, no hooks. It makes the same perturbed plans
and also runs each layer on the chosen tokens only, all rows in one product. It credits the noise where Buddy credits
the plans that came of it, which takes as long and trains less well. Both run in one process in turn, blocks of steps
against each other, and the figure is the ratio of their medians.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Annotated, Any

import lightning
import torch
import typer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from buddy.builders.data import build_data
from buddy.builders.model import build_backbone, build_model
from buddy.builders.training import build_module
from buddy.calibration.probe import CalibrationProbe
from buddy.config import load_recipe
from buddy.console import print_titled_table, quiet, stderr, stdout, track
from buddy.engine.model import RoutedLM
from buddy.losses import draw_budgets
from buddy.plan import Plan


class BareLoop:
    """Perturbed training of the default router in plain PyTorch, for a Llama in memory."""

    def __init__(self, routed: RoutedLM, batch: Callable[[int], Tensor], grid: list[int], lr: float) -> None:
        self.model, self.router, self.batch, self.grid = routed.backbone.model, routed.router, batch, grid
        self.layers, self.base = routed.geometry.layers, routed.backbone.base
        groups = [{"params": g["params"], "lr": lr * g["scale"]} for g in self.router.parameter_groups()]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0)

    def step(self, index: int, plans: int = 4, sigma: float = 0.15) -> None:
        """One optimiser step."""
        ids = self.batch(index)
        generator = torch.Generator().manual_seed(index)
        executed = draw_budgets(self.grid, len(ids), generator)
        scored = torch.arange(16, ids.shape[1] - 1)
        with torch.no_grad():
            hidden, values, rotary = self._first(ids)
            dense = self.model.lm_head(self._rest(hidden, rotary, None)[:, scored]).float().log_softmax(-1)
            probability, negative_entropy = dense.exp(), (dense.exp() * dense).sum(-1)
        scores = self._scores(hidden, values)
        free = executed < self.layers
        noise = 0.5 * torch.randn(plans // 2, *scores[free].shape, generator=generator)
        noise = noise + 0.75**0.5 * torch.randn(*noise.shape[:2], 1, noise.shape[-1], generator=generator)
        noise = torch.cat([noise, -noise])
        with torch.no_grad():
            losses = (
                torch.stack(
                    [
                        self._kl(
                            hidden[free],
                            rotary,
                            scores[free] + sigma * e,
                            executed[free],
                            scored,
                            probability[free],
                        )
                        for e in noise
                    ]
                )
                + negative_entropy[free]
            )
            credit = (losses - losses.mean(0)) / (losses.std(0).mean(-1, keepdim=True) + 1e-6)
            direction = (credit[..., None] * noise[:, :, scored]).mean(0) / sigma
        loss = (direction * scores[free][:, scored]).sum(-1).mean()
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.router.parameters(), 10.0)
        self.optimizer.step()

    def _first(self, ids: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        hidden = self.base.embed_tokens(ids)
        rotary = self.base.rotary_emb(hidden, torch.arange(ids.shape[1])[None])
        values = self.base.layers[0].self_attn.v_proj(self.base.layers[0].input_layernorm(hidden)).float()
        return self._layer(self.base.layers[0], hidden, rotary, None), values, rotary

    def _scores(self, hidden: Tensor, values: Tensor) -> Tensor:
        mean = values.cumsum(1) / torch.arange(1, values.shape[1] + 1)[None, :, None]
        seen = torch.cat([F.layer_norm(x, x.shape[-1:]) for x in (mean, values, hidden.float())], -1)
        scores = self.router.output(F.silu(self.router.input(seen)))
        return 2.0 * torch.tanh(scores / 2.0) + 0.3 * self.router.prior[-1]  # the same for every K

    def _kl(
        self, hidden: Tensor, rotary: Any, scores: Tensor, executed: Tensor, scored: Tensor, probability: Tensor
    ) -> Tensor:
        runs = Plan.from_scores(scores, executed[:, None].expand(scores.shape[:2]), self.layers).runs
        runs[:, 0] = True
        logits = self.model.lm_head(self._rest(hidden, rotary, runs)[:, scored])
        out = torch.empty(logits.shape[:2])
        for row in range(len(logits)):  # few tokens at a time, as the objective of Buddy does
            for at in range(0, logits.shape[1], 8):
                part = logits[row, at : at + 8].float()
                out[row, at : at + 8] = part.logsumexp(-1) - (probability[row, at : at + 8] * part).sum(-1)
        return out

    def _rest(self, hidden: Tensor, rotary: Any, runs: Tensor | None) -> Tensor:
        for index, layer in enumerate(self.base.layers[1:], start=1):
            hidden = self._layer(layer, hidden, rotary, None if runs is None else runs[..., index])
        return self.base.norm(hidden)

    def _layer(self, layer: nn.Module, hidden: Tensor, rotary: Any, chosen: Tensor | None) -> Tensor:
        attention, (batch, length, width) = layer.self_attn, hidden.shape
        if chosen is None:
            chosen = torch.ones(batch, length, dtype=torch.bool)
        states, flat = layer.input_layernorm(hidden), chosen.flatten().nonzero()[:, 0]
        shape = (batch, length, -1, attention.head_dim)
        keys, values = (p(states).view(shape).transpose(1, 2) for p in (attention.k_proj, attention.v_proj))
        cos, sin = rotary
        _, keys = apply_rotary_pos_emb(keys, keys, cos, sin)
        query = attention.q_proj(states.view(-1, width)[flat]).view(len(flat), -1, attention.head_dim)
        _rows, at = flat // length, flat % length
        query = query * cos[0, at, None] + _rotated(query) * sin[0, at, None]
        attended, start = torch.empty_like(query), 0
        for row, count in enumerate(chosen.sum(1).tolist()):
            if not count:
                continue
            part = slice(start, start + count)
            mask = None if count == length else torch.arange(length) <= at[part, None]
            attended[part] = F.scaled_dot_product_attention(
                query[part].transpose(0, 1)[None],
                keys[row : row + 1],
                values[row : row + 1],
                attn_mask=mask,
                is_causal=mask is None,
                enable_gqa=True,
            )[0].transpose(0, 1)
            start += count
        out = hidden.reshape(-1, width)[flat] + attention.o_proj(attended.flatten(1))
        out = out + layer.mlp(layer.post_attention_layernorm(out))
        return hidden.reshape(-1, width).index_copy(0, flat, out).view(hidden.shape)


def _rotated(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


class _Clock(Callback):
    """Seconds from the end of one step to the end of the next, so that the trainer's own work counts."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_start(self, *_: Any) -> None:
        self._before = time.perf_counter()

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self._before)
        self._before = now


def measure(rounds: int, steps: int) -> tuple[list[float], list[float]]:
    """Seconds per step of Buddy and of the bare loop, `rounds` blocks of `steps` steps each, in turn."""
    # The greedy search for a prior takes minutes and has no part in a step.
    quick = ["rivals=[]", "router.options.prior=block-influence"]
    recipe = load_recipe("quickstart", [f"trainer.max_steps={steps}", *quick])
    backbone = build_backbone(recipe)
    data = build_data(recipe, backbone)
    data.setup()
    routed = build_model(recipe, backbone)
    routed.router.calibrate(CalibrationProbe(routed, data.calibration.input_ids[:4]))
    asked = {routed.executed_layers(budget) for budget in recipe.budgets}
    grid = sorted(asked - {routed.geometry.layers}) or sorted(asked)  # as the module draws them
    ours, bare = [], []
    for _ in track(range(rounds), "Blocks"):
        clock = _Clock()
        with quiet():
            module = build_module(recipe, routed)
            module.mark_calibrated()
            trainer = lightning.Trainer(
                max_steps=steps,
                limit_val_batches=0,
                accelerator="cpu",
                callbacks=[clock],
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            trainer.fit(module, datamodule=data)
        ours += clock.seconds[1:]
        loop = BareLoop(routed, data.batch, grid, recipe.optimizer.lr)
        bare += _timed(loop, steps)[1:]
    return ours, bare


def _timed(loop: BareLoop, steps: int) -> list[float]:
    seconds = []
    for index in range(steps):
        start = time.perf_counter()
        loop.step(index)
        seconds.append(time.perf_counter() - start)
    return seconds


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Blocks of each, in turn.")] = 4,
    steps: Annotated[int, typer.Option(min=2, help="Steps in a block; the first of each is not counted.")] = 6,
) -> None:
    """Time a training step of the quickstart against a bare PyTorch loop of the same mathematics."""
    ours, bare = measure(rounds, steps)
    title = f"Seconds per training step, {len(ours)} steps each, {torch.get_num_threads()} threads"
    rows = [
        (name, *(f"{f(seconds):.2f}" for f in (statistics.median, min, max)))
        for name, seconds in (("buddy", ours), ("bare loop", bare))
    ]
    print_titled_table(title, ["", "median", "least", "most"], rows)
    stdout.print(f"ratio of medians: {statistics.median(ours) / statistics.median(bare):.3f}")
    stderr.print("Expected: at most 1.25.")


if __name__ == "__main__":
    typer.run(main)
