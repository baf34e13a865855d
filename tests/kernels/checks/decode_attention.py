"""Checks of the attention kernel against dense attention in float64, and of what it does to the store."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import torch

from adakv_compile.kernels._softmax import Softmax
from adakv_compile.kernels.decode_attention import CURSOR_SIZE
from adakv_compile.kernels.decode_attention.gpu import attend, decode_attention
from tests.kernels.cases import Case, dense, ragged_case
from tests.kernels.checks.draw import Draw
from tests.kernels.tolerances import TOLERANCES, assert_near

__all__ = ["CHECKS"]

_HALF = (torch.float16, torch.bfloat16)
_DTYPES = (torch.float32, *_HALF)
# Tiles have 16 entries in the interpreter and up to 64 on a GPU: a head with half of everything, empty heads, a head of
# one entry, heads that end where a tile does.
_SKEWED = [[1, 117, 2, 64], [64, 16, 40, 0]]
_EMPTY_ROW = [[50, 0, 49], [0, 0, 0], [0, 0, 90]]
# So many heads that an interpreted launch has one program for each and few more; none of them is cut.
_SHORT = [[3, 1, 0, 7, 2, 5, 4, 1]] * 3


def _with_counters(case: Case, size: int = CURSOR_SIZE) -> Case:
    cursor = torch.zeros(size, dtype=torch.int32)
    cursor[:2] = case.cursor[:2]
    return dataclasses.replace(case, cursor=cursor)


def _same(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Check that bits are equal, those of NaN included."""
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.element_size()]
    same = torch.equal(actual.cpu().contiguous().view(kind), expected.cpu().contiguous().view(kind))
    assert same, f"{what}: bits differ"


def _attend(arguments: tuple[Any, ...], tail: int, prefix: int, want_lse: bool = True) -> Any:
    """Call ``attend`` with lengths from the host on the arguments of the op."""
    mask, padding, sinks, scale, window, softcap = arguments[10:]
    return attend(
        *arguments[:9],
        cursor=None,
        tail_length=tail,
        prefix_length=prefix,
        mask=mask,
        padding=padding,
        softmax=Softmax(scale, softcap, sinks),
        sliding_window=window,
        want_lse=want_lse,
    )


def _check(draw: Draw, case: Case, counters: bool = True) -> None:
    """Check result, store and determinism of a case on the device, with and without a cursor."""
    dtype = case.query.dtype
    oracle = dense(case)
    tail, prefix = case.cursor.tolist()
    count = case.query.shape[2]
    placed = (_with_counters(case) if counters else case).to(draw.device)
    arguments = placed.arguments()
    before = [None if value is None else value.clone() for value in arguments[:7]]
    output = decode_attention(*arguments)
    assert output.is_contiguous()
    assert output.dtype == dtype
    assert_near(output.cpu(), oracle.output, dtype)
    tail_keys, tail_values, cursor = arguments[7:10]
    expected = placed.cursor.clone()
    expected[0] += count
    _same(cursor, expected, "cursor")
    for name, after, old, new in (
        ("tail_keys", tail_keys, placed.tail_keys, placed.key_new),
        ("tail_values", tail_values, placed.tail_values, placed.value_new),
    ):
        wanted = old.clone()
        wanted[:, :, tail : tail + count] = new
        _same(after, wanted, name)
    for index, (old, now) in enumerate(zip(before, arguments[:7], strict=True)):
        assert old is not None
        _same(now, old, f"argument {index}")

    arguments = placed.arguments()
    again, sums = _attend(arguments, tail, prefix)
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(again.cpu().float(), output.cpu().float(), **tolerance)
    _same(arguments[7], placed.tail_keys, "tail_keys of attend")
    _same(arguments[9], placed.cursor, "cursor of attend")
    _check_sums(case, sums.cpu())


