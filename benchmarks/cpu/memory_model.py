"""``python -m benchmarks.cpu.memory_model``: bytes of a cache at every step against their formula, and leaks.

A tiny decoder, compiled without Inductor: what is held depends on sizes alone. Bytes are counted, not sampled; only the
memory of the process is read from the system.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import adakv_compile
from adakv_compile.kernels.decode_attention import CURSOR_SIZE
from adakv_compile.runtime.store import LayerStore
from adakv_compile.runtime.tail import FIRST_TAIL_CAPACITY
from benchmarks.machine import describe

__all__ = ["bytes_of_formula", "capacity_of", "conversations", "generation", "main", "tiny"]

BUDGET: Final = 64
_INT: Final = 4


def tiny(layers: int = 2) -> LlamaForCausalLM:
    """Return a compiled decoder: 4 query heads on 2 KV heads of 16, budget 64."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1 << 14,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    return adakv_compile.compile(model, budget=BUDGET, window=8, inner="eager", strict=True)


def capacity_of(tail: int) -> int:
    """Return the tail entries a head has room for after ``tail`` single appends: none, then 64, doubling."""
    if tail == 0:
        return 0
    capacity = FIRST_TAIL_CAPACITY
    while capacity < tail:
        capacity *= 2
    return capacity


def bytes_of_formula(store: LayerStore, budget: int, tail: int) -> int:
    """Return what a layer holds: ``H * budget`` entries, the tail by doubling, offsets, positions and cursor.

    Args:
        store: Gives the batch, the heads, the head dimensions and the size of a number.
        budget: Entries per head.
        tail: Tokens appended one by one since the prompt.
    """
    rows, heads = store.batch, store.num_kv_heads
    entry = (store.key_dim + store.value_dim) * store.keys.itemsize
    bookkeeping = rows * (heads + 1) + rows * heads * budget + CURSOR_SIZE
    return rows * heads * (budget + capacity_of(tail)) * entry + _INT * bookkeeping


def generation(tokens: int, prompt: int = 256) -> Iterator[dict[str, Any]]:
    """Yield one row after a prompt and after each of ``tokens`` steps, summed over the layers.

    A row holds the step, the bytes held and those of the formula, the reallocations of tails so far (of all layers) and
    the bytes copied by them.
    """
    model = tiny()
    with torch.inference_mode():
        cache = model(torch.ones(1, prompt, dtype=torch.long), use_cache=True).past_key_values
        addresses = list(_tails(cache).values())
        moved, copied, token = 0, 0, torch.ones(1, 1, dtype=torch.long)
        for step in range(tokens + 1):
            if step:
                model(token, past_key_values=cache)
                now = _tails(cache)
                grown = [store for store, was in zip(_stores(cache), addresses, strict=True) if was != now[store]]
                moved += len(grown)
                copied += sum(store.tail_keys.nbytes * 2 * (step - 1) // store.capacity for store in grown)
                addresses = list(now.values())
            stores = _stores(cache)
            yield {
                "step": step,
                "held": sum(store.nbytes_held for store in stores),
                "formula": sum(bytes_of_formula(store, BUDGET, step) for store in stores),
                "reallocations": moved,
                "copied": copied,
            }


def conversations(count: int, prompt: int = 256, steps: int = 3) -> Iterator[dict[str, Any]]:
    """Hold ``count`` conversations with one compiled model, each dropped before the next, and yield a row for each.

    A row holds the stores still alive after the conversation was dropped, without a garbage collection and after one,
    and the memory of the process in bytes. The first conversation, during which the graphs are made, needs the
    collection: tracing leaves cycles behind.
    """
    model = tiny()
    token = torch.ones(1, 1, dtype=torch.long)
    for index in range(count):
        gc.disable()
        try:
            # Prompts of ever other lengths: nothing may be kept for one of them.
            ids = torch.ones(1, prompt + index, dtype=torch.long)
            with torch.inference_mode():
                cache = model(ids, use_cache=True).past_key_values
                for _ in range(steps):
                    model(token, past_key_values=cache)
            watched = [weakref.ref(store) for store in _stores(cache)]
            del cache
            alive = sum(reference() is not None for reference in watched)
        finally:
            gc.enable()
        if alive:
            gc.collect()
        kept = sum(reference() is not None for reference in watched)
        yield {"conversation": index + 1, "alive": alive, "kept": kept, "resident": _resident()}


def _stores(cache: Any) -> list[LayerStore]:
    return [layer.keys.store for layer in cache.layers]


def _tails(cache: Any) -> dict[LayerStore, int]:
    return {store: store.tail_keys.data_ptr() for store in _stores(cache)}


def _resident() -> int:
    """Return the process's resident memory, or 0 where the system does not tell."""
    status = Path("/proc/self/statm")
    if not status.exists():
        return 0
    import resource

    return int(status.read_text().split()[1]) * resource.getpagesize()


def main() -> None:
    """Print a summary, or all rows as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--conversations", type=int, default=200)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    steps, held = list(generation(given.tokens)), list(conversations(given.conversations))
    if given.json:
        _say(json.dumps({"machine": describe(), "generation": steps, "conversations": held}, indent=2))
        return
    wrong = sum(row["held"] != row["formula"] for row in steps)
    last = steps[-1]
    _say(f"{len(steps)} states, {wrong} of them other than the formula; {last['held']} bytes held at the end")
    _say(f"{last['reallocations']} reallocations of tails, {last['copied']} bytes copied")
    _say(f"stores alive after their conversation: {sum(row['alive'] for row in held[1:])}, and after the first, which")
    _say(f"is compiled: {held[0]['alive']}; after a garbage collection {sum(row['kept'] for row in held)}")
    for index in sorted({min(20, len(held)), len(held)}):
        _say(f"resident after {index} conversations: {held[index - 1]['resident'] / 2**20:.1f} MiB")


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
