"""Adaptive KV caches (Ada-KV) for any traced decoder, as a ``torch.compile`` backend.

``model.compile(backend="adakv", options={"budget": 1024})`` is all that is needed; nothing here has to be imported. The
names below are for decorators, reports, statistics and tests. They load lazily: importing the package imports neither
Inductor nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from adakv_compile.api import compile, explain
    from adakv_compile.errors import AdaKVError, CompilationRefusedError, OptionsError
    from adakv_compile.options import Options
    from adakv_compile.report import Reason, Report
    from adakv_compile.runtime.compressed import CompressedKV
    from adakv_compile.runtime.stats import CacheStats, cache_stats

__all__ = [
    "AdaKVError",
    "CacheStats",
    "CompilationRefusedError",
    "CompressedKV",
    "Options",
    "OptionsError",
    "Reason",
    "Report",
    "__version__",
    "cache_stats",
    "compile",
    "explain",
]

__version__: Final = "0.1.0"

_HOME: Final = {
    "AdaKVError": "errors",
    "CacheStats": "runtime.stats",
    "CompilationRefusedError": "errors",
    "CompressedKV": "runtime.compressed",
    "Options": "options",
    "OptionsError": "errors",
    "Reason": "report",
    "Report": "report",
    "cache_stats": "runtime.stats",
    "compile": "api",
    "explain": "api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
