"""How far a result may be from the float64 oracle, by the dtype of the inputs."""

from __future__ import annotations

from typing import Final

import torch

__all__ = ["TOLERANCES", "assert_near"]

# Inputs are rounded to the dtype before the oracle sees them. Half precisions round logits and weights once each.
TOLERANCES: Final = {
    torch.float64: {"rtol": 1e-10, "atol": 1e-12},
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    torch.float16: {"rtol": 1e-2, "atol": 5e-3},
    torch.bfloat16: {"rtol": 5e-2, "atol": 3e-2},
}


def assert_near(actual: torch.Tensor, oracle: torch.Tensor, dtype: torch.dtype) -> None:
    """Check a result for inputs of ``dtype`` against the float64 oracle."""
    torch.testing.assert_close(actual.double(), oracle, **TOLERANCES[dtype])