def _check_sums(case: Case, sums: torch.Tensor) -> None:
    """Check log-sum-exp: dense attention gives only the weights, so compare how logit and weight differ."""
    reference = dense(case)
    num_heads = case.key_new.shape[1]
    if case.mask is not None and case.mask.dtype != torch.bool:
        return
    grouped = case.query.double().unflatten(1, (num_heads, -1))
    logits = (grouped @ reference.keys.unsqueeze(2).mT).flatten(1, 2) * case.scale
    if case.softcap is not None:
        logits = case.softcap * torch.tanh(logits / case.softcap)
    top = reference.weights.argmax(-1, keepdim=True)
    wanted = (logits.gather(-1, top) - reference.weights.gather(-1, top).log()).squeeze(-1)
    nothing = ~reference.weights.any(-1)
    if case.sinks is not None:
        nothing &= case.sinks.isneginf()[:, None]
        unseen = ~reference.weights.any(-1)
        wanted = torch.where(unseen, case.sinks.double()[:, None], wanted)
    assert sums.isneginf().equal(nothing), "sums are -inf exactly where nothing is visible"
    wanted = wanted.masked_fill(nothing, 0.0)
    torch.testing.assert_close(sums.masked_fill(nothing, 0.0).double(), wanted, rtol=1e-4, atol=1e-3)


def ragged_heads(draw: Draw) -> None:
    """Skewed and empty heads, of rows that differ, in every dtype."""
    for dtype in _DTYPES:
        for lengths in (_SKEWED, _EMPTY_ROW):
            case = ragged_case(lengths, slots=190, dtype=dtype, key_dim=32, value_dim=32, seed=draw.seed_for())
            _check(draw, case)


def one_item_per_head(draw: Draw) -> None:
    """More heads than programs to spare, and a single short head."""
    for lengths in (_SHORT, [[0, 0]], [[5]]):
        _check(draw, ragged_case(lengths, slots=30, key_dim=16, value_dim=16, tail=0, seed=draw.seed_for()))


def many_items_per_head(draw: Draw) -> None:
    """One head of everything, long enough to be cut on any device, and a head of half of everything among many."""
    for lengths in ([[700]], [[300, 40, 0, 60, 90, 10, 80, 20]]):
        case = ragged_case(
            lengths, prefix_length=800, slots=701, tail=40, capacity=50, key_dim=16, value_dim=16, seed=draw.seed_for()
        )
        _check(draw, case)


def token_counts(draw: Draw) -> None:
    """Several new tokens, with and without counters in the cursor."""
    for count in (2, 5, 16, 33):
        for dtype in (torch.float32, torch.bfloat16):
            case = ragged_case(
                [[20, 90, 0]], count=count, capacity=70, tail=21, dtype=dtype, key_dim=32, value_dim=16,
                seed=draw.seed_for(),
            )  # fmt: skip
            _check(draw, case, counters=count != 5)


def many_tokens(draw: Draw) -> None:
    """So many rows that they are cut into blocks, each with programs of its own."""
    case = ragged_case(
        [[10, 70], [0, 33]], group=7, count=33, capacity=64, tail=9, slots=80, key_dim=16, value_dim=16,
        dtype=torch.float16, seed=draw.seed_for(),
    )  # fmt: skip
    _check(draw, case)
    _check(draw, dataclasses.replace(case, sliding_window=20))


def groups(draw: Draw) -> None:
    """Query groups of one to many heads."""
    for group in (1, 2, 4, 7, 16, 40):
        case = ragged_case([[5, 70]], group=group, key_dim=32, value_dim=32, dtype=torch.bfloat16, seed=draw.seed_for())
        _check(draw, case, counters=group != 7)


def head_dims(draw: Draw) -> None:
    """Head dimensions that are powers of two and that are not, of keys and values alike or different."""
    for index, (key_dim, value_dim) in enumerate(
        ((64, 64), (80, 80), (96, 96), (112, 112), (128, 128), (256, 256), (192, 128), (24, 40), (8, 6))
    ):
        case = ragged_case(
            [[3, 40]], group=4, key_dim=key_dim, value_dim=value_dim, dtype=_DTYPES[index % 3], seed=draw.seed_for()
        )
        _check(draw, dataclasses.replace(case, scale=key_dim**-0.5), counters=False)


def sliding_windows(draw: Draw) -> None:
    """Windows from the token itself to more than everything; what they exclude is not read."""
    for count in (1, 3):
        case = ragged_case(
            [[1, 117, 2]], count=count, tail=40, capacity=48, key_dim=16, value_dim=16, seed=draw.seed_for()
        )
        for window in (1, 2, 30, 90, 1000):
            _check(draw, dataclasses.replace(case, sliding_window=window))


def paddings(draw: Draw) -> None:
    """Padding masks that are shared or not, shorter and longer than the sequence, also with a window."""
    for count in (1, 3):
        case = ragged_case([[1, 117], [64, 16]], count=count, key_dim=16, value_dim=16, seed=draw.seed_for())
        for rows, columns, window in ((1, 0, None), (2, -60, None), (2, 9, 90)):
            padding = draw.uniform(rows, case.length + columns).cpu() < 0.7
            _check(draw, dataclasses.replace(case, padding=padding, sliding_window=window))
    transposed = (draw.uniform(case.length, 2).cpu() < 0.7).t()
    _check(draw, dataclasses.replace(case, padding=transposed))


