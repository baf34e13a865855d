"""The one module that touches PyTorch's private APIs; everything else goes through these few functions.

Verified on torch 2.11 and 2.13.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import fx
from torch._C._functorch import get_dynamic_layer_stack_depth, pop_dynamic_layer_stack_and_undo_to_depth
from torch._dynamo.eval_frame import OptimizedModule
from torch._dynamo.exc import TensorifyScalarRestartAnalysis
from torch._dynamo.guards import GuardBuilder
from torch._dynamo.source import AttrSource, ConstantSource, SubclassAttrListSource
from torch._dynamo.symbolic_convert import TensorifyState
from torch._functorch.aot_autograd import aot_export_module
from torch._guards import GuardsSet, TracingContext, tracing
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, free_symbols
from torch.utils._sympy.printers import PythonPrinter

__all__ = [
    "CapturedGraph",
    "FakeTensor",
    "FakeTensorMode",
    "arguments_of",
    "capture",
    "cheapen_subclass_guards",
    "compile_graph",
    "compile_when_called",
    "declare_inputs",
    "fake_mode_of_this_compile",
    "fresh_size",
    "guard_if_equal",
    "is_fake",
    "is_kept_by_module",
    "load_cpp",
    "mode_patches",
    "route_generate",
    "seconds_compiling",
    "specialise_float_inputs",
    "symbols_of",
    "take_guards",
]

CapturedGraph = tuple[fx.GraphModule, dict[str, str], list[str]]
"""The graph, its mutated inputs as ``{output name: input name}``, and the names of lifted parameters and buffers."""


def fake_mode_of_this_compile() -> FakeTensorMode | None:
    """Return the fake mode in which Dynamo traced the graph that is being compiled, if any."""
    context = TracingContext.try_get()
    return None if context is None else context.fake_mode


def arguments_of(operator: OpOverload) -> tuple[str, ...]:
    """Return the names of an operator's arguments, in order."""
    return tuple(argument.name for argument in operator._schema.arguments)


