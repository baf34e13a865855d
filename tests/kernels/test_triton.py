"""The Triton kernels pass their checks: in the interpreter without a GPU, natively with one."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.checks import OPS, checks_of
from tests.kernels.checks.draw import run_check

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(("op", "name"), [(op, name) for op in OPS for name in checks_of(op)])
def test_kernel(op: str, name: str) -> None:
    run_check(checks_of(op)[name], DEVICE)