def masks(draw: Draw) -> None:
    """Masks of every broadcast shape and kind; they replace causality and window."""
    for count in (1, 3):
        case = ragged_case(
            [[1, 117], [64, 16]], count=count, key_dim=16, value_dim=16, dtype=torch.float32, seed=draw.seed_for()
        )
        for index, (shape, columns) in enumerate((("111", 0), ("bht", -60), ("b1t", 9), ("1h1", 0))):
            sizes = [size if letter in shape else 1 for letter, size in zip("bht", (2, 4, count), strict=True)]
            allowed = draw.uniform(*sizes, case.length + columns).cpu() < 0.6
            mask = allowed
            if index % 2:
                hidden = -torch.inf if count == 1 else torch.finfo(torch.float32).min
                mask = draw.normal(*allowed.shape).cpu().masked_fill(~allowed, hidden)
            _check(draw, dataclasses.replace(case, mask=mask, sliding_window=4))
        padding = draw.uniform(2, case.length).cpu() < 0.8
        mask = draw.normal(2, 1, count, case.length, dtype=torch.float16).cpu()
        _check(draw, dataclasses.replace(case, mask=mask, padding=padding))
        everything = torch.ones(1, 1, case.length, count, dtype=torch.bool).mT
        _check(draw, dataclasses.replace(case, mask=everything, sliding_window=4))


def nothing_visible(draw: Draw) -> None:
    """A query that sees nothing gets zeros; if all is hidden by the lowest float, nothing is."""
    case = ragged_case([[40, 40], [30, 50]], count=3, key_dim=16, value_dim=16, seed=draw.seed_for())
    mask = torch.ones(2, 1, 3, case.length, dtype=torch.bool)
    mask[1, :, 1] = False
    padding = torch.ones(2, case.length, dtype=torch.bool)
    padding[0] = False
    case = _with_counters(dataclasses.replace(case, mask=mask, padding=padding))
    output = decode_attention(*case.to(draw.device).arguments()).cpu()
    assert not output[0].any(), "row 0 is padding"
    assert not output[1, :, 1].any(), "query 1 sees nothing"
    assert output[1, :, 0].all(), "query 0 sees everything"
    lowest = torch.full((1, 1, 1, case.length), torch.finfo(torch.float32).min)
    case = dataclasses.replace(case, mask=lowest, padding=None)
    output = decode_attention(*case.to(draw.device).arguments()).cpu()
    oracle = dense(dataclasses.replace(case, cursor=case.cursor[:2]))
    assert_near(output, oracle.output, torch.float32)


def soft_caps_and_sinks(draw: Draw) -> None:
    """Caps below and above the logits, sinks of every size, alone and together, on heads that are cut or not."""
    shapes = ((1, [[1, 200, 2]]), (3, [[1, 64], [70, 0]]))
    for index, (softcap, shift) in enumerate(((0.1, None), (30.0, 0.0), (1e5, 80.0), (None, -80.0), (None, 0.0))):
        count, lengths = shapes[index % 2]
        case = ragged_case(
            lengths, count=count, prefix_length=250, group=3, key_dim=16, value_dim=16, dtype=_DTYPES[index % 3],
            seed=draw.seed_for(),
        )  # fmt: skip
        heads = case.query.shape[1]
        sinks = None if shift is None else (draw.normal(heads).cpu() * 2 + shift).to(_DTYPES[count % 3])
        case = dataclasses.replace(case, softcap=softcap, sinks=sinks, scale=1.0)
        _check(draw, case)
        if sinks is not None:
            sinks[::2] = -torch.inf
        padding = draw.uniform(len(lengths), case.length).cpu() < 0.7
        mask = draw.normal(1, heads, 1, case.length).cpu() * 3
        _check(draw, dataclasses.replace(case, padding=padding, sliding_window=150))
        _check(draw, dataclasses.replace(case, padding=padding, mask=mask))
    case = ragged_case([[40, 3]], key_dim=16, value_dim=16, seed=draw.seed_for())
    hidden = torch.zeros(1, case.length, dtype=torch.bool)
    unseen = dataclasses.replace(case, padding=hidden, sinks=torch.ones(4)).to(draw.device)
    assert not decode_attention(*unseen.arguments()).any(), "a sink is not a value"


