"""headwise: run hybrid-attention models fused on every layer, plan their memory to the byte, explain each choice.

The names below load on first use, so that importing headwise costs nothing and needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headwise.api import plan, read_model
    from headwise.engine.llm import LLM

__version__ = "0.1.0"
__all__ = ["LLM", "plan", "read_model"]

_WHERE = {"LLM": "headwise.engine.llm", "plan": "headwise.api", "read_model": "headwise.api"}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'headwise' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)
