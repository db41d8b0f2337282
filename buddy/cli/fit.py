"""`buddy fit`."""

from typing import Annotated

from buddy.cli.app import Overrides, RecipeOption, app


@app.command(epilog="\b\nExample: buddy fit --recipe quickstart router=uniform 'rivals=[]'")
def fit(
    recipe: Annotated[str, RecipeOption],
    overrides: Overrides = None,
) -> None:
    """Train or calibrate a router and evaluate it."""
    from buddy.config import load_recipe, recipe_name

    resolved = load_recipe(recipe, overrides or [])
    from buddy.compare import fit as run_fit
    from buddy.evaluation.record import shown_command

    overrides = [each for each in overrides or () if not each.startswith("output=")]
    run_fit(resolved, recipe_name(recipe), shown_command(["buddy", "fit", "--recipe", recipe, *overrides]))
