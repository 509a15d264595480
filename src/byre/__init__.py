"""byre: disk images, backing chains, live block jobs and exports as a library.

Public names are resolved on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

from .typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .errors import ByreError
    from .graph.creating import create
    from .graph.graph import Graph
    from .graph.opening import Policy
    from .image import Image
    from .opening import open

__version__ = "0.1.0"
__all__ = ["ByreError", "Graph", "Image", "Policy", "__version__", "create", "open"]

_HOMES = {
    "ByreError": "byre.errors",
    "Graph": "byre.graph.graph",
    "Image": "byre.image",
    "Policy": "byre.graph.opening",
    "create": "byre.graph.creating",
    "open": "byre.opening",
}


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'byre' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(home), name)
