"""The tests of this folder call the ops, which importing the package registers."""

from __future__ import annotations

import adakv_compile.kernels as _  # noqa: F401
