"""The command ``adakv eval``: what eviction costs on needles, RULER and LongBench, as flags and a progress bar."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import adakv_compile
from adakv_compile.cli.errors import require
from adakv_compile.cli.screen import clear_errors
from adakv_compile.evaluation.errors import EvaluationError, need

if TYPE_CHECKING:
    from adakv_compile.cli.loading import Loaded
    from adakv_compile.evaluation.methods import Setting
    from adakv_compile.evaluation.records import Records
    from adakv_compile.evaluation.runner import Plan
    from adakv_compile.evaluation.sample import Sample

__all__ = ["app"]

app = typer.Typer(
    help="Measure what eviction costs: scores, entries, bytes, times. A stopped run continues with the same command.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Option("--model", help="Folder of a model, or its name on the hub.", show_default=False)]
Methods = Annotated[str, typer.Option("--methods", help="Comma-separated; full is the cache that keeps everything.")]
Budgets = Annotated[str, typer.Option("--budgets", help="Comma-separated: entries per KV head, or shares as 0.1.")]
Protocols = Annotated[
    str, typer.Option("--protocol", help="question-aware, question-agnostic, or both, comma-separated.")
]
Out = Annotated[Path | None, typer.Option("--out", help="Results. [default: adakv-eval-BENCHMARK]")]
Seeds = Annotated[str, typer.Option("--seeds", help="Comma-separated seeds of the texts.")]
Lengths = Annotated[str, typer.Option("--length", help="Comma-separated lengths in tokens, the answer included.")]
Window = Annotated[int | None, typer.Option("--window", help="Observation window in tokens. [default: 32]")]
Extra = Annotated[
    list[str] | None, typer.Option("--option", "-o", metavar="NAME=VALUE", help="Any other option of the backend.")
]
Batch = Annotated[int, typer.Option("--batch", min=1, help="Samples that are answered together, padded on the left.")]
Inner = Annotated[str, typer.Option("--inner", help="Compiler: inductor, aot_eager or eager.")]
DType = Annotated[str, typer.Option("--dtype", help="auto (the checkpoint's), float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option("--device", help="auto (the GPU if there is one), cpu, cuda, cuda:1, ...")]

_ALL: Final = "full,snapkv,ada-snapkv,pyramidkv,ada-pyramid,streamingllm"
_BUDGETS: Final = "128,256,512,1024"
_AWARE: Final = "question-aware"


@dataclass(frozen=True, slots=True)
class _Request:
    """What the flags that all benchmarks share say."""

    benchmark: str
    model: str
    methods: str
    budgets: str
    protocol: str
    out: Path | None
    seeds: str
    window: int | None
    option: list[str] | None
    batch: int
    inner: str
    dtype: str
    device: str

    @property
    def directory(self) -> Path:
        return self.out or Path(f"adakv-eval-{self.benchmark}")


@app.command()
def needle(
    *,
    model: Model,
    methods: Methods = _ALL,
    budgets: Budgets = _BUDGETS,
    protocol: Protocols = _AWARE,
    out: Out = None,
    seeds: Seeds = "0",
    length: Lengths = "1024,2048,4096",
    depths: Annotated[str, typer.Option("--depths", help="Comma-separated, in per cent.")] = "0,25,50,75,100",
    count: Annotated[int, typer.Option("--count", min=1, help="Samples of a length and depth.")] = 1,
    kind: Annotated[str, typer.Option("--kind", help="single, multi-key, multi-value or multi-query.")] = "single",
    metric: Annotated[
        str, typer.Option("--metric", help="string_match_all, exact or keyword_recall.")
    ] = "string_match_all",
    window: Window = None,
    option: Extra = None,
    batch: Batch = 1,
    inner: Inner = "inductor",
    dtype: DType = "auto",
    device: Device = "auto",
) -> None:
    """Hide facts in a long text, at a grid of lengths and depths, and ask for them."""
    backend = (window, option, batch, inner, dtype, device)
    request = _Request("needle", model, methods, budgets, protocol, out, seeds, *backend)
    screen = Console(stderr=True)
    with clear_errors(screen):
        lengths, places = _integers("length", length), [float(depth) for depth in _numbers("depths", depths)]

        def make(loaded: Loaded, seed: int) -> Iterable[Sample]:
            from adakv_compile.evaluation import needle as benchmark

            chosen: Any = {"kind": kind, "metric": metric}
            return benchmark.samples(loaded.tokenizer, lengths, places, count, seed, **chosen)

        told = {"lengths": lengths, "depths": places, "count": count, "kind": kind, "metric": metric}
        _evaluate(screen, request, told, make, lengths)


@app.command()
def ruler(
    *,
    model: Model,
    methods: Methods = _ALL,
    budgets: Budgets = "0.1,0.2,0.4",
    protocol: Protocols = _AWARE,
    out: Out = None,
    seeds: Seeds = "0",
    length: Lengths = "4096",
    tasks: Annotated[str, typer.Option("--tasks", help="Comma-separated. [default: all that need no data]")] = "",
    count: Annotated[int, typer.Option("--count", min=1, help="Samples of a task and length.")] = 50,
    window: Window = None,
    option: Extra = None,
    batch: Batch = 1,
    inner: Inner = "inductor",
    dtype: DType = "auto",
    device: Device = "auto",
) -> None:
    """Run RULER's tasks, made from a seed at any length."""
    backend = (window, option, batch, inner, dtype, device)
    request = _Request("ruler", model, methods, budgets, protocol, out, seeds, *backend)
    screen = Console(stderr=True)
    with clear_errors(screen):
        from adakv_compile.evaluation import ruler as benchmark

        lengths = _integers("length", length)
        chosen = _known("task", _items(tasks) or benchmark.GENERATED, benchmark.TASKS)

        def make(loaded: Loaded, seed: int) -> Iterable[Sample]:
            return (
                sample
                for tokens in lengths
                for task in chosen
                for sample in benchmark.samples(task, loaded.tokenizer, tokens, count, seed)
            )

        _evaluate(screen, request, {"lengths": lengths, "tasks": chosen, "count": count}, make, lengths)


