"""What a cache holds is its formula at every step, its tail moves seldom, and nothing outlives a conversation."""

from __future__ import annotations

from adakv_compile.runtime.tail import FIRST_TAIL_CAPACITY
from benchmarks.cpu.memory_model import capacity_of, conversations, generation

LAYERS = 2
ENTRY = 2 * 2 * 16 * 4  # keys and values of 2 heads of 16 float32 numbers


def test_every_step_holds_the_bytes_of_the_formula() -> None:
    rows = list(generation(2 * FIRST_TAIL_CAPACITY + 2))
    assert [row["held"] for row in rows] == [row["formula"] for row in rows]
    moves = [row["reallocations"] for row in rows]
    grown = [step for step in range(1, len(rows)) if moves[step] != moves[step - 1]]
    assert grown == [1, FIRST_TAIL_CAPACITY + 1, 2 * FIRST_TAIL_CAPACITY + 1]
    assert moves[-1] == LAYERS * len(grown)
    assert rows[-1]["copied"] == LAYERS * ENTRY * sum(step - 1 for step in grown)


def test_a_tail_is_less_than_twice_its_tokens_once_it_is_long() -> None:
    assert capacity_of(0) == 0
    assert [capacity_of(tail) for tail in (1, 64, 65, 1000)] == [64, 64, 128, 1024]
    assert all(tail <= capacity_of(tail) < 2 * tail for tail in range(64, 5000))


def test_nothing_outlives_its_conversation() -> None:
    rows = list(conversations(4))
    assert [row["kept"] for row in rows] == [0, 0, 0, 0]
    # Without a garbage collection, but for the conversation during which the graphs are made.
    assert [row["alive"] for row in rows[1:]] == [0, 0, 0]
