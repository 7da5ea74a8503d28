"""raydream turns a text prompt into several different 3D assets: particles on Ray under one shared score model."""

import importlib
from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """``raydream.generate``, found when somebody asks for it: every module of the package imports this one first."""
    if name == "generate":
        return importlib.import_module("raydream.runs").generate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
