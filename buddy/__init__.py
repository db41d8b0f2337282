"""Buddy: dynamic depth for language models. One router, every compute budget.

The public names below are imported when first used, so that `import buddy` loads nothing heavy.
"""

from importlib import import_module

__version__ = "0.1.0"

_HOMES = {
    "BudgetError": "buddy.errors",
    "BuddyError": "buddy.errors",
    "Context": "buddy.router",
    "Geometry": "buddy.router",
    "LayerwiseRouter": "buddy.router",
    "Plan": "buddy.plan",
    "Probe": "buddy.calibration",
    "Router": "buddy.router",
    "executed_grid": "buddy.budget",
    "executed_layers": "buddy.budget",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'buddy' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
