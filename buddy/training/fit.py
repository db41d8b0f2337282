"""`buddy fit`: calibrate or train a router and its rivals under one recipe, evaluate them, and leave run folders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from buddy import console, distributed
from buddy.config import PredictorSection, Recipe, with_router
from buddy.evaluation.report import show_comparison
from buddy.registry import check_names
from buddy.run import RunPlace
from buddy.sharding import join, settle, shard, shards
from buddy.training.ledger import Ledger
from buddy.training.session import Session, prepare


def fit(recipe: Recipe, recipe_name: str) -> None:
    """Fit the recipe's router and its rivals, and show them side by side.

    Rivals come first: they take little time, so that what is stopped and repeated is the training that can go on.

    Args:
        recipe: the whole run.
        recipe_name: names the folder of the runs.

    Raises:
        BuddyError: anything that a person can mend; what was finished before stays.
        KeyboardInterrupt: stopped in good order; the same call goes on from a checkpoint.
    """
    leads = distributed.leads()  # the others of a distributed run are begun by the same command
    console.errors.quiet = console.results.quiet = not leads
    check_names(recipe.optimizer.lr_by_router)
    own = with_router(recipe, recipe.router.name)
    recipes = [*(_rival(recipe, name) for name in recipe.rivals if name != recipe.router.name), own]
    places = [RunPlace.of(each, recipe_name) for each in recipes]
    for place in places if leads else ():
        place.settle()
    session = _begin(recipes, places)
    with distributed.linked():
        if not leads:
            return session.follow(recipes, places)
        ledger, scores = Ledger(places[-1]), {}
        for number, (each, place) in enumerate(zip(recipes, places, strict=True), start=1):
            kept = session.kept(each, place, ledger)
            if len(recipes) > 1:
                done = "" if kept is None else ", finished before"
                console.errors.print(f"Router {number} of {len(recipes)}: {each.router.name}{done}", soft_wrap=True)
            distributed.tell(kept is not None)
            scores[each.router.name] = session.run(each, recipe_name, place) if kept is None else kept
            ledger.note(each.router.name)
    ordered = {name: scores[name] for name in (recipe.router.name, *recipe.rivals)}
    folders = {each.router.name: place.final for each, place in zip(recipes, places, strict=True)}
    show_comparison(ordered, folders, recipe.router.name)
    ledger.close()


def _begin(recipes: Sequence[Recipe], places: Sequence[RunPlace]) -> Session:
    """Backbone and text in each process, once the first has found all well, and the processes together."""
    leads, trainer = distributed.leads(), recipes[-1].trainer
    if not leads or distributed.from_torchrun() > 1:
        join(trainer)  # all are there already
    with distributed.one_by_one(trainer) if shards(trainer) else distributed.leader_first():
        session = Session(*prepare(recipes))
        for place in places if leads else ():
            with place.lock():  # a second fit is refused here, before it does anything
                pass
        join(trainer)
        if shards(trainer):
            shard(session.backbone, trainer.accelerator)
    if shards(trainer):
        settle(session.backbone)
    return session


def _rival(recipe: Recipe, name: str) -> Recipe:
    """The recipe for another router; a checkpoint and the budget predictor are the recipe's own router's."""
    trainer = replace(recipe.trainer, ckpt_path=None)
    return replace(with_router(recipe, name), trainer=trainer, predictor=PredictorSection())
