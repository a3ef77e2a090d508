"""One way through: `ir <- passes <- api` and `ir <- runtime`."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "rpcompile"
PASSES = ROOT / "passes"
HEAVY = {"ortools", "sympy", "networkx"}


def imported(source: str, package: str) -> set[str]:
    """Absolute names of everything that source code of a module in `package` imports, wherever it stands."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                parents = parents[: len(parents) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return names


def within(names: set[str], *banned: str) -> set[str]:
    """The names that are one of `banned` or inside it."""
    return {name for name in names for top in banned if name == top or name.startswith(f"{top}.")}


def _files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*.py")) if "__pycache__" not in path.parts]


def _offenders(files: list[Path], *banned: str) -> dict[str, set[str]]:
    """File -> what it must not import but does."""
    found: dict[str, set[str]] = {}
    for path in files:
        inside = path.relative_to(ROOT).with_suffix("").parts[:-1]
        package = ".".join(("rpcompile", *inside) if inside[0] == "passes" else inside)
        wrong = within(imported(path.read_text(encoding="utf-8"), package), *banned)
        if wrong:
            found[str(path.relative_to(ROOT))] = wrong
    return found


def _package_files() -> list[Path]:
    """Every module of rpcompile/, without the passes behind the symlink."""
    return [path for path in _files(PACKAGE) if path.relative_to(PACKAGE).parts[0] != "passes"]


@pytest.mark.parametrize(
    ("source", "package", "expected"),
    [
        ("import sympy.core", "rpcompile", {"sympy.core"}),
        ("from rpcompile import passes", "rpcompile", {"rpcompile", "rpcompile.passes"}),
        ("from . import api", "rpcompile", {"rpcompile", "rpcompile.api"}),
        ("from ..api import compile", "rpcompile.runtime", {"rpcompile.api", "rpcompile.api.compile"}),
        ("def f():\n    import ortools as o", "rpcompile.runtime", {"ortools"}),
    ],
)
def test_imported_resolves_every_form(source: str, package: str, expected: set[str]) -> None:
    assert imported(source, package) == expected


def test_within_does_not_match_on_a_prefix_of_a_name() -> None:
    assert within({"sympytools", "sympy", "sympy.core"}, "sympy") == {"sympy", "sympy.core"}


def test_runtime_imports_no_pass_and_no_solver() -> None:
    assert _offenders(_files(PACKAGE / "runtime"), "passes", "rpcompile.passes", *HEAVY) == {}


def test_passes_import_neither_api_nor_runtime() -> None:
    assert _files(PASSES)
    assert _offenders(_files(PASSES), "passes", "rpcompile.api", "rpcompile.runtime") == {}


def test_only_the_planner_the_api_and_what_lays_plans_out_again_import_passes() -> None:
    lines = {PACKAGE / f"{name}.py" for name in ("planner", "scheduling", "api", "variations", "policies")}
    others = [path for path in _package_files() if path not in lines]
    assert PACKAGE / "ir" / "__init__.py" in others
    assert _offenders(others, "passes", "rpcompile.passes") == {}


def test_importing_the_runtime_loads_no_pass_and_no_solver() -> None:
    # torch itself imports sympy, so that one is left to the test of the source above.
    program = (
        "import sys, rpcompile.runtime\n"
        "print(sorted(n for n in sys.modules if n.split('.')[0] == 'ortools' or "
        "n.startswith('rpcompile.passes')))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_a_plan_from_a_profile_loads_no_torch() -> None:
    program = (
        "import sys\n"
        "from rpcompile.cli import main\n"
        "given = ['--profile', 'benchmarks/profiles/qwen3-1.7b.json', '--gpus', '2', '--microbatches', '2']\n"
        "assert main(['plan', *given, '--effort', 'none', '--solver-time', '0.1', '--json']) == 0\n"
        "print(sorted({'torch', 'sympy', 'networkx', 'bokeh', 'matplotlib'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