@app.command()
def longbench(
    *,
    model: Model,
    methods: Methods = _ALL,
    budgets: Budgets = _BUDGETS,
    protocol: Protocols = _AWARE,
    out: Out = None,
    datasets: Annotated[str, typer.Option("--datasets", help="Comma-separated. [default: all 16]")] = "",
    data: Annotated[
        Path | None,
        typer.Option("--data", help="Folder with LongBench's data.zip or .jsonl files, or QMSum's test.jsonl."),
    ] = None,
    count: Annotated[int, typer.Option("--count", min=0, help="First rows of each data set; 0: all.")] = 0,
    max_length: Annotated[
        int | None, typer.Option("--max-length", min=2, help="Longest prompt in tokens. [default: by the model]")
    ] = None,
    window: Window = None,
    option: Extra = None,
    batch: Batch = 1,
    inner: Inner = "inductor",
    dtype: DType = "auto",
    device: Device = "auto",
) -> None:
    """Run LongBench's 16 English and code data sets."""
    backend = (window, option, batch, inner, dtype, device)
    request = _Request("longbench", model, methods, budgets, protocol, out, "0", *backend)
    screen = Console(stderr=True)
    with clear_errors(screen):
        from adakv_compile.evaluation import longbench as benchmark
        from adakv_compile.evaluation.answer import positions_of
        from adakv_compile.evaluation.longbench_rows import collect

        for package in ("rouge", "rapidfuzz"):
            need(package)
        chosen = _known("data set", _items(datasets), benchmark.DATASETS)
        rows = collect(chosen, data, count)

        def make(loaded: Loaded, _: int) -> Iterable[Sample]:
            most = max_length or benchmark.longest_prompt(positions_of(loaded.model))
            for task, (dataset, found) in rows.items():
                yield from benchmark.samples(dataset, found, loaded.tokenizer, most, task)

        told = {"datasets": list(rows), "count": count, "max_length": max_length}
        _evaluate(screen, request, told, make, [max_length] if max_length else [])


