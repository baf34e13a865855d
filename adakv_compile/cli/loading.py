"""From the names on a command line to a model, a prompt and options, or to an error that says what is wrong."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from adakv_compile.cli.errors import CommandError

__all__ = ["DTYPES", "Loaded", "encode", "load", "parse_options", "read_prompt"]

DTYPES: Final = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model that is ready to generate.

    Attributes:
        name: What the user called it.
        model: A causal language model of transformers, in evaluation mode, on ``device``.
        tokenizer: Its tokenizer.
        device: Where it runs.
    """

    name: str
    model: Any
    tokenizer: Any
    device: torch.device


def parse_options(named: dict[str, object], pairs: Sequence[str]) -> dict[str, object]:
    """Return the backend's options as a dictionary, not yet validated.

    Args:
        named: Options that have a flag of their own; those that are None were not given.
        pairs: ``NAME=VALUE`` texts; a value is read as a Python literal where it is one.

    Raises:
        CommandError: A pair has no ``=``.
    """
    options = {name: value for name, value in named.items() if value is not None}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise CommandError(f"--option {pair!r} is not of the form NAME=VALUE, as in --option pool=avg")
        options[name.strip()] = _literal(text.strip())
    budget = options.get("budget")
    if isinstance(budget, str):
        options["budget"] = _literal(budget)
    return options


def _literal(text: str) -> object:
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def read_prompt(path: Path) -> str:
    """Return the text of a prompt file.

    Raises:
        CommandError: The file can't be read, is not text, or holds nothing.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = (
            "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else (error.strerror or str(error)).lower()
        )
        raise CommandError(f"can't read the prompt file {str(path)!r}: {reason}") from error
    if not text.strip():
        raise CommandError(f"the prompt file {str(path)!r} is empty; give a text for the model to continue")
    return text


def load(name: str, dtype: str, device: str) -> Loaded:
    """Load a model and its tokenizer.

    Args:
        name: Folder, or name on the hub.
        dtype: One of :data:`DTYPES`; ``"auto"`` is that of the checkpoint.
        device: As for ``torch.device``; ``"auto"`` is the GPU if there is one.

    Raises:
        CommandError: The device or dtype is unknown, the model can't be had, or it keeps no KV cache.
    """
    if dtype not in DTYPES:
        raise CommandError(f"--dtype is {dtype!r}; allowed: {', '.join(DTYPES)}")
    target = _device(device)
    logging.disable_progress_bar()
    if not Path(name).exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise CommandError(f"there is no model folder {name!r}")
    try:
        config = AutoConfig.from_pretrained(name)
        _check_cache(name, config)
        model: Any = AutoModelForCausalLM.from_pretrained(name, config=config, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise CommandError(_load_failure(name, error)) from error
    return Loaded(name, model.to(target).eval(), tokenizer, target)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        # Made there, not only named: a device that PyTorch knows may not exist on this machine.
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise CommandError(f"--device {name!r} can't be used: {_first_line(error)}") from error


def _check_cache(name: str, config: Any) -> None:
    architectures = ", ".join(getattr(config, "architectures", None) or [type(config).__name__])
    if getattr(config, "is_encoder_decoder", False):
        raise CommandError(f"{name!r} ({architectures}) is an encoder-decoder; adakv compresses decoder-only models")
    # State-space models have neither attention heads nor keys and values.
    text_config = config.get_text_config()
    if getattr(text_config, "num_attention_heads", None) is None:
        raise CommandError(
            f"{name!r} ({architectures}) has no attention and keeps no KV cache; there is nothing to compress"
        )


def _load_failure(name: str, error: Exception) -> str:
    if Path(name).is_dir():
        return f"the folder {name!r} can't be loaded as a causal language model with a tokenizer: {_first_line(error)}"
    return f"no model {name!r}: it is not a folder here, and the hub did not provide it: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0]


def encode(loaded: Loaded, text: str, max_new_tokens: int) -> torch.Tensor:
    """Return the prompt as token ids ``[1, T]`` on the model's device.

    Args:
        loaded: The model.
        text: The prompt.
        max_new_tokens: What will be generated behind it.

    Raises:
        CommandError: The prompt has no tokens, or is longer than the model's positions.
    """
    ids = loaded.tokenizer(text, return_tensors="pt").input_ids
    length = int(ids.shape[-1])
    if not length:
        raise CommandError("the tokenizer makes no tokens of the prompt; give a text for the model to continue")
    limit = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(limit, int) and length + max_new_tokens > limit:
        raise CommandError(
            f"the prompt has {length:,} tokens and --max-new-tokens asks for {max_new_tokens:,} more, but the model "
            f"has {limit:,} positions; shorten the prompt by {length + max_new_tokens - limit:,} tokens"
        )
    return ids.to(loaded.device)
