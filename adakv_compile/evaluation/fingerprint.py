"""What tells one model's weights from another's, wherever they were loaded from."""

from __future__ import annotations

import hashlib
from typing import Any, Final

import torch

__all__ = ["fingerprint"]

_SAMPLED: Final = 16


def fingerprint(model: Any) -> str:
    """Return a SHA-256 over a model's configuration and its parameters' names, shapes and a few of their values.

    Sixteen values of each parameter: a model that was trained any further has another fingerprint, and a large one
    needn't be read whole.

    Args:
        model: A model of transformers.
    """
    digest = hashlib.sha256(str(model.config.to_json_string()).encode())
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        step = max(1, flat.numel() // _SAMPLED)
        values = flat[::step][:_SAMPLED].to(device="cpu", dtype=torch.float64)
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype} {values.tolist()}".encode())
    return digest.hexdigest()