def rows_are_independent(draw: Draw) -> None:
    """NaN in one row of the batch stays there."""
    case = _with_counters(ragged_case([[30, 60], [50, 9]], slots=99, key_dim=16, value_dim=16, seed=draw.seed_for()))
    expected = decode_attention(*case.to(draw.device).arguments())[0]
    for name in ("query", "key_new", "value_new", "keys", "values", "tail_keys", "tail_values"):
        getattr(case, name)[1] = float("nan")
    with warnings.catch_warnings():
        # NumPy's, of maxima of NaN in the interpreter.
        warnings.simplefilter("ignore", RuntimeWarning)
        output = decode_attention(*case.to(draw.device).arguments())
    _same(output[0], expected, "row 0")
    assert output[1].isnan().all(), "row 1 is NaN"


def strided_arguments(draw: Draw) -> None:
    """Projections as models make them: transposed views, and slices of a common tensor."""
    for count in (1, 3, 20):
        case = ragged_case([[9, 40], [30, 1]], count=count, key_dim=16, value_dim=16, seed=draw.seed_for())
        query, key, value = (
            tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in (case.query, case.key_new, case.value_new)
        )
        _check(draw, dataclasses.replace(case, query=query, key_new=key, value_new=value))
        fused = torch.cat((case.key_new, case.value_new), -1)
        key, value = fused[..., :16], fused[..., 16:]
        query = case.query.mT.contiguous().mT
        _check(draw, dataclasses.replace(case, query=query, key_new=key, value_new=value))


def many_steps(draw: Draw) -> None:
    """Steps on one store, as a graph replays them: counters are left zero, the tail grows, bits repeat."""
    for size in (2, CURSOR_SIZE):
        case = ragged_case(
            [[5, 100], [40, 3]], group=4, dtype=torch.bfloat16, key_dim=32, value_dim=32, tail=14, seed=draw.seed_for()
        )
        found = []
        for _ in range(2):
            store = _with_counters(case, size).to(draw.device)
            arguments = store.arguments()
            outputs = [decode_attention(*arguments) for _ in range(4)]
            expected = store.cursor.clone()
            expected[0] += 4
            _same(arguments[9], expected, "cursor after four steps")
            new = store.key_new.expand(-1, -1, 4, -1)
            _same(arguments[7][:, :, 14:18], new, "appended keys")
            found.append((torch.stack(outputs), arguments[8]))
        for first, second in zip(*found, strict=True):
            _same(first, second, "two runs")
        grown = dataclasses.replace(
            case,
            tail_keys=_appended(case.tail_keys, case.key_new, 14, 3),
            tail_values=_appended(case.tail_values, case.value_new, 14, 3),
            cursor=torch.tensor([17, 200], dtype=torch.int32),
        )
        assert_near(found[0][0][3].cpu(), dense(grown).output, torch.bfloat16)


def _appended(tail: torch.Tensor, new: torch.Tensor, length: int, times: int) -> torch.Tensor:
    tail = tail.clone()
    for step in range(times):
        tail[:, :, length + step : length + step + 1] = new
    return tail


def bad_arguments(draw: Draw) -> None:
    """What the kernel would misread is refused by name."""
    case = ragged_case([[9, 40]], key_dim=16, value_dim=16, seed=draw.seed_for()).to(draw.device)
    for name, value, message in (
        ("keys", case.keys.transpose(1, 2).contiguous().transpose(1, 2), "keys has strides"),
        ("cursor", case.cursor.long(), "cursor is torch.int64"),
        ("values", case.values.half(), "values is torch.float16; expected torch.float32"),
    ):
        refused = _refusal(dataclasses.replace(case, **{name: value}))
        assert message in refused, f"{name}: {refused}"


def _refusal(case: Case) -> str:
    try:
        decode_attention(*case.arguments())
    except ValueError as error:
        return str(error)
    return "was not refused"


CHECKS: dict[str, Callable[[Draw], None]] = {
    check.__name__: check
    for check in (
        ragged_heads,
        one_item_per_head,
        many_items_per_head,
        token_counts,
        many_tokens,
        groups,
        head_dims,
        sliding_windows,
        paddings,
        masks,
        nothing_visible,
        soft_caps_and_sinks,
        rows_are_independent,
        strided_arguments,
        many_steps,
        bad_arguments,
    )
}
