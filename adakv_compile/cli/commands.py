"""The commands and their flags."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

import adakv_compile
from adakv_compile.backend import adakv
from adakv_compile.cli import evaluate
from adakv_compile.cli.errors import CommandError, require
from adakv_compile.cli.screen import clear_errors

if TYPE_CHECKING:
    from adakv_compile.cli.generate import Run, Settings
    from adakv_compile.cli.loading import Loaded

__all__ = ["app"]

app = typer.Typer(
    name="adakv",
    help="Generate with an adaptive KV cache, and see what it holds.",
    no_args_is_help=True,
    add_completion=False,
    # A traceback of ours is a defect, and is wanted whole and plain.
    pretty_exceptions_enable=False,
)
app.add_typer(evaluate.app, name="eval")

Model = Annotated[str, typer.Option("--model", help="Folder of a model, or its name on the hub.", show_default=False)]
Budget = Annotated[
    str, typer.Option("--budget", help="Entries per KV head on average, or a share in (0, 1) of the prompt.")
]
Method = Annotated[str, typer.Option("--method", help="ada-snapkv, snapkv, ada-pyramid, pyramidkv or streamingllm.")]
Window = Annotated[int | None, typer.Option("--window", help="Observation window in tokens. [default: 32]")]
Alpha = Annotated[float | None, typer.Option("--alpha", help="Share that every head gets, 0 to 1. [default: 0.2]")]
Inner = Annotated[str, typer.Option("--inner", help="Compiler: inductor, aot_eager or eager.")]
Extra = Annotated[
    list[str] | None, typer.Option("--option", "-o", metavar="NAME=VALUE", help="Any other option of the backend.")
]
DType = Annotated[str, typer.Option("--dtype", help="auto (the checkpoint's), float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option("--device", help="auto (the GPU if there is one), cpu, cuda, cuda:1, ...")]
Json = Annotated[Path | None, typer.Option("--json", help="Write everything as JSON to this file.")]


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        import torch

        typer.echo(f"adakv_compile {adakv_compile.__version__} (torch {torch.__version__})")
        raise typer.Exit


@app.command()
def generate(
    *,
    model: Model,
    prompt_file: Annotated[Path, typer.Option("--prompt-file", help="Text to continue, UTF-8.", show_default=False)],
    budget: Budget = "1024",
    method: Method = "ada-snapkv",
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Most tokens to generate.")] = 128,
    window: Window = None,
    alpha: Alpha = None,
    option: Extra = None,
    inner: Inner = "inductor",
    strict: Annotated[bool, typer.Option("--strict", help="Fail rather than generate uncompressed.")] = False,
    dtype: DType = "auto",
    device: Device = "auto",
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0 decodes greedily.")] = 0.0,
    seed: Annotated[int, typer.Option("--seed", help="Seed of sampling.")] = 0,
    prefill_chunk: Annotated[
        int,
        typer.Option(
            "--prefill-chunk",
            min=0,
            help="Read longer prompts in parts of this many tokens, each compressed when read; 0: never.",
        ),
    ] = 4096,
    compare: Annotated[bool, typer.Option("--compare", help="Generate with the full cache, too.")] = False,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw the entries kept by every head to this file.")
    ] = None,
    json_file: Json = None,
) -> None:
    """Continue a text with a compressed cache; the text goes to standard output, all else to standard error."""
    screen = Console(stderr=True)
    with clear_errors(screen):
        for output in (plot, json_file):
            _check_output(output)
        if plot is not None:
            require("matplotlib", "cli")
        require("transformers", "transformers")
        named: dict[str, object] = {"budget": budget, "method": method, "window": window, "alpha": alpha}
        options = _options({**named, "inner": inner, "strict": strict}, option)

        from adakv_compile.cli import loading, render
        from adakv_compile.cli.generate import Settings

        if plot is not None:
            render.check_picture(plot)
        text = loading.read_prompt(prompt_file)
        with screen.status(f"loading {escape(model)}"):
            loaded = loading.load(model, dtype, device)
        ids = loading.encode(loaded, text, max_new_tokens)
        settings = Settings(max_new_tokens, temperature, seed, prefill_chunk)

        loaded.model.compile(backend=adakv, options=options, dynamic=True)
        runs = [_run(screen, loaded, ids, settings, method, lambda piece: typer.echo(piece, nl=False))]
        typer.echo()
        if compare:
            runs.append(_run_full(screen, loaded, ids, settings, inner))
        screen.print(render.summary(runs, ids.shape[1]))
        if compare:
            _show_verdict(screen, runs)
        if not any(layer.compressed for layer in runs[0].stats.layers):
            screen.print("[yellow]Nothing was compressed.[/yellow] `adakv explain` tells why.", markup=True)
        if plot is not None:
            render.plot_heads(runs[0].stats, plot, f"{Path(loaded.name).name}: {method}, budget {budget}")
            screen.print(f"entries per head: {plot}", markup=False)
        if json_file is not None:
            request = {"model": model, "device": str(loaded.device), "options": options, "prompt_tokens": ids.shape[1]}
            json_file.write_text(render.as_json(request, runs), encoding="utf-8")


@app.command()
def explain(
    *,
    model: Model,
    prompt_file: Annotated[
        Path | None, typer.Option("--prompt-file", help="Text to run on; else 64 arbitrary tokens.")
    ] = None,
    budget: Budget = "1024",
    method: Method = "ada-snapkv",
    window: Window = None,
    option: Extra = None,
    dtype: DType = "auto",
    device: Device = "auto",
    json_file: Json = None,
) -> None:
    """Tell for every attention of a model whether its cache can be compressed, and if not, why."""
    screen = Console(stderr=True)
    with clear_errors(screen):
        _check_output(json_file)
        require("transformers", "transformers")
        options = _options({"budget": budget, "method": method, "window": window}, option)

        import torch

        from adakv_compile.cli import loading

        text = None if prompt_file is None else loading.read_prompt(prompt_file)
        with screen.status(f"loading {escape(model)}"):
            loaded = loading.load(model, dtype, device)
        if text is None:
            ids = (torch.arange(64, device=loaded.device) % loaded.model.config.get_text_config().vocab_size)[None]
        else:
            ids = loading.encode(loaded, text, 1)
        with screen.status("reading the graphs"):
            report = adakv_compile.explain(loaded.model, input_ids=ids, use_cache=True, options=options)
        typer.echo(str(report))
        if json_file is not None:
            json_file.write_text(report.json(), encoding="utf-8")


def _options(named: dict[str, object], pairs: list[str] | None) -> dict[str, object]:
    """Return the backend's options, validated before anything is loaded."""
    from adakv_compile.cli.loading import parse_options

    options = parse_options(named, pairs or [])
    adakv_compile.Options.parse(None, options)
    return options


