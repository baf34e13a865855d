"""Random inputs that are new in every run, on the device under test, and that a failure tells how to repeat."""

from __future__ import annotations

import os
import random
from collections.abc import Callable

import torch

__all__ = ["Draw", "run_check"]


class Draw:
    """A device and a source of random inputs.

    Attributes:
        device: Where inputs are made: ``cpu`` for the interpreter, or ``cuda``.
        seed: Of the generator.
    """

    def __init__(self, device: torch.device, seed: int) -> None:
        self.device = device
        self.seed = seed
        self._random = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return standard normal numbers, rounded to ``dtype``."""
        return torch.randn(shape, generator=self._random).to(dtype).to(self.device)

    def uniform(self, *shape: int) -> torch.Tensor:
        """Return float32 numbers from 0 to 1."""
        return torch.rand(shape, generator=self._random).to(self.device)

    def integers(self, low: int, high: int, *shape: int) -> torch.Tensor:
        """Return int64 numbers from ``low`` to ``high - 1``."""
        return torch.randint(low, high, shape, generator=self._random).to(self.device)

    def choice(self, count: int, total: int) -> torch.Tensor:
        """Return ``count`` different numbers below ``total``, ascending, int64, on the CPU."""
        return torch.randperm(total, generator=self._random)[:count].sort().values

    def seed_for(self) -> int:
        """Return a seed for a helper that makes inputs of its own."""
        return int(torch.randint(0, 2**31 - 1, (), generator=self._random))


def run_check(check: Callable[[Draw], None], device: torch.device) -> None:
    """Run a check on fresh inputs.

    Raises:
        AssertionError: The check failed; the message says how to repeat it.
    """
    chosen = os.environ.get("ADAKV_SEED")
    seed = random.SystemRandom().randrange(2**31) if chosen is None else int(chosen)
    try:
        check(Draw(device, seed))
    except AssertionError as error:
        raise AssertionError(f"{error}\n(repeat with ADAKV_SEED={seed})") from error
