"""What is said of a tensor that a model keeps is true at every position, and nothing is said of near misses."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor

from adakv_compile.symbolic.evaluate import evaluate
from adakv_compile.symbolic.expr import Bool, Expr, Float, Iota, kind_of
from adakv_compile.symbolic.known import describe
from adakv_compile.symbolic.read import kind_of_dtype

SIZE = 7
LOWEST = torch.finfo(torch.float32).min


def ones(dtype: torch.dtype = torch.bool) -> Tensor:
    return torch.ones(SIZE, SIZE, dtype=dtype)


def band(width: int) -> Tensor:
    return ones().tril().triu(1 - width)


TRIANGLES: dict[str, Tensor] = {
    "booleans": ones().tril(),
    "booleans in four dimensions": ones().tril()[None, None],
    "zeros and ones": ones(torch.float32).tril(),
    "bytes": ones(torch.uint8).tril(),
    "integers": ones(torch.int64).tril(),
    "hidden by zero, shown by one half": ones(torch.bfloat16).tril() / 2,
    "additive": torch.full((SIZE, SIZE), -torch.inf).triu(1),
    "additive, the lowest number": torch.full((SIZE, SIZE), LOWEST).triu(1),
    "additive, too little to hide anything": torch.full((SIZE, SIZE), -3.0).triu(1),
    "zeros below ones": ones(torch.float32).triu(1),
    "a band": band(3),
    "a band of floats": band(2).float(),
    "an additive band": torch.where(band(3), 0.0, -torch.inf),
    "the diagonal": torch.eye(SIZE),
    "all but the first column's end": band(SIZE - 1),
    "two by two": torch.ones(2, 2).tril(),
    "a part of a larger one": ones(torch.float32).tril()[:4, :4],
    "not contiguous": ones(torch.float32).triu().T,
    "a parameter": torch.nn.Parameter(ones(torch.float32).tril(), requires_grad=True),
}
OTHERS: dict[str, Tensor] = {
    "a count": torch.arange(9),
    "a count of bytes": torch.arange(9).to(torch.uint8),
    "a count in two dimensions": torch.arange(9)[None],
    "a number": torch.tensor(0.125),
    "a number in a list": torch.tensor([0.125]),
    "a number in half precision": torch.tensor(0.1, dtype=torch.float16),
    "an infinite number": torch.tensor(-torch.inf),
    "an integer": torch.tensor([[3]]),
    "a truth": torch.tensor(True),
}


@pytest.mark.parametrize("name", [*TRIANGLES, *OTHERS])
def test_what_is_said_is_true_everywhere(name: str) -> None:
    tensor = {**TRIANGLES, **OTHERS}[name]
    expr = describe(tensor)
    assert expr is not None
    assert _agrees(expr, tensor)


def _agrees(expr: Expr, tensor: Tensor) -> bool:
    """Whether an expression has a tensor's values and is of its kind."""
    shape = (*(1 for _ in range(2 - tensor.dim())), *tensor.shape)
    found = evaluate(expr, shape).expand(shape).reshape(tensor.shape)
    return kind_of(expr) == kind_of_dtype(tensor.dtype) and torch.equal(found.double(), tensor.detach().double())


@pytest.mark.parametrize("name", TRIANGLES)
def test_one_element_that_differs_is_noticed_anywhere(name: str) -> None:
    original = TRIANGLES[name].detach().contiguous().clone()
    for position in range(original.numel()):
        for other in _others(original):
            changed = original.clone()
            changed.view(-1)[position] = other
            if torch.equal(changed, original):
                continue
            expr = describe(changed)
            # The lower left corner is another band's; of two by two elements nearly everything is a pattern.
            assert expr is None or _agrees(expr, changed)
            if changed.shape[-1] > 2 and position != (changed.shape[-1] - 1) * changed.shape[-1]:
                assert expr is None


def _others(tensor: Tensor) -> list[float]:
    """Return numbers that could stand in a place: the other one of the two, and a third."""
    values = [element.item() for element in tensor.unique()]
    return values if tensor.dtype == torch.bool else [*values, 5]


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int64])
def test_of_all_small_matrices_only_bands_are_described(size: int, dtype: torch.dtype) -> None:
    found: list[Tensor] = []
    for elements in product([0, 1], repeat=size * size):
        matrix = torch.tensor(elements).view(size, size).to(dtype)
        expr = describe(matrix)
        if expr is not None:
            assert _agrees(expr, matrix)
            found.append(matrix)
    # A band of every width; a band of zeros as well, except for booleans, where it would show the future.
    assert len(found) == size * (1 if dtype == torch.bool else 2)


SILENT: dict[str, Callable[[], Tensor]] = {
    "transposed": lambda: ones().triu(),
    "additive, transposed": lambda: torch.full((SIZE, SIZE), -torch.inf).tril(-1),
    "one diagonal too many": lambda: ones().tril(1),
    "one diagonal too few": lambda: ones().tril(-1),
    "inverted": lambda: ~ones().tril(),
    "all alike": ones,
    "all different": lambda: torch.arange(SIZE * SIZE).view(SIZE, SIZE),
    "three numbers": lambda: ones(torch.float32).tril() + torch.eye(SIZE),
    "a band above the diagonal": lambda: ones().triu(1).tril(2),
    "a band around the diagonal": lambda: ones().triu(-1).tril(1),
    "every other diagonal": lambda: ones().tril() & ((torch.arange(SIZE)[:, None] - torch.arange(SIZE)) % 2 == 0),
    "not square": lambda: ones().tril()[:, :4],
    "not square, upwards": lambda: ones().tril()[:4],
    "a triangle for every head": lambda: ones().tril().expand(2, 1, SIZE, SIZE),
    "not a number where it shows": lambda: torch.where(ones().tril(), torch.nan, 0.0),
    "not a number where it hides": lambda: torch.where(ones().tril(), 0.0, torch.nan),
    "nothing but not-a-number": lambda: torch.full((SIZE, SIZE), torch.nan),
    "complex": lambda: ones(torch.complex64).tril(),
    "without values": lambda: torch.empty(SIZE, SIZE, device="meta"),
    "empty": lambda: torch.empty(0, 0),
    "one that is not a number": lambda: torch.tensor(torch.nan),
    "counted from one": lambda: torch.arange(1, 9),
    "counted down": lambda: torch.arange(8).flip(0),
    "counted by two": lambda: torch.arange(0, 16, 2),
    "counted in floats": lambda: torch.arange(8.0),
    "counted in a column": lambda: torch.arange(8)[:, None],
    "counted for every row": lambda: torch.arange(8).expand(2, 8),
    "slopes": lambda: 2.0 ** -torch.arange(1, 9),
}


@pytest.mark.parametrize("name", SILENT)
def test_nothing_is_said_of(name: str) -> None:
    assert describe(SILENT[name]()) is None


@pytest.mark.parametrize(("count", "dtype"), [(300, torch.uint8), (200, torch.int8), (129, torch.int8)])
def test_a_count_that_wraps_around_is_no_count(count: int, dtype: torch.dtype) -> None:
    assert describe(torch.arange(count).to(dtype)) is None


def test_the_forms_that_proofs_start_from() -> None:
    assert describe(torch.arange(5)) == Iota(0)
    assert describe(torch.tensor([2.0])) == Float(2.0)
    assert describe(torch.tensor(False)) == Bool(False)
    assert describe(ones().tril()) == describe(ones().tril()[:4, :4])
