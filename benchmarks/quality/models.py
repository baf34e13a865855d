"""The models of the test bed: one architecture and tokenizer, weights of several trainings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from adakv_compile.evaluation.fingerprint import fingerprint
from benchmarks.testbed.model import WEIGHTS

__all__ = ["Trained", "folders"]


def folders(root: Path = WEIGHTS) -> dict[int, Path]:
    """Return the folder of each training by its seed.

    Args:
        root: Folder of folders that are named as seeds.

    Raises:
        ValueError: There is none.
    """
    found = {int(path.name): path for path in sorted(root.iterdir()) if path.name.isdecimal()}
    if not found:
        raise ValueError(f"{root} holds no weights: folders 0, 1, ... with a model each are looked for")
    return found


class Trained:
    """One decoder whose weights are exchanged, so that a setting is compiled once for all trainings.

    Args:
        where: The folder of each training by its seed.

    Attributes:
        network: The decoder, in evaluation mode.
        tokenizer: The tokenizer of all of them.
        fingerprints: Of each training's weights.
    """

    def __init__(self, where: dict[int, Path]) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(next(iter(where.values())))
        loaded = {seed: AutoModelForCausalLM.from_pretrained(path).eval() for seed, path in where.items()}
        self.fingerprints: Final = {seed: fingerprint(model) for seed, model in loaded.items()}
        self._weights = {seed: model.state_dict() for seed, model in loaded.items()}
        self.network: Any = next(iter(loaded.values()))
        # The first model's own weights would be overwritten by the others'.
        self._weights = {
            seed: {name: value.clone() for name, value in weights.items()} for seed, weights in self._weights.items()
        }
        self._current: int | None = None

    @property
    def seeds(self) -> Sequence[int]:
        """The seeds of the trainings."""
        return list(self._weights)

    def enter(self, seed: int) -> None:
        """Put a training's weights into the decoder.

        Args:
            seed: Seed of the training.
        """
        if seed != self._current:
            with torch.no_grad():
                self.network.load_state_dict(self._weights[seed])
            self._current = seed
