"""What can be said about the values of a tensor that a model keeps: triangles, bands, counted positions, numbers."""

from __future__ import annotations

import torch

from adakv_compile.symbolic.expr import And, Bool, Compare, Expr, Float, Iota, Where, add, integer

__all__ = ["describe"]


def describe(tensor: torch.Tensor) -> Expr | None:
    """Return the element of a tensor as a function of its position, or ``None`` if no pattern is seen.

    Seen are square matrices that hold one number on and below the diagonal (or a band below it) and another one
    elsewhere, ``0, 1, 2, ...``, and single numbers. Reads the tensor, which waits for its device.
    """
    if tensor.dtype.is_complex or tensor.is_meta or tensor.numel() == 0:
        return None
    if tensor.numel() == 1:
        return _number(tensor.flatten()[0])
    shape = tensor.shape
    if tensor.dim() >= 2 and shape[-1] == shape[-2] and tensor.numel() == shape[-1] ** 2:
        return _triangle(tensor.detach().reshape(shape[-2:]))
    counts = tensor.numel() == shape[-1] and not (tensor.dtype.is_floating_point or tensor.dtype == torch.bool)
    if counts and torch.equal(tensor.flatten().to(torch.int64), torch.arange(shape[-1], device=tensor.device)):
        return Iota(0)
    return None


def _triangle(matrix: torch.Tensor) -> Expr | None:
    inside, outside = matrix[0, 0], matrix[0, 1]
    same = matrix == inside
    yes, no = _number(inside), _number(outside)
    if yes is None or no is None or bool(inside == outside) or not bool((same | (matrix == outside)).all()):
        return None
    # Rows see as many keys as the first column is tall.
    width = int(same[:, 0].sum())
    index = torch.arange(matrix.shape[0], device=matrix.device)
    distance = index[:, None] - index
    if not torch.equal(same, (distance >= 0) & (distance < width)):
        return None
    causal: Expr = Compare("le", Iota(0), Iota(1))
    if width < matrix.shape[0]:
        causal = And((causal, Compare("gt", Iota(0), add(Iota(1), integer(-width)))))
    if matrix.dtype == torch.bool:
        return causal if yes == Bool(True) else None
    return Where(causal, yes, no)


def _number(element: torch.Tensor) -> Expr | None:
    value = element.item()
    if isinstance(value, bool):
        return Bool(value)
    if isinstance(value, int):
        return integer(value)
    return Float(value) if isinstance(value, float) and value == value else None