def is_fake(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor is fake (has a shape but no data)."""
    return isinstance(tensor, FakeTensor)


def is_kept_by_module(tensor: torch.Tensor) -> bool:
    """Tell whether Dynamo found an example input as an attribute of a module, not among a call's arguments."""
    return not is_fake(tensor) and getattr(tensor, "_dynamo_static_input_type", None) is not None


def specialise_float_inputs(gm: fx.GraphModule) -> None:
    """Restart Dynamo's analysis with Python floats as constants, when it made graph inputs of them.

    With ``dynamic=True`` every float attribute (an attention scale, say) becomes a zero-dimensional tensor input and an
    ``item()`` call. Inductor undoes that for the floats it can't keep symbolic by the same restart; an attention scale
    must be a constant for the rewrite, and floats of a model don't change from call to call.
    """
    found = False
    for node in gm.graph.find_nodes(op="placeholder"):
        value = node.meta.get("example_value")
        memo = getattr(value, "item_memo", None) if isinstance(value, FakeTensor) else None
        name = getattr(getattr(getattr(memo, "node", None), "_expr", None), "name", None)
        if name is not None and not TensorifyState.should_specialize(name):
            TensorifyState.specialize(name)
            found = True
    if found:
        raise TensorifyScalarRestartAnalysis


def cheapen_subclass_guards(gm: fx.GraphModule, kind: type[torch.Tensor], inner: str, context: Sequence[str]) -> None:
    """Let Dynamo guard on inputs of a tensor subclass in C++ where it would call Python for each at every step.

    What ``__tensor_flatten__`` says is guarded by two calls of it: the inner tensors' names, which are the same for
    every object of the class, and the context, which is an attribute here and so can be compared as one. The inner
    tensor is guarded like an input of its own, which says nothing new where its dtype, its device and all else that a
    graph can see of it are the outer tensor's.

    Must be called while the backend runs, before Dynamo builds its guards. Where they are others, nothing is changed.

    Args:
        gm: Dynamo's graph.
        kind: The subclass; its inner tensor has no elements, and is otherwise like the outer one.
        inner: The attribute that holds its only inner tensor.
        context: The attribute, and attributes of it, that hold the context: a tuple of strings.
    """
    tracing_context = TracingContext.try_get()
    if tracing_context is None:
        return
    placeholders = gm.graph.find_nodes(op="placeholder")
    used: dict[Any, fx.Node] = {getattr(node, "_dynamo_source", None): node for node in placeholders}
    views = {source for source, node in used.items() if type(node.meta.get("example_value")) is kind} - {None}
    if not views:
        return
    inside = {AttrSource(view, inner) for view in views}
    # If the graph reads an inner tensor (a model's code does not), it stays an input like any other.
    needless = ({SubclassAttrListSource(view) for view in views} | inside) - used.keys()
    guards_context = tracing_context.guards_context
    kept: list[Any] = []
    for guard in guards_context.dynamo_guards:
        source = guard.originating_source
        if source in needless:
            continue
        if source in views and guard.create_fn is GuardBuilder.TENSOR_SUBCLASS_METADATA_MATCH:
            attribute = functools.reduce(AttrSource, context, source)
            guard = attribute.make_guard(GuardBuilder.EQUALS_MATCH)
        kept.append(guard)
    guards_context.dynamo_guards = GuardsSet(type(guards_context.dynamo_guards.inner)(kept))


def capture(gm: fx.GraphModule, fakes: Sequence[object], fake_mode: FakeTensorMode) -> CapturedGraph:
    """Trace a Dynamo graph to functional pre-dispatch ATen, where attention is still one operation.

    Args:
        gm: Dynamo's graph; not modified.
        fakes: One fake tensor, ``SymInt`` or constant for each placeholder.
        fake_mode: The mode the fakes belong to.
    """
    # A context of its own: the export records metadata there that the real compilation must not find.
    depth = get_dynamic_layer_stack_depth()
    try:
        with tracing(TracingContext(fake_mode)), torch.no_grad():
            module, signature = aot_export_module(gm, list(fakes), trace_joint=False, pre_dispatch=True)
    finally:
        # A graph that fails inside of a vmap leaves its level behind, which Dynamo's own guards would find.
        if get_dynamic_layer_stack_depth() > depth:
            pop_dynamic_layer_stack_and_undo_to_depth(depth)
    mutated: dict[str, str] = {**signature.buffers_to_mutate, **signature.user_inputs_to_mutate}
    assert isinstance(module, fx.GraphModule)
    return module, mutated, [*signature.parameters, *signature.buffers]


def fresh_size(fake_mode: FakeTensorMode, name: str, hint: int, *, at_least_two: bool) -> torch.SymInt:
    """Return a new symbolic size that nothing else shares.

    Dynamo doesn't know such a size and can't guard on it: see :func:`take_guards`. With ``at_least_two`` the compiler
    may take that for granted, and the caller must make sure of it; without it even 0 and 1 are not told apart.
    """
    env = fake_mode.shape_env
    assert env is not None  # Dynamo's fake mode always has one
    source = ConstantSource(name)
    symbol = env.create_symbol(hint, source, DimDynamic.DYNAMIC, None, do_not_specialize_zero_one=not at_least_two)
    size = env.create_symintnode(symbol, hint=hint, source=source)
    assert isinstance(size, torch.SymInt)
    return size


def guard_if_equal(a: int | torch.SymInt, b: int | torch.SymInt) -> None:
    """Let Dynamo guard that two sizes are equal, if they are so now.

    From then on they are the same expression. A later call in which they differ gets a graph of its own.
    """
    hints = [size.node.hint if isinstance(size, torch.SymInt) else size for size in (a, b)]
    if hints[0] is not None and hints[0] == hints[1]:
        bool(a == b)


def symbols_of(sizes: Iterable[int | torch.SymInt]) -> frozenset[object]:
    """Return the symbols that sizes consist of."""
    return frozenset[object]().union(*(free_symbols(size) for size in sizes if isinstance(size, torch.SymInt)))


def take_guards(fake_mode: FakeTensorMode, sizes: Sequence[torch.SymInt]) -> Callable[..., bool] | None:
    """Take the guards on ``sizes`` away from Dynamo, which couldn't check them and would fail; return their check.

    Args:
        fake_mode: The mode that traced with them.
        sizes: Sizes made by :func:`fresh_size`.

    Returns:
        A function of the numbers that ``sizes`` are in a call; None if nothing was assumed of them.

    Raises:
        RuntimeError: Something was assumed of them together with a size of Dynamo's.
    """
    env: ShapeEnv | None = fake_mode.shape_env
    ours = {symbol: None for size in sizes for symbol in free_symbols(size)}
    if env is None:
        return None
    taken = [guard.expr for guard in env.guards if guard.expr.free_symbols & ours.keys()]
    env.guards = [guard for guard in env.guards if not guard.expr.free_symbols & ours.keys()]
    mixed = [str(expr) for expr in taken if not expr.free_symbols <= ours.keys()]
    if mixed:
        raise RuntimeError(f"the compiler assumed {mixed} about sizes that nobody checks")
    if not taken:
        return None
    code = " and ".join(f"({PythonPrinter().doprint(expr)})" for expr in dict.fromkeys(taken))
    return eval(f"lambda {', '.join(map(str, ours))}: {code}", {"math": math})


def route_generate(backend: Callable[..., Any]) -> None:
    """Let ``torch.compile(model, backend="adakv").generate(...)`` run on the compiled model.

    ``torch.compile`` returns a wrapper whose ``generate`` is the original model's bound method, which calls the
    original, uncompiled model: nothing would be compressed and nothing would say so. PyTorch has no hook for that, so
    the wrapper class's attribute look-up is extended, for wrappers that carry ``backend`` only: during the call the
    original module's calls go through the compilation, as ``model.compile`` does it for good.
    """
    look_up = OptimizedModule.__getattr__

    @functools.wraps(look_up)
    def routed(self: OptimizedModule, name: str) -> Any:
        attribute = look_up(self, name)
        if name == "generate" and callable(attribute) and _carries(self, backend):
            return functools.partial(_call_compiled, self, attribute)
        return attribute

    OptimizedModule.__getattr__ = routed


def _carries(module: OptimizedModule, backend: Callable[..., Any]) -> bool:
    link: Any = getattr(module.dynamo_ctx, "callback", None)
    while link is not None and getattr(link, "compiler_fn", None) is not backend:
        link = getattr(link, "_torchdynamo_orig_backend", None)
    return link is not None


def _call_compiled(wrapper: OptimizedModule, method: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    module = wrapper._orig_mod
    compiled = wrapper.__dict__.get("_adakv_call")
    if compiled is None:
        compiled = wrapper.__dict__["_adakv_call"] = wrapper.dynamo_ctx(module._call_impl)
    before = module._compiled_call_impl
    module._compiled_call_impl = compiled
    try:
        return method(*args, **kwargs)
    finally:
        module._compiled_call_impl = before


def mode_patches(mode: str) -> dict[str, Any]:
    """Return Inductor's settings for a mode of ``torch.compile``.

    Raises:
        RuntimeError: The mode is unknown (PyTorch's own message lists them).
    """
    from torch._inductor import list_mode_options

    return dict(list_mode_options(mode))


def declare_inputs(
    module: fx.GraphModule, gm: fx.GraphModule, origins: Sequence[int | None], static: Sequence[int]
) -> None:
    """Tell Inductor's CUDA graphs which inputs of ``module`` keep their memory, as Dynamo does for graphs of its own.

    What they don't know to stay is copied at every replay: all weights, all of the cache. And a graph that writes to
    such an input isn't recorded at all.

    Args:
        module: A graph made from Dynamo's; changed.
        gm: Dynamo's graph.
        origins: For each placeholder of ``module`` the one of ``gm`` that it was, or None.
        static: Further placeholders of ``module`` that keep their memory.
    """
    given = gm.graph.find_nodes(op="placeholder")
    for i, node in enumerate(module.graph.find_nodes(op="placeholder")):
        index = origins[i]
        origin = None if index is None else given[index]
        node._dynamo_source = getattr(origin, "_dynamo_source", None)
        known = {} if origin is None else origin.meta.get("tensor_dict", {})
        kind = "unguarded" if i in static else known.get("_dynamo_static_input_type")
        node.meta["tensor_dict"] = {"_dynamo_static_input_type": kind}
    module._param_name_to_source = {}  # pyright: ignore[reportArgumentType]


def compile_graph(gm: fx.GraphModule, inputs: Sequence[Any], inner: str, patches: dict[str, Any]) -> Callable[..., Any]:
    """Compile ``gm`` with the inner compiler; ``gm`` is consumed.

    Args:
        gm: The graph, rewritten or not.
        inputs: Example inputs: real or fake tensors and integers.
        inner: ``"inductor"``, ``"aot_eager"`` or ``"eager"``.
        patches: Inductor's configuration for this graph alone.
    """
    if inner == "inductor":
        from torch._inductor.compile_fx import compile_fx

        return cast(Callable[..., Any], compile_fx(gm, list(inputs), config_patches=patches or None))
    if inner == "aot_eager":
        from torch._dynamo.backends.debugging import aot_eager

        return aot_eager(gm, list(inputs))
    return gm.forward


def compile_when_called(gm: fx.GraphModule, inner: str, patches: dict[str, Any]) -> Callable[..., Any]:
    """Return ``gm`` as the inner compiler alone would run it; nothing is compiled before the first call.

    Args:
        gm: Dynamo's graph; it is only read.
        inner: ``"inductor"``, ``"aot_eager"`` or ``"eager"``.
        patches: Inductor's configuration for this graph alone.
    """
    if inner == "eager":
        return gm.forward
    options = patches if inner == "inductor" else None
    return torch.compile(gm, backend=inner, options=options or None)


def load_cpp(source: str) -> ctypes.CDLL:
    """Build a C++ library with Inductor's compiler, flags and disk cache, or load it from there.

    Args:
        source: All of it. PyTorch's headers are found; they take long.

    Raises:
        Exception: There is no compiler, or it fails.
    """
    from torch._inductor.codecache import CppCodeCache
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    # Named here, as versions differ in whether they look for vectors in the source. Sums must be summed as written.
    flags = [*pick_vec_isa().build_arch_flags().split(), "-fno-math-errno", "-ffp-contract=fast"]
    return CppCodeCache.load(source, device_type="cpu", extra_flags=flags)


def seconds_compiling() -> float:
    """Return the wall-clock seconds that this process has spent in Dynamo and below it, so far."""
    from torch._dynamo.utils import calculate_time_spent

    return calculate_time_spent()["total_wall_time"]
