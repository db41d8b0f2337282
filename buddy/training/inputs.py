"""What a run is made of beside its recipe: where one of these changed, it is another run."""

from __future__ import annotations

import ast
import hashlib
import inspect

from buddy.backbone.load import Backbone
from buddy.config import Recipe
from buddy.data.module import TextData
from buddy.registry import load


def inputs_of(recipe: Recipe, backbone: Backbone, data: TextData) -> dict[str, str]:
    """Digests of the weights, the text and the code in the file of the router's class, by what they are of."""
    code, more = _code(load(recipe.router.name)), data.train_fingerprint
    made_of = {"model": backbone.fingerprint, "text": data.fingerprint, "router's code": code}
    return made_of | ({"training text": more} if more else {})


def _code(router: type) -> str:
    """Of what the class's file does: comments, docstrings and layout leave it as it is."""
    try:
        tree = ast.parse(inspect.getsource(inspect.getmodule(router)))
    except (OSError, TypeError):  # made in a notebook, say
        return "unknown"
    return hashlib.sha256(ast.unparse(_Undocumented().visit(tree)).encode()).hexdigest()[:16]


class _Undocumented(ast.NodeTransformer):
    """Leaves out strings that stand alone: docstrings, and whatever else does nothing."""

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        alone = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if alone else node
