"""The shape of the source: imports run one way, without a circle, and files, functions and folders stay small."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("shards", "toolkit", "launch")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

# Each group may import from itself and from those before it.
LAYERS: dict[str, tuple[str, ...]] = {
    "packages": ("shards", "toolkit", "launch"),
    "shards": (
        "shards.errors",
        "shards.html",
        "shards.media",
        "shards.augment",
        "shards.corpora",
        "shards.reading",
        "shards.writing",
        "shards.checking",
    ),
    "toolkit": (
        "toolkit.config",
        "toolkit.objectives",
        "toolkit.model",
        "toolkit.evaluation",
        "toolkit.hub",
        "toolkit.reporting",
        "toolkit.training",
    ),
    "evaluate": ("toolkit.evaluate", "toolkit.training"),
    "launch": ("launch.slurm.client", "launch.status", "launch.slurm.requeue", "launch.submit"),
}


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


@cache
def imports(module: str, late: bool = True) -> frozenset[str]:
    """The project's modules that a module imports, inside functions too or only when it is imported."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree) if late else _top_level(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in PACKAGES:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in MODULES else node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] in PACKAGES}
    return frozenset(found - {module})


def _top_level(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            guarded = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            if not guarded:
                yield node
                yield from _top_level(node)


def test_modules_are_found() -> None:
    assert len(MODULES) > 100
    assert "toolkit.training.learner" in imports("toolkit.training.trainer")


@pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)
def test_imports_run_one_way(layers: tuple[str, ...]) -> None:
    def layer(module: str) -> int | None:
        return next((n for n, name in enumerate(layers) if f"{module}.".startswith(f"{name}.")), None)

    wrong = []
    for module in MODULES:
        here = layer(module)
        for imported in imports(module):
            there = layer(imported)
            if here is not None and there is not None and there > here:
                wrong.append(f"{module} imports {imported}")
    assert not wrong, "\n".join(wrong)


def test_no_circle() -> None:
    """Not even one that an import inside a function would close."""
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module in done:
            return
        for imported in imports(module):
            if imported in MODULES:
                visit(imported, (*path, module))
        done.add(module)

    for module in MODULES:
        visit(module, ())


def test_each_folder_is_a_package() -> None:
    """Otherwise a wheel would lack it."""
    assert not [str(folder) for folder in {path.parent for path in FILES} if not (folder / "__init__.py").is_file()]


@pytest.mark.parametrize("package", PACKAGES)
def test_files_and_functions_are_short(package: str) -> None:
    long = []
    for path in (ROOT / package).rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if (lines := text.count("\n")) > 400:
            long.append(f"{path.relative_to(ROOT)}: {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno and node.end_lineno - node.lineno >= 60:
                long.append(f"{path.relative_to(ROOT)}: {node.name} has {node.end_lineno - node.lineno + 1} lines")
    assert not long, "\n".join(long)


def test_folders_are_small() -> None:
    folders = {path.parent for path in FILES}
    crowded = {
        str(folder.relative_to(ROOT)): count
        for folder in folders
        if (count := sum(path.name != "__init__.py" for path in folder.glob("*.py"))) > 14
    }
    assert not crowded
