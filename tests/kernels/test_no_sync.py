"""Every op can be captured in a CUDA graph, by construction: nothing it does needs an element on the host."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.kernels.host_reads import HostReadError, no_host_reads
from tests.kernels.test_contracts import BY_NAME, IMPLEMENTED, SAMPLES, clone, tuples

ON_DEVICE = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's own test asks CUDA")


@ON_DEVICE
@pytest.mark.parametrize(("sample", "kernel"), [pair for pair in IMPLEMENTED if pair[1] != "portable"])
def test_no_op_reads_a_tensor_on_the_host(sample: str, kernel: str) -> None:
    name, arguments = SAMPLES[sample]
    spec = BY_NAME[name]
    # A mode is off inside an op, so it is the implementation that is called: that for any device, or Triton's.
    implement = spec.run_triton if kernel == "triton" else spec.portable
    expected = tuples(spec.overload(*clone(arguments)))
    given = clone(arguments)
    with no_host_reads():
        results = tuples(implement(*given))
    for result, truth in zip(results, expected, strict=True):
        torch.testing.assert_close(result, truth)


FORBIDDEN: dict[str, Callable[[torch.Tensor], object]] = {
    "item": lambda tensor: tensor[0].item(),
    "tolist": lambda tensor: tensor.tolist(),
    "bool": lambda tensor: bool(tensor[0] > 0),
    "branch": lambda tensor: 1 if tensor.any() else 2,
    "int": lambda tensor: int(tensor[0]),
    "index": lambda tensor: range(tensor[0].int()),
    "float": lambda tensor: float(tensor[0]),
    "numpy": lambda tensor: tensor.numpy(),
    "cpu": lambda tensor: tensor.cpu(),
    "contains": lambda tensor: 3.0 in tensor,
    "nonzero": lambda tensor: tensor.nonzero(),
    "where": lambda tensor: torch.where(tensor > 0),
    "masked_select": lambda tensor: tensor.masked_select(tensor > 0),
    "unique": lambda tensor: tensor.unique(),
    "mask as index": lambda tensor: tensor[tensor > 0],
    "mask as target": lambda tensor: tensor.index_put_((tensor > 0,), tensor[:1]),
    "repeats": lambda tensor: tensor.repeat_interleave(tensor.long()),
    "bincount": lambda tensor: torch.bincount(tensor.long()),
    "equal": lambda tensor: torch.equal(tensor, tensor),
    "allclose": lambda tensor: torch.allclose(tensor, tensor + 1),
    "from a list": lambda tensor: torch.tensor([1.0], device=tensor.device),
    "as_tensor": lambda tensor: torch.as_tensor([1.0], device=tensor.device),
    "new_tensor": lambda tensor: tensor.new_tensor([1.0]),
    "to another device": lambda tensor: tensor.to("meta"),
    "from another device": lambda tensor: tensor.copy_(torch.empty(4, device="meta")),
}
ALLOWED: dict[str, Callable[[torch.Tensor], object]] = {
    "fill": lambda tensor: tensor.new_full((3,), 2.0) + torch.arange(3, device=tensor.device),
    "gather": lambda tensor: tensor[tensor.long().clamp(0, 3)],
    "mask": lambda tensor: tensor.masked_fill(tensor > 0, 0.0).where(tensor < 3, 1),
    "cast": lambda tensor: tensor.to(torch.float16),
    "other device": lambda tensor: tensor.new_empty((3,), device="meta"),
}


@pytest.mark.parametrize("name", FORBIDDEN)
def test_the_guard_fails_on(name: str) -> None:
    tensor = torch.arange(4.0)
    with pytest.raises(HostReadError), no_host_reads():
        FORBIDDEN[name](tensor)


@pytest.mark.parametrize("name", ALLOWED)
def test_the_guard_allows(name: str) -> None:
    tensor = torch.arange(4.0)
    with no_host_reads():
        ALLOWED[name](tensor)
