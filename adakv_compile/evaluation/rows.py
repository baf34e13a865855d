"""The tokens of several prompts that are read together: rows of a batch, padded on the left."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from adakv_compile.evaluation.prompts import Prompt

__all__ = ["Rows"]


class Rows:
    """The tokens of a batch, call by call, with the mask of all so far; without one while nothing is padded.

    Args:
        prompts: The prompts.
        filler: A token to pad with.
        device: Where tensors are made.

    Attributes:
        padded_length: Tokens of the longest prompt, without its question.
        longest_question: Tokens of the longest question.
    """

    def __init__(self, prompts: Sequence[Prompt], filler: int, device: torch.device) -> None:
        self._texts, self._device, self._filler = prompts, device, filler
        self.padded_length = max(len(prompt.compressed) for prompt in prompts)
        self.longest_question = max(len(prompt.question) for prompt in prompts)
        self._is_padded = len({(len(prompt.compressed), len(prompt.question)) for prompt in prompts}) > 1
        self._mask = torch.zeros(len(prompts), 0, dtype=torch.int64, device=device)

    def compressed(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return what is compressed, ``[B, T]``, and the mask."""
        return self._next([prompt.compressed for prompt in self._texts], self.padded_length)

    def question(self, column: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return a column ``[B, 1]`` of the questions, padded on the left, and the mask."""
        questions = [prompt.question for prompt in self._texts]
        places = [column - self.longest_question + len(ids) for ids in questions]
        # Not a slice from below zero, which would count from the end.
        found = [ids[max(0, place) : place + 1] for ids, place in zip(questions, places, strict=True)]
        return self._next(found, 1)

    def told(self, tokens: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return tokens that were just generated, ``[B, 1]``, and the mask."""
        return self._next([(token,) for token in tokens], 1)

    def _next(self, ids: Sequence[Sequence[int]], count: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        gaps = [count - len(some) for some in ids]
        filled = [[*[self._filler] * gap, *some] for gap, some in zip(gaps, ids, strict=True)]
        real = [[0] * gap + [1] * (count - gap) for gap in gaps]
        if self._is_padded:
            self._mask = torch.cat([self._mask, torch.tensor(real, device=self._device)], 1)
        return torch.tensor(filled, device=self._device), self._mask if self._is_padded else None
