"""`doctor`: what is here, and what will not work."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import shutil
from typing import Any

from rpcompile.cli import options

_PACKAGES = (
    "rpcompile",
    "torch",
    "ortools",
    "transformers",
    "peft",
    "numba",
    "bokeh",
    "matplotlib",
    "msgspec",
)


def doctor(as_json: options.Json = False) -> None:
    """Say what this machine has (versions, GPUs, links, memory), and what will not work on it."""
    found = {"versions": _versions(), "host": _host(), "gpus": _gpus()}
    found["problems"] = _problems(found)
    lines = [f"{name:<13} {version or 'not installed'}" for name, version in found["versions"].items()]
    host = found["host"]
    lines.append(
        f"{'host':<13} {host['cores']} cores, {host['memory_bytes'] / 1e9:.0f} GB memory, "
        f"{host['free_disk_bytes'] / 1e9:.0f} GB free disk here"
    )
    for gpu in found["gpus"]:
        lines.append(
            f"{'gpu' + str(gpu['index']):<13} {gpu['name']}, {gpu['memory_bytes'] / 2**30:.0f} GiB, "
            f"catalogue name {gpu['catalogue'] or 'none: run rpcompile probe'}, "
            f"peer access to {gpu['peers'] or 'none'}"
        )
    lines += ["", "What will not work:" if found["problems"] else "Nothing is missing."]
    lines += [f"  - {problem}" for problem in found["problems"]]
    options.show("\n".join(lines), found, as_json)


COMMANDS = (doctor,)


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    if found["rpcompile"] is None:  # run from a source folder
        from rpcompile import __version__

        found["rpcompile"] = __version__
    return found


def _host() -> dict[str, Any]:
    import os

    from rpcompile.host_memory import installed_bytes

    return {
        "system": platform.platform(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": installed_bytes(),
        "free_disk_bytes": shutil.disk_usage(".").free,
    }


def _gpus() -> list[dict[str, Any]]:
    if importlib.util.find_spec("torch") is None:
        return []
    import torch

    from rpcompile import hardware

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [
        {
            "index": index,
            "name": torch.cuda.get_device_name(index),
            "memory_bytes": torch.cuda.get_device_properties(index).total_memory,
            "catalogue": hardware.detect(),
            "peers": [
                other
                for other in range(count)
                if other != index and torch.cuda.can_device_access_peer(index, other)
            ],
        }
        for index in range(count)
    ]


def _problems(found: dict[str, Any]) -> list[str]:
    versions, problems = found["versions"], list[str]()
    if not found["gpus"]:
        problems.append(
            "no CUDA device: programs run on virtual GPUs (CPU workers); planning is not affected"
        )
    if versions["transformers"] is None:
        problems.append("transformers is not installed: built-in and Hugging Face models need it")
    if versions["peft"] is None:
        problems.append("peft is not installed: --lora needs it")
    for name in ("torch", "ortools"):
        if versions[name] is None:
            problems.append(f"{name} is not installed: nothing can be planned")
    unknown = [gpu["name"] for gpu in found["gpus"] if gpu["catalogue"] is None]
    if unknown:
        problems.append(
            f"{unknown[0]} is not in the catalogue: run `rpcompile probe` and plan with --gpu FILE"
        )
    return problems
