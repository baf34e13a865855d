"""The rules of the package that no linter knows: who may import whom, and what a module must, and must not, hold."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "adakv_compile"
MODULES = sorted(PACKAGE.rglob("*.py"))
SOURCES = sorted(path for folder in ("adakv_compile", "benchmarks", "tests") for path in (ROOT / folder).rglob("*.py"))

MAX_LINES = 400
DOOR = PACKAGE / "_torch.py"
FALLBACK = PACKAGE / "pipeline.py"

#: What each part may import of the package, itself aside. Parts not listed may import everything but ``testing``.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "symbolic": {"_torch", "errors", "report"},
    "policy": {"errors"},
    "kernels": {"_torch", "errors", "policy"},
    "runtime": {"_torch", "errors", "kernels", "policy"},
    "_torch": set(),
}
PRIVATE = re.compile(r"torch\.(_[a-z]\w*)\b")
#: Names of ``torch._ops`` and ``torch._C`` are classes that FX itself hands out; they are read, never called into.
HANDED_OUT = {"_ops", "_C", "_check"}


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _part(module: str) -> str | None:
    """Return the part of the package that a dotted name lies in, None for other packages."""
    names = module.split(".")
    return names[1] if names[0] == "adakv_compile" and len(names) > 1 else None


def _is_public(path: Path) -> bool:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return all(part == "__init__" or not part.startswith("_") for part in parts)


@pytest.fixture(scope="module")
def trees() -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in MODULES}


def test_imports_run_one_way(trees: dict[Path, ast.Module]) -> None:
    wrong: list[str] = []
    for path, tree in trees.items():
        own = path.relative_to(PACKAGE).with_suffix("").parts[0]
        for module in _imports(tree):
            part = _part(module)
            if part is None or part == own or module == "adakv_compile":
                continue
            if part == "testing" or (own in ALLOWED and part not in ALLOWED[own]):
                wrong.append(f"{_name(path)} imports {module}")
    assert not wrong


def test_only_one_module_imports_pytorch_internals(trees: dict[Path, ast.Module]) -> None:
    wrong: list[str] = []
    for path, tree in trees.items():
        if path == DOOR:
            continue
        attributes = (ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute))
        for text in {*_imports(tree), *attributes}:
            found = PRIVATE.match(text)
            if found and found[1] not in HANDED_OUT:
                wrong.append(f"{_name(path)}: {text}")
    assert not wrong, "go through adakv_compile._torch"


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


def test_every_module_says_what_it_is(trees: dict[Path, ast.Module]) -> None:
    assert not [_name(path) for path, tree in trees.items() if not ast.get_docstring(tree)]


def test_every_public_module_lists_its_names(trees: dict[Path, ast.Module]) -> None:
    def lists_names(tree: ast.Module) -> bool:
        targets = [target for node in tree.body if isinstance(node, ast.Assign) for target in node.targets]
        return any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets)

    def holds_code(tree: ast.Module) -> bool:
        return any(not isinstance(node, ast.Expr) for node in tree.body)

    wrong = [path for path, tree in trees.items() if _is_public(path) and holds_code(tree) and not lists_names(tree)]
    assert not [_name(path) for path in wrong]


def test_the_library_prints_nothing(trees: dict[Path, ast.Module]) -> None:
    wrong: list[str] = []
    for path, tree in trees.items():
        calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
        names = {node.func.id for node in calls if isinstance(node.func, ast.Name)}
        if "print" in names and "cli" not in path.relative_to(PACKAGE).parts:
            wrong.append(_name(path))
    assert not wrong


def test_only_the_fallback_catches_everything(trees: dict[Path, ast.Module]) -> None:
    def is_broad(handler: ast.ExceptHandler) -> bool:
        caught = handler.type
        kinds = caught.elts if isinstance(caught, ast.Tuple) else [caught]
        return any(kind is None or ast.unparse(kind) in ("Exception", "BaseException") for kind in kinds)

    wrong: list[str] = []
    for path, tree in trees.items():
        handlers = (node for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler))
        wrong += [f"{_name(path)}:{node.lineno}" for node in handlers if is_broad(node) and path != FALLBACK]
    assert not wrong


def test_no_absolute_paths_of_a_machine() -> None:
    # Put together here, so that this file doesn't hold what it looks for.
    homes = "|".join(["ho" + "me", "ro" + "ot", "wo" + "rk", "Us" + "ers"])
    path = re.compile(rf"""(?:^|[\s"'`(=])/(?:{homes})/\w""", re.MULTILINE)
    documents = [*SOURCES, *ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "Makefile", ROOT / "pyproject.toml"]
    assert not [_name(file) for file in documents if path.search(file.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("link", ["passes", "kernels"])
def test_top_level_links(link: str) -> None:
    assert (ROOT / link).resolve() == PACKAGE / link


def _python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("module", ["adakv_compile", "adakv_compile.policy", "adakv_compile.errors"])
def test_importing_is_light(module: str) -> None:
    heavy = ["transformers", "triton", "torch._inductor.compile_fx", "torch._dynamo", "typer", "rich", "matplotlib"]
    done = _python(f"import sys, {module}; print(*[m for m in {heavy!r} if m in sys.modules])")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_the_backend_is_found_without_an_import() -> None:
    done = _python("import torch; print('adakv' in torch.compiler.list_backends())")
    assert done.stdout.split() == ["True"], done.stderr


def test_every_public_name_exists() -> None:
    import adakv_compile

    assert [name for name in adakv_compile.__all__ if not hasattr(adakv_compile, name)] == []
