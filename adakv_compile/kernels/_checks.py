"""Checks of an op's arguments: each message names the op, the argument, what it is and what it should be."""

from __future__ import annotations

import math

import torch

__all__ = ["check_device", "check_grouped", "check_like", "check_mask", "check_shape", "check_softmax"]


def check_shape(op: str, name: str, tensor: torch.Tensor, expected: tuple[int | None, ...]) -> None:
    """Check a shape; None stands for any size.

    Raises:
        ValueError: The rank or a size differs.
    """
    shape = tensor.shape
    if len(shape) != len(expected) or any(
        want is not None and want != size for want, size in zip(expected, shape, strict=True)
    ):
        wanted = ", ".join("*" if want is None else str(want) for want in expected)
        raise ValueError(f"{op}: {name} has shape {list(shape)}; expected [{wanted}]")


def check_like(op: str, reference: torch.Tensor, **tensors: torch.Tensor) -> None:
    """Check that tensors have the dtype and the device of ``reference``.

    Raises:
        ValueError: One of them differs.
    """
    for name, tensor in tensors.items():
        if tensor.dtype != reference.dtype:
            raise ValueError(f"{op}: {name} is {tensor.dtype}; expected {reference.dtype}")
        if tensor.device != reference.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}; expected {reference.device}")


def check_device(op: str, reference: torch.Tensor, **tensors: torch.Tensor | None) -> None:
    """Check that tensors, those that are given, are on the device of ``reference``.

    Raises:
        ValueError: One of them is elsewhere.
    """
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != reference.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}; expected {reference.device}")


def check_grouped(op: str, num_query_heads: int, num_kv_heads: int) -> None:
    """Check that every KV head serves the same number of query heads.

    Raises:
        ValueError: The query heads do not divide over the KV heads.
    """
    if num_query_heads % num_kv_heads:
        raise ValueError(f"{op}: query heads {num_query_heads} not a multiple of KV heads {num_kv_heads}")


def check_mask(
    op: str,
    query: torch.Tensor,
    mask: torch.Tensor | None,
    padding: torch.Tensor | None,
) -> None:
    """Check a mask ``[B | 1, 1 | Hq, T | 1, M]`` and a padding mask ``[B | 1, M]`` against the queries.

    Raises:
        ValueError: A size does not broadcast, the dtype can't be a mask's, or one of them is on another device.
    """
    check_device(op, query, mask=mask, padding=padding)
    if mask is not None:
        sizes = mask.shape
        if len(sizes) != 4 or any(size not in (1, want) for size, want in zip(sizes[:3], query.shape[:3], strict=True)):
            raise ValueError(
                f"{op}: mask has shape {list(sizes)}; expected [{query.shape[0]} or 1, "
                f"{query.shape[1]} or 1, {query.shape[2]} or 1, columns]"
            )
        if mask.dtype != torch.bool and not mask.dtype.is_floating_point:
            raise ValueError(f"{op}: mask is {mask.dtype}; expected bool or a float to be added")
    if padding is not None:
        if padding.dim() != 2 or padding.shape[0] not in (1, query.shape[0]):
            raise ValueError(f"{op}: padding has shape {list(padding.shape)}; expected [{query.shape[0]}, columns]")
        if padding.dtype != torch.bool:
            raise ValueError(f"{op}: padding is {padding.dtype}; expected torch.bool")


def check_softmax(op: str, query: torch.Tensor, sinks: torch.Tensor | None, softcap: float | None) -> None:
    """Check sinks ``[Hq]`` and a soft cap of logits.

    Raises:
        ValueError: There is not one floating sink for each query head, on their device, or the cap is not positive.
    """
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"{op}: softcap is {softcap}; expected a positive number")
    if sinks is not None:
        check_device(op, query, sinks=sinks)
        check_shape(op, "sinks", sinks, (query.shape[1],))
        if not sinks.dtype.is_floating_point:
            raise ValueError(f"{op}: sinks is {sinks.dtype}; expected a floating dtype")
