"""The repository keeps its own rules: imports point down, start-up loads little, files stay short."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from byre.catalog import CATALOG

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "byre"
SOURCES = sorted(PACKAGE.rglob("*.py"))

# Higher numbers are further up; a module imports from its own level or from below (docs/design.md, section 2).
LEVELS = {
    "errors": 0, "units": 0, "options": 0, "catalog": 0, "typing": 0, "__init__": 0,
    "io": 1, "bitmaps": 1, "crypto": 1, "nbd": 1,
    "graph": 2,
    "formats": 3, "filters": 3, "protocols": 3,
    "image": 4, "opening": 4,
    "jobs": 5, "profiles": 5,
    "exports": 6,
    "monitor": 7,
    "cli": 8, "__main__": 8,
}  # fmt: skip
DRIVERS = {row.module for row in CATALOG}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def level(module: str) -> int:
    """:raises KeyError: a folder that the design does not name"""
    parts = module.split(".")
    return LEVELS[parts[1] if len(parts) > 1 else "__init__"]


def driver_of(module: str) -> str:
    """The catalog's driver that a module is, or is part of; "" if it is shared."""
    return next((driver for driver in DRIVERS if (module + ".").startswith(driver + ".")), "")


def runtime_imports(path: Path) -> list[tuple[int, str]]:
    """(line, absolute module) of every byre import that is executed, at module level or inside a function."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            node.body = []
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                below = f"{module}.{alias.name}"
                is_module = (PACKAGE.parent / below.replace(".", "/")).with_suffix(".py").exists()
                is_package = (PACKAGE.parent / below.replace(".", "/") / "__init__.py").exists()
                found.append((node.lineno, below if is_module or is_package else module))
    return [(line, name) for line, name in found if name.split(".")[0] == "byre"]


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_point_down(path: Path) -> None:
    here = module_name(path)
    upward = [f"line {line}: {name}" for line, name in runtime_imports(path) if level(name) > level(here)]
    assert not upward, f"{here} imports from above: {upward}"


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_a_driver_does_not_import_another(path: Path) -> None:
    here = module_name(path)
    if not here.startswith(("byre.formats", "byre.filters", "byre.protocols")):
        return
    own = driver_of(here)
    others = [f"line {line}: {name}" for line, name in runtime_imports(path) if driver_of(name) not in ("", own)]
    assert not others, f"{here} imports other drivers: {others}"


def test_the_catalog_imports_no_driver() -> None:
    assert all(level(name) == 0 for _, name in runtime_imports(PACKAGE / "catalog.py"))


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_modules_say_what_they_are_for(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text())), f"{path} has no docstring"


def _is_constant(node: ast.expr | None) -> bool:
    """Whether a module-level value cannot change: no list, set or dict that a function could fill."""
    return not isinstance(node, (ast.List, ast.Set, ast.ListComp, ast.SetComp)) and not (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("list", "dict", "set", "defaultdict", "deque", "Lock", "RLock", "Condition")
    )


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_no_mutable_state_at_module_level(path: Path) -> None:
    """A dict display is a table; nobody may assign into it. ``global`` is not used at all."""
    tree = ast.parse(path.read_text())
    tables: set[str] = set()
    for node in tree.body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [target.id for target in targets if isinstance(target, ast.Name)]
            if names != ["__all__"]:
                assert _is_constant(node.value), f"line {node.lineno}: {names} can be changed"
            tables.update(names)
    for function in (n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))):
        local = {n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        local |= {argument.arg for argument in ast.walk(function) if isinstance(argument, ast.arg)}
        for node in ast.walk(function):
            assert not isinstance(node, ast.Global), f"line {node.lineno}: global"
            if isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load):
                base = node.value
                if isinstance(base, ast.Name) and base.id in tables - local:
                    pytest.fail(f"line {node.lineno}: {base.id} is changed at run time")


def loaded_modules(*arguments: str, folder: Path) -> set[str]:
    """The modules that a run of byre loads and a bare interpreter does not."""

    def run(code: str) -> set[str]:
        report = folder / "modules.txt"
        code += f"; open({str(report)!r}, 'w').write(chr(10).join(sys.modules)); os._exit(result)"
        environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
        command = [sys.executable, "-c", f"import os, sys; {code}", *arguments]
        subprocess.run(command, stdout=subprocess.DEVNULL, cwd=folder, env=environment, check=True)
        return set(report.read_text().split())

    return run("from byre.cli.main import main; result = main(sys.argv[1:])") - run("result = 0")


# What start-up may load. A name with a dot at its end allows all modules below it.
STANDARD = {
    "__future__", "_collections", "_contextvars", "_functools", "_operator", "_struct", "_weakref", "_weakrefset",
    "array",
    "collections", "collections.abc", "contextvars", "errno", "fcntl", "functools", "itertools", "keyword", "operator",
    "reprlib", "stat", "struct", "threading", "time", "types", "warnings", "weakref",
}  # fmt: skip
WORDS = {
    "byre", "byre.catalog", "byre.errors", "byre.options", "byre.typing", "byre.units",
    "byre.cli", "byre.cli.common", "byre.cli.main",
}  # fmt: skip
HELP = {*STANDARD, *WORDS, "byre.cli.refusals"}
GRAPH = {
    "byre.graph", "byre.graph.child", "byre.graph.graph", "byre.graph.node", "byre.graph.opening",
    "byre.graph.chain", "byre.io", "byre.io.extent", "byre.io.buffers", "byre.protocols", "byre.protocols.",
}  # fmt: skip
RECORDS = {
    "byre.formats", "byre.formats.abilities", "byre.formats.raw", "byre.formats.qcow2",
    "byre.formats.qcow2.directories", "byre.formats.qcow2.entries", "byre.formats.qcow2.extensions",
    "byre.formats.qcow2.layout",
}  # fmt: skip
CREATE = {
    *STANDARD, *WORDS, *GRAPH, *RECORDS, "byre.cli.create", "byre.graph.creating", "byre.formats.qcow2.creation",
}  # fmt: skip
INFO = {
    *STANDARD, *WORDS, *GRAPH, *RECORDS, "byre.cli.info", "byre.cli.output", "byre.image", "byre.opening",
    "byre.io.engine", "byre.io.inflight", "byre.io.tables", "byre.formats.base", "byre.formats.qcow2.image",
    "byre.formats.qcow2.lookup", "byre.formats.qcow2.mapping", "byre.formats.qcow2.opening",
    "byre.formats.qcow2.refcounts", "byre.formats.qcow2.unmapping",
    "byre.formats.qcow2.amend_ability", "byre.formats.qcow2.bitmap_ability", "byre.formats.qcow2.snapshot_ability",
    "byre.io.sectors", "byre.io.cached",
}  # fmt: skip


def surplus(loaded: set[str], allowed: set[str]) -> list[str]:
    below = tuple(name for name in allowed if name.endswith("."))
    return sorted(name for name in loaded if name not in allowed and not name.startswith(below))


@pytest.fixture(params=["raw", "qcow2"])
def image(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    loaded_modules("create", "-q", "-f", request.param, str(path), "64M", folder=tmp_path)
    assert path.exists()
    return path


def test_the_installed_script_loads_nothing_else() -> None:
    script = ROOT / "scripts" / "byre"
    assert os.access(script, os.X_OK)
    assert script.read_text().startswith("#!python\n")  # installers put their interpreter here
    imported = [line for line in script.read_text().splitlines() if "import " in line and not line.startswith("#")]
    assert imported == ["import sys", "from byre.cli.main import entry"]
    assert '"scripts/byre" = "byre"' in (ROOT / "pyproject.toml").read_text()


class TestStartUp:
    """Start-up is 60 ms and three times a bare interpreter; each module costs a part of that, numpy all of it."""

    def test_help(self, tmp_path: Path) -> None:
        assert surplus(loaded_modules("--help", folder=tmp_path), HELP) == []

    def test_info(self, image: Path) -> None:
        assert surplus(loaded_modules("info", str(image), folder=image.parent), INFO) == []

    @pytest.mark.parametrize("format", ["raw", "qcow2"])
    def test_create(self, tmp_path: Path, format: str) -> None:
        loaded = loaded_modules("create", "-q", "-f", format, "new.img", "1G", folder=tmp_path)
        assert surplus(loaded, CREATE) == []
