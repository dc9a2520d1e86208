"""Trimtab: predict what a technique would save, apply it to the real model, measure that it did."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trimtab.api import applied, convert, find_plans, load, make_plan, measure, predict
    from trimtab.errors import TrimtabError
    from trimtab.spec.parallel import Parallel
    from trimtab.spec.plan import Plan
    from trimtab.spec.report import Figure, Report
    from trimtab.spec.workload import Workload

__version__ = "0.1.0"

_LAZY = {
    "load": "trimtab.api", "predict": "trimtab.api", "measure": "trimtab.api", "applied": "trimtab.api",
    "convert": "trimtab.api", "make_plan": "trimtab.api", "find_plans": "trimtab.api", "Plan": "trimtab.spec.plan",
    "Parallel": "trimtab.spec.parallel", "Workload": "trimtab.spec.workload",
    "Report": "trimtab.spec.report", "Figure": "trimtab.spec.report", "TrimtabError": "trimtab.errors",
}  # fmt: skip

__all__ = [
    "Figure", "Parallel", "Plan", "Report", "TrimtabError", "Workload", "__version__",
    "applied", "convert", "find_plans", "load", "make_plan", "measure", "predict",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'trimtab' has no attribute '{name}'")


class _Package(ModuleType):
    """Keeps `trimtab.predict` and `trimtab.measure` the functions, whatever is imported from the folders so named.

    Importing `trimtab.predict.price` makes Python set the attribute `predict` of this package to the folder; a property
    of the module's class comes first and ignores that.
    """

    predict = property(lambda self: __getattr__("predict"), lambda self, value: None)
    measure = property(lambda self: __getattr__("measure"), lambda self, value: None)


sys.modules[__name__].__class__ = _Package