def _evaluate(
    screen: Console,
    request: _Request,
    told: dict[str, Any],
    make: Callable[[Loaded, int], Iterable[Sample]],
    lengths: Sequence[int],
) -> None:
    """Run one benchmark under every setting, and write its tables and pictures."""
    require("transformers", "transformers")
    require("matplotlib", "cli")
    from adakv_compile.cli.loading import load, parse_options
    from adakv_compile.evaluation.methods import parse_budgets, settings
    from adakv_compile.evaluation.prompts import PROTOCOLS
    from adakv_compile.evaluation.records import Records
    from adakv_compile.evaluation.report import write
    from adakv_compile.evaluation.runner import Plan

    named: dict[str, object] = {"window": request.window, "inner": request.inner}
    options = parse_options(named, request.option or [])
    chosen = settings(_items(request.methods), parse_budgets(_items(request.budgets)), options)
    protocols = _known("protocol", _items(request.protocol), PROTOCOLS)
    seeds = _integers("seeds", request.seeds)
    with screen.status(f"loading {escape(request.model)}"):
        loaded = load(request.model, request.dtype, request.device)
    _check_lengths(loaded, lengths)
    with screen.status("writing the texts"):
        samples = {seed: tuple(make(loaded, seed)) for seed in seeds}
    plan = Plan(chosen, protocols, samples, options, request.batch)
    told = {"batch": request.batch, "protocols": protocols, "seeds": seeds, "options": options, **told}
    with Records(request.directory, _configuration(request, loaded, chosen, told)) as records:
        _run(screen, request, loaded, plan, records)
        found = list(records.done.values())
        files = write(found, request.directory, f"# {request.benchmark}: {request.model}")
    crashed = sum(record["score"] is None for record in found)
    if crashed:
        screen.print(
            f"[yellow]{crashed} samples could not be answered[/yellow] and have no score; records.jsonl tells why"
        )
    typer.echo((request.directory / "summary.md").read_text(encoding="utf-8"))
    screen.print("written:", ", ".join(map(str, files)), markup=False, soft_wrap=True)


def _run(screen: Console, request: _Request, loaded: Loaded, plan: Plan, records: Records) -> None:
    """Run what is missing, under a progress bar; what is there stays when it is interrupted."""
    from adakv_compile.evaluation.runner import run

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # Answers under another method may take ten times as long: the estimate looks back far.
    with Progress(
        *columns,
        TextColumn("left"),
        TimeRemainingColumn(),
        console=screen,
        disable=not screen.is_terminal,
        speed_estimate_period=600,
    ) as progress:
        task = progress.add_task(request.benchmark, total=plan.size, completed=len(records.done))

        def tell(setting: str) -> None:
            progress.update(task, description=f"{request.benchmark}: {setting}", completed=len(records.done))

        try:
            run(plan, loaded.model, loaded.tokenizer, loaded.device, records, tell)
        except KeyboardInterrupt as error:
            progress.stop()
            screen.print(
                f"Stopped with {len(records.done)} of {plan.size} answers in {request.directory}; the same command "
                "continues there.",
                markup=False,
                soft_wrap=True,
            )
            raise typer.Exit(130) from error


def _configuration(
    request: _Request, loaded: Loaded, chosen: Sequence[Setting], told: dict[str, Any]
) -> dict[str, Any]:
    """Return everything that results depend on."""
    import torch
    import transformers

    from adakv_compile.evaluation.fingerprint import fingerprint

    return {
        "benchmark": request.benchmark,
        "model": request.model,
        "weights": fingerprint(loaded.model),
        "dtype": str(loaded.model.dtype),
        "device": loaded.device.type,
        "settings": [[setting.method, setting.budget] for setting in chosen],
        **told,
        "versions": {
            "adakv_compile": adakv_compile.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def _check_lengths(loaded: Loaded, lengths: Sequence[int]) -> None:
    from adakv_compile.evaluation.answer import positions_of

    positions = positions_of(loaded.model)
    for length in lengths:
        if positions is not None and length > positions:
            raise EvaluationError(
                f"{loaded.name!r} has {positions:,} positions; a length of {length:,} is too long for it"
            )


def _items(text: str) -> list[str]:
    return [item.strip() for item in text.split(",") if item.strip()]


def _numbers(name: str, text: str) -> list[float]:
    try:
        return [float(item) for item in _items(text)]
    except ValueError as error:
        raise EvaluationError(f"--{name} is {text!r}; it must be numbers separated by commas") from error


def _integers(name: str, text: str) -> list[int]:
    items = _items(text)
    if not items or not all(item.isdecimal() for item in items):
        raise EvaluationError(f"--{name} is {text!r}; it must be whole numbers separated by commas")
    return [int(item) for item in dict.fromkeys(items)]


def _known(what: str, given: Sequence[str], known: Iterable[str]) -> list[str]:
    """Return names that were given once each, or all if none was."""
    names = list(known)
    for name in given:
        if name not in names:
            raise EvaluationError(f"unknown {what} {name!r}; allowed: {', '.join(names)}")
    return list(dict.fromkeys(given)) or names
