"""What `pip install` gives: built as users get it, from a source distribution."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COPIED = ["LICENSE", "README.md", "pyproject.toml", "passes", "rpcompile"]


def _run(*command: str, cwd: Path) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def _copy_source(source: Path) -> None:
    source.mkdir()
    for name in COPIED:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(ROOT / name, source / name)


def _build(hook: str, source: Path, folder: Path) -> None:
    """Call one of setuptools' build hooks, as pip does."""
    program = f"import sys; from setuptools import build_meta; build_meta.{hook}(sys.argv[1])"
    _run(sys.executable, "-c", program, str(folder), cwd=source)


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names of the files in the wheel that a source distribution of this checkout builds."""
    folder = tmp_path_factory.mktemp("packaging")
    _copy_source(folder / "source")
    _build("build_sdist", folder / "source", folder)
    (sdist,) = folder.glob("*.tar.gz")
    options = ["--no-build-isolation", "--no-deps", "--no-index"]
    _run(sys.executable, "-m", "pip", "wheel", *options, "-w", str(folder), str(sdist), cwd=folder)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def _sources(folder: Path, pattern: str) -> set[str]:
    paths = folder.rglob(pattern)
    return {path.relative_to(folder).as_posix() for path in paths if "__pycache__" not in path.parts}


def test_wheel_has_every_module(wheel_names: set[str]) -> None:
    expected = {
        f"rpcompile/{name}"
        for name in _sources(ROOT / "rpcompile", "*.py")
        if not name.startswith("passes/")  # rglob follows the symlink before Python 3.13
    }
    expected |= {f"rpcompile/passes/{name}" for name in _sources(ROOT / "passes", "*.py")}
    assert {"rpcompile/__init__.py", "rpcompile/passes/__init__.py"} <= expected
    assert {name for name in wheel_names if name.endswith(".py")} == expected


def test_wheel_has_no_top_level_passes(wheel_names: set[str]) -> None:
    package, metadata = sorted({name.split("/")[0] for name in wheel_names})
    assert package == "rpcompile"
    assert metadata.startswith("rpcompile-")
    assert metadata.endswith(".dist-info")


def test_wheel_has_data_type_marker_and_licence(wheel_names: set[str]) -> None:
    data = {f"rpcompile/data/{name}" for name in _sources(ROOT / "rpcompile" / "data", "*.json")}
    assert data | {"rpcompile/py.typed"} <= wheel_names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in wheel_names)


def test_editable_install_has_no_top_level_passes(tmp_path: Path) -> None:
    _copy_source(tmp_path / "source")
    _build("build_editable", tmp_path / "source", tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".pth"))
        lines = archive.read(name).decode().splitlines()
    # A line with the source folder would put all of it on sys.path; setuptools' finder maps single packages.
    assert [line for line in lines if line.startswith("import __editable__")] == lines != []


def test_passes_is_a_relative_symlink() -> None:
    link = ROOT / "rpcompile" / "passes"
    assert os.readlink(link) == os.path.join("..", "passes")


def test_license_is_apache_2() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_plain_import_of_passes_is_banned(tmp_path: Path) -> None:
    source = tmp_path / "wrong.py"
    source.write_text("import passes\n\nprint(passes)\n")
    config = str(ROOT / "pyproject.toml")
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--config", config, str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "TID251" in done.stdout
    assert "import rpcompile.passes" in done.stdout
