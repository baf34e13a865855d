"""The tests of this folder call the ops, which importing the package registers, also in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import adakv_compile.kernels as _  # noqa: F401
from adakv_compile.kernels._support import interpreting
from tests.kernels.interpreter import repaired_arithmetic


@pytest.fixture(scope="session", autouse=True)
def repaired_interpreter() -> Iterator[None]:
    """Repair the arithmetic of Triton's interpreter, if kernels run in it."""
    if not interpreting():
        yield
        return
    with repaired_arithmetic():
        yield
