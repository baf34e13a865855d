"""The Triton kernels pass their checks: in the interpreter without a GPU, natively with one."""

from __future__ import annotations

import math

import pytest
import torch

from adakv_compile.kernels.decode_attention.triton_visibility import LOWEST
from adakv_compile.policy import HIDDEN_LOGIT
from tests.kernels.checks import OPS, checks_of
from tests.kernels.checks.draw import run_check

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(("op", "name"), [(op, name) for op in OPS for name in checks_of(op)])
def test_kernel(op: str, name: str) -> None:
    run_check(checks_of(op)[name], DEVICE)


def test_the_kernels_and_the_portable_operators_mean_the_same_by_hidden() -> None:
    assert pytest.approx(LOWEST.value / 2 * math.log(2), rel=0.02) == HIDDEN_LOGIT
