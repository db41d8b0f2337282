"""Buddy: dynamic depth for language models. One router, every compute budget.

The public names below are imported when first used, so that `import buddy` loads nothing heavy.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what type checkers and editors read; `__getattr__` is what runs
    from buddy.budget import executed_layers as executed_layers
    from buddy.data.module import TextData as TextData
    from buddy.engine.model import RoutedLM as RoutedLM
    from buddy.errors import BuddyError as BuddyError
    from buddy.errors import BudgetError as BudgetError
    from buddy.hub.load import load as load
    from buddy.plan import Plan as Plan
    from buddy.router import Context as Context
    from buddy.router import Geometry as Geometry
    from buddy.router import LayerwiseRouter as LayerwiseRouter
    from buddy.router import Probe as Probe
    from buddy.router import Router as Router
    from buddy.training.module import RoutingModule as RoutingModule

__version__ = "0.2.0.dev0"

_HOMES = {
    "BudgetError": "buddy.errors",
    "BuddyError": "buddy.errors",
    "Context": "buddy.router",
    "Geometry": "buddy.router",
    "LayerwiseRouter": "buddy.router",
    "Plan": "buddy.plan",
    "Probe": "buddy.router",
    "RoutedLM": "buddy.engine.model",
    "Router": "buddy.router",
    "RoutingModule": "buddy.training.module",
    "TextData": "buddy.data.module",
    "executed_layers": "buddy.budget",
    "load": "buddy.hub.load",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'buddy' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
