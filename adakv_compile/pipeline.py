"""The stages from a Dynamo graph to a callable, in order, with their times; any failure leaves the graph alone."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch
from torch import fx

from adakv_compile import _torch, kernels
from adakv_compile.assumptions import Assumption
from adakv_compile.call import bind
from adakv_compile.capture import CaptureError, Program, capture
from adakv_compile.errors import CompilationRefusedError
from adakv_compile.options import Options
from adakv_compile.passes.normalise import normalise
from adakv_compile.passes.plan import make_plan
from adakv_compile.passes.planned import Plan
from adakv_compile.passes.relax import relax_views
from adakv_compile.passes.replay import makes_cache, origins, static_inputs, why_not_replayed
from adakv_compile.passes.rewrite import Rewritten, rewrite
from adakv_compile.printer import print_graph
from adakv_compile.report import GraphReport, Reason, Refusal, SiteReport
from adakv_compile.runtime.compressed import CompressedKV

__all__ = ["compile_or_leave"]

log = logging.getLogger(__name__)

_CUDA_GRAPHS: Final = "triton.cudagraphs"

Observer = Callable[[GraphReport], None]


@dataclass
class _Stages:
    """What is recorded of one compilation.

    Attributes:
        keep_snapshot: Whether somebody wants the text of the rewritten graph.
        seconds: Time of each stage.
        unmet: What was asked for and could not be done.
    """

    keep_snapshot: bool
    seconds: dict[str, float] = field(default_factory=dict[str, float])
    unmet: list[str] = field(default_factory=list[str])

    @contextmanager
    def time(self, stage: str) -> Generator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = time.perf_counter() - begin
            log.debug("%s took %.3f s", stage, self.seconds[stage])


def compile_or_leave(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options, observer: Observer | None = None
) -> Callable[..., Any]:
    """Compile a Dynamo graph with its attention on a compressed cache, or exactly as the inner compiler alone would.

    Args:
        gm: Dynamo's graph.
        example_inputs: Its example inputs; never kept.
        options: The user's options.
        observer: Called once with what was done, for reports.

    Raises:
        CompilationRefusedError: ``options.strict`` and an attention with a KV cache could not be compressed.
    """
    _torch.cheapen_subclass_guards(gm, CompressedKV, inner="anchor", context=("axes", "dims"))
    stages = _Stages(keep_snapshot=observer is not None)
    sites: tuple[SiteReport, ...] = ()
    snapshot, nodes, refusal = "", len(gm.graph.nodes), None
    compiled: Callable[..., Any] | None = None
    plan: Plan | None = None
    if torch.is_grad_enabled():
        refusal = Refusal(Reason.GRAD_ENABLED, "")
    else:
        plan, program, refusal = _analyse(gm, example_inputs, options, stages)
        if plan is not None and program is not None:
            sites, nodes = plan.describe(), len(program.module.graph.nodes)
            _enforce_strict(plan.refusals, options)
            unread = _unread_pasts(program, plan)
            if plan.sites and not unread:
                compiled, snapshot, refusal = _rewrite_and_compile(gm, example_inputs, options, program, plan, stages)
    unmet = (*(plan.unmet if plan is not None else ()), *stages.unmet)
    report = GraphReport(nodes, sites, refusal, dict(stages.seconds), snapshot, unmet)
    if refusal is not None:
        _enforce_strict((refusal,), options)
    log.info("%d nodes, %d of %d attentions compressed", nodes, sum(site.compressed for site in sites), len(sites))
    on_compressed = any(isinstance(example, CompressedKV) for example in example_inputs)
    if observer is not None:
        observer(report)
    else:
        _warn(report, "eagerly" if on_compressed and compiled is None else "as under plain Inductor")
    if compiled is not None:
        return compiled
    if on_compressed:
        # No dense tensor exists to run this graph on. Eagerly, CompressedKV serves what it can and names what it can't.
        return gm.forward
    return _torch.compile_graph(gm, example_inputs, options.inner, _patches(options))


def _analyse(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options, stages: _Stages
) -> tuple[Plan | None, Program | None, Refusal | None]:
    if not _mentions_attention(gm):
        return None, None, None
    _torch.specialise_float_inputs(gm)
    try:
        with stages.time("capture"):
            program = capture(gm, example_inputs)
        with stages.time("analyse"):
            program = normalise(program)
            return make_plan(program, options), program, None
    except CaptureError as error:
        return None, None, Refusal(Reason.CAPTURE, str(error))
    except Exception as error:  # noqa: BLE001  (the one fallback: whatever fails, the graph runs as without us)
        return None, None, _failure(Reason.CAPTURE, error, options)


def _rewrite_and_compile(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    options: Options,
    program: Program,
    plan: Plan,
    stages: _Stages,
) -> tuple[Callable[..., Any] | None, str, Refusal | None]:
    try:
        with stages.time("rewrite"):
            rewritten = rewrite(program, plan, example_inputs)
            rewritten.module.meta.update(gm.meta)
        if not stages.keep_snapshot:
            for planned in plan.sites:
                kernels.build_ahead(options.kernels, planned.site.query.meta["val"].device)
        snapshot = print_graph(rewritten.module.graph) if stages.keep_snapshot else ""
        relax_views(rewritten.module)
        with stages.time("compile"):
            patches = _patches(options)
            if patches.get(_CUDA_GRAPHS):
                patches = patches | _prepare_replay(gm, rewritten, stages)
            try:
                inner = _torch.compile_graph(rewritten.module, rewritten.inputs, options.inner, patches)
            finally:
                holds = _torch.take_guards(program.fake_mode, [size for size, _ in rewritten.unguarded])
        sizes = tuple(source for _, source in rewritten.unguarded)
        assumption = None if holds is None else Assumption(holds, sizes, rewritten.module.forward)
        fallback = gm.forward
        if rewritten.boundary.buffers:
            fallback = _torch.compile_when_called(gm, options.inner, _patches(options))
        boundary = rewritten.boundary
        boundary = replace(boundary, assumed=(*boundary.assumed, *program.checks))
        return bind(boundary, inner, fallback, assumption), snapshot, None
    except Exception as error:  # noqa: BLE001  (the one fallback: whatever fails, the graph runs as without us)
        return None, "", _failure(Reason.REWRITE, error, options)


def _prepare_replay(gm: fx.GraphModule, rewritten: Rewritten, stages: _Stages) -> dict[str, Any]:
    """Make a graph ready to be replayed as a CUDA graph, or return the setting that keeps it from being recorded."""
    why = why_not_replayed(rewritten)
    if why is not None:
        if not makes_cache(rewritten):
            stages.unmet.append(f"a step is not replayed as a CUDA graph: {why}")
        return {_CUDA_GRAPHS: False}
    _torch.declare_inputs(rewritten.module, gm, origins(rewritten), static_inputs(rewritten))
    return {}


def _mentions_attention(gm: fx.GraphModule) -> bool:
    """Whether capturing can pay: only graphs that call an attention or a softmax are looked at."""
    calls = (str(node.target) for node in gm.graph.nodes if node.op in ("call_function", "call_method"))
    return any("attention" in call or "attn" in call or "softmax" in call for call in calls)


def _unread_pasts(program: Program, plan: Plan) -> bool:
    """Whether a compressed input would be left without its rewrite."""
    served = {update.past for planned in plan.sites for update in (planned.key, planned.value)}
    return bool(program.compressed - served)


def _failure(reason: Reason, error: Exception, options: Options) -> Refusal:
    if options.strict:
        raise error
    log.info("%s", reason.value, exc_info=error)
    return Refusal(reason, f"{type(error).__name__}: {error}")


def _enforce_strict(refusals: Sequence[Refusal], options: Options) -> None:
    serious = [refusal for refusal in refusals if refusal.reason.is_refusal]
    if options.strict and serious:
        raise CompilationRefusedError(
            "strict=True and the KV cache of this graph can't be compressed.\n  "
            + "\n  ".join(map(str, serious))
            + "\nUse strict=False to run it uncompressed."
        )


def _warn(report: GraphReport, how: str) -> None:
    if report.refusals:
        reasons = "\n  ".join(map(str, report.refusals))
        warnings.warn(
            f'backend="adakv" leaves an attention uncompressed; it runs {how}.\n  {reasons}',
            stacklevel=2,
        )
    if report.unmet:
        warnings.warn('backend="adakv": ' + "; ".join(report.unmet), stacklevel=2)


def _patches(options: Options) -> dict[str, Any]:
    patches = dict(options.inductor)
    mode = patches.pop("mode", None)
    return {**(_torch.mode_patches(str(mode)) if mode is not None else {}), **patches}