def _check_output(path: Path | None) -> None:
    """Find out before a long run, not after it, that its result can't be written."""
    if path is not None and not path.absolute().parent.is_dir():
        raise CommandError(f"can't write {str(path)!r}: there is no folder {str(path.parent)!r}")


def _run(
    screen: Console, loaded: Loaded, ids: Any, settings: Settings, label: str, write: Callable[[str], None]
) -> Run:
    """Generate under a progress bar that ends at the first token."""
    from adakv_compile.cli.generate import generate as measured

    length = int(ids.shape[1])
    parts = bool(settings.chunk) and length > settings.chunk
    columns = (TextColumn("{task.description}"), SpinnerColumn() if not parts else BarColumn())
    counts = (MofNCompleteColumn(), TextColumn("tokens")) if parts else ()
    everything = (*columns, *counts, TimeElapsedColumn())
    # Redirected to a file, a bar would only leave empty lines.
    with Progress(*everything, console=screen, transient=True, disable=not screen.is_terminal) as progress:
        task = progress.add_task(f"reading the prompt ({label})", total=length if parts else None)
        return measured(
            loaded,
            ids,
            settings,
            label,
            write=write,
            read=lambda done: progress.update(task, completed=done),
            begin=progress.stop,
        )


def _run_full(screen: Console, loaded: Loaded, ids: Any, settings: Settings, inner: str) -> Run:
    import torch

    torch.compiler.reset()
    loaded.model.compile(backend=inner, dynamic=True)
    return _run(screen, loaded, ids, settings, f"full cache ({inner})", lambda _: None)


def _show_verdict(screen: Console, runs: list[Run]) -> None:
    from adakv_compile.cli import render

    compressed, full = runs
    screen.print(render.verdict(compressed, full))
    if compressed.tokens != full.tokens:
        screen.print("With the full cache:", full.text, markup=False)
