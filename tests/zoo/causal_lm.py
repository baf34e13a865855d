"""The subjects that transformers has: one for every type in its causal language model mapping."""

from __future__ import annotations

import functools
import inspect
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.zoo.configs import CHUNK, SLIDING, VOCAB, small_config
from tests.zoo.exceptions import NO_PADDING, PREFIX
from tests.zoo.subject import Subject

__all__ = ["TooLargeError", "build", "subject"]

#: More parameters than this are a size that the small configuration missed.
MAX_PARAMETERS: Final = 50_000_000


class TooLargeError(Exception):
    """The small configuration of a type is not small."""


def subject(model_type: str) -> Subject:
    """Return the subject of a type in the mapping, batches with left padding where the type takes a mask."""
    return Subject(
        name=model_type,
        build=functools.partial(build, model_type),
        run=_run,
        vocab=VOCAB,
        supports_padding=model_type not in NO_PADDING,
        generate=_generate,
        prefix=PREFIX.get(model_type, 0),
        windows=(SLIDING, CHUNK),
    )


def build(model_type: str) -> PreTrainedModel:
    """Return a small random decoder of a type, its attention by PyTorch's operator where the type has that.

    Raises:
        TooLargeError: It would have more than :data:`MAX_PARAMETERS`.
        Exception: Whatever the type raises about its configuration.
    """
    config = small_config(model_type)
    try:
        _check_size(config, "sdpa")
        implementation = "sdpa"
    except (ValueError, ImportError):
        _check_size(config, "eager")
        implementation = "eager"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4.0)
    return model


def _check_size(config: Any, implementation: str) -> None:
    with torch.device("meta"):
        try:
            model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
        except NotImplementedError:  # something is read while it is built
            return
    count = sum(parameter.numel() for parameter in model.parameters())
    if count > MAX_PARAMETERS:
        raise TooLargeError(f"the small configuration has {count} parameters")


def _run(model: nn.Module, ids: Tensor, state: Any, mask: Tensor | None) -> tuple[Tensor, Any]:
    accepted = inspect.signature(model.forward).parameters
    settings: dict[str, Any] = {"use_cache": True}
    if state is not None:
        settings["past_key_values"] = state
    if mask is not None:
        settings["attention_mask"] = mask
        if "position_ids" in accepted:
            settings["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    out = model(ids, **settings)
    return out.logits, getattr(out, "past_key_values", None)


def _generate(model: nn.Module, ids: Tensor, mask: Tensor | None, count: int) -> Tensor:
    assert isinstance(model, PreTrainedModel)
    found = model.generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=False, use_cache=True)
    return found[:, ids.shape[1] :]
