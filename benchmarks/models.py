"""What benchmarks do with a model, whatever the device."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

__all__ = ["twin"]


def twin(model: nn.Module) -> Any:
    """Return a copy that has the same weights in the same memory, to be compiled in another way."""
    shared: dict[int, Any] = {id(weight): weight for weight in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)
