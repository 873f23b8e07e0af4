"""eit_lab: does inductive bias help a pyramid-free vision transformer? ViT, LSRA and EIT (arXiv:2203.07116), compared fairly."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from eit_lab.version import __version__

if TYPE_CHECKING:
    from eit_lab.models.create import create_model as create_model

__all__ = ["__version__", "create_model"]


def __getattr__(name: str) -> Any:
    # Lazy, so that commands which need no torch (help, config checks, reports) do not wait for it.
    if name == "create_model":
        from eit_lab.models.create import create_model

        return create_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
