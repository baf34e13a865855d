"""The ways in which programs build attention masks; see ``MaskFunction`` for the arguments."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "LOWEST",
    "WINDOW",
    "causal",
    "chunks",
    "columns",
    "filled_below",
    "inverted_padding",
    "llama",
    "old_llama",
    "padded",
    "padded_chunks",
    "prefix",
    "rows",
    "tril_slice",
    "with_window",
]

LOWEST = torch.finfo(torch.float32).min
WINDOW = 3


def rows(tokens: Tensor, keys: Tensor) -> Tensor:
    """Positions of the queries, ``[T, 1]``."""
    new, total = tokens.shape[1], keys.shape[1]
    return (torch.arange(new) + (total - new))[:, None]


def columns(keys: Tensor) -> Tensor:
    """Positions of the keys, ``[1, L]``."""
    return torch.arange(keys.shape[1])[None, :]


def causal(x: Tensor, k: Tensor, _: Tensor) -> Tensor:
    return columns(k) <= rows(x, k)


def llama(x: Tensor, k: Tensor, p: Tensor) -> Tensor:
    """As ``transformers.masking_utils.sdpa_mask`` builds it."""
    b = torch.arange(p.shape[0])[:, None, None, None]
    q, kv = rows(x, k)[:, 0][None, None, :, None], columns(k)[0][None, None, None, :]
    visible = q.new_ones((), dtype=torch.bool)
    visible = visible & (kv <= q) & p.to(torch.bool)[b, kv]
    return visible.expand(p.shape[0], -1, x.shape[1], k.shape[1])


def old_llama(x: Tensor, k: Tensor, p: Tensor) -> Tensor:
    """As transformers 4 built it: additive, filled in place, one mask over the other."""
    new, total = x.shape[1], k.shape[1]
    mask = torch.full((new, total), LOWEST)
    mask = torch.triu(mask, diagonal=total - new + 1)
    mask = mask[None, None].expand(p.shape[0], 1, -1, -1)
    padded = p[:, None, None, :] == 0
    return mask.masked_fill(padded, LOWEST)


def inverted_padding(x: Tensor, k: Tensor, p: Tensor) -> Tensor:
    """As old encoders and decoders scaled a padding mask, and added it to the causal one."""
    padding = (1.0 - p.bool()[:, None, None, :].to(torch.float32)) * LOWEST
    return torch.where(causal(x, k, p), 0.0, LOWEST) + padding


def tril_slice(x: Tensor, k: Tensor, _: Tensor) -> Tensor:
    """As GPT-2 cut its buffer."""
    new, total = x.shape[1], k.shape[1]
    return torch.ones(512, 512, dtype=torch.bool).tril()[total - new : total, :total]


def filled_below(x: Tensor, k: Tensor, _: Tensor) -> Tensor:
    """As OPT and others of its time built it."""
    new, total = x.shape[1], k.shape[1]
    mask = torch.full((new, new), LOWEST)
    place = torch.arange(new)
    mask.masked_fill_(place < (place + 1).view(new, 1), 0)
    return mask if new == total else torch.cat([torch.zeros(new, total - new), mask], dim=-1)


def with_window(x: Tensor, k: Tensor, p: Tensor) -> Tensor:
    return causal(x, k, p) & (columns(k) > rows(x, k) - WINDOW)


def chunks(x: Tensor, k: Tensor, p: Tensor) -> Tensor:
    return causal(x, k, p) & (columns(k) // WINDOW == rows(x, k) // WINDOW)


def padded_chunks(x: Tensor, k: Tensor, p: Tensor) -> Tensor:
    """As Llama 4 counts its chunks: from the first token behind the padding of a row."""
    left = (p.cumsum(-1) == 0).sum(-1)[:, None, None, None]
    return causal(x, k, p) & ((columns(k) - left) // WINDOW == (rows(x, k) - left) // WINDOW)


def prefix(x: Tensor, k: Tensor, p: Tensor) -> Tensor:
    return causal(x, k, p) | (columns(k) < k.shape[1] - 1)


def padded(x: Tensor, k: Tensor, p: Tensor, predicate: Tensor) -> Tensor:
    return causal(x, k, p) & predicate[:, None, None, :]
