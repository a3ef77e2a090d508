"""The documentation is true: every block of code in README and docs runs, links and figures exist."""

from __future__ import annotations

import functools
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from rpcompile import errors, fit
from rpcompile.cli import main, planning
from tests.test_cli import profile

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
RUN = ("sh", "python")
CAPTURE = functools.cache(planning.capture)  # pages plan the same model again and again


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, code) of a page, in order."""
    return BLOCK.findall(page.read_text(encoding="utf-8"))


def with_blocks() -> list[Path]:
    return [page for page in PAGES if any(language in RUN for language, _ in blocks(page))]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What pages assume: plan.json of the tutorial, a measured profile, and the profiles of a clone."""
    import json

    folder = tmp_path_factory.mktemp("docs")
    (folder / "profile.json").write_text(json.dumps(profile()))
    shutil.copytree(ROOT / "benchmarks" / "profiles", folder / "benchmarks" / "profiles")
    flags = ["--profile", str(folder / "profile.json"), "--gpus", "2", "--solver-time", "0.2"]
    assert main(["plan", *flags, "--out", str(folder / "plan.json")]) == 0
    return folder


def readme_names() -> dict[str, Any]:
    """What the README's snippets take for granted: a model, a loader, and a model with other inputs."""

    class UNet(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.Sequential(*(torch.nn.Conv2d(2, 2, 3, padding=1) for _ in range(6)))

        def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            return (self.layers(x) - target).square().mean()

    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    tokens = torch.randint(32, (16, 16))
    images = torch.randn(8, 2, 4, 4)
    return {
        "model": transformers.LlamaForCausalLM(config),
        "loader": [{"input_ids": tokens, "labels": tokens}] * 2,
        "unet": UNet(),
        "images": images,
        "targets": images,
    }


def run_shell(line: str) -> None:
    """One line of a `sh` block: rpcompile here, make without doing it, pip not at all."""
    words = shlex.split(line, comments=True)
    may_fail = words[-2:] == ["||", "true"]
    words = words[: -2 if may_fail else None]
    if not words:
        return
    if words[0] == "rpcompile":
        status = main(words[1:])
        assert status == 0 or (may_fail and status == 1), line
    elif words[0] == "make":
        done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    else:
        pytest.fail(f"no test runs {line!r}; write a command of rpcompile or make")


@pytest.mark.parametrize("page", with_blocks(), ids=lambda page: page.stem)
def test_every_block_runs(page: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    monkeypatch.setattr(planning, "capture", CAPTURE)
    monkeypatch.setattr(
        fit, "next_size", lambda size: size + max(1, size // 4)
    )  # to a quarter, in fewer plans
    names: dict[str, Any] = {"__name__": f"docs_{page.stem}"}
    module = type(sys)(names["__name__"])
    monkeypatch.setitem(sys.modules, names["__name__"], module)
    names = vars(module)
    names.update(readme_names() if page.name == "README.md" else {})
    for language, code in blocks(page):
        if language == "python":
            exec(compile(code, f"{page.name}", "exec"), names)
        elif language == "sh":
            for line in code.replace("\\\n", " ").splitlines():
                run_shell(line)


def test_languages_are_known() -> None:
    for page in PAGES:
        assert {language for language, _ in blocks(page)} <= {*RUN, "json", "yaml"}, page.name


def test_files_that_pages_name_exist() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for name in re.findall(r"`((?:rpcompile|passes|benchmarks|docs|tests)/[\w/.]+)`", text):
            assert (ROOT / name).exists(), f"{page.name} names {name}"


def test_every_pass_is_on_the_tour() -> None:
    tour = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    passes = [path.name for path in (ROOT / "passes").glob("[a-z]*.py")]
    assert len(passes) > 20
    assert [name for name in passes if f"`passes/{name}`" not in tour] == []


def test_every_error_is_explained() -> None:
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    found = [name for name, error in vars(errors).items() if isinstance(error, type)]
    assert [name for name in found if name != "RpcompileError" and f"| `{name}` |" not in page] == []


def test_site_builds_strictly(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "dispatch" / "index.html").exists()


def test_figures_can_be_drawn_again(tmp_path: Path) -> None:
    copied = tmp_path / "docs" / "figures"
    copied.mkdir(parents=True)
    shutil.copy(ROOT / "docs" / "figures" / "draw.py", copied)
    shutil.copytree(ROOT / "benchmarks" / "profiles", tmp_path / "benchmarks" / "profiles")
    program = (copied / "draw.py").read_text().replace("solver_time_s=5.0", "solver_time_s=0.3")
    (copied / "draw.py").write_text(program)
    done = subprocess.run(
        [sys.executable, str(copied / "draw.py")],
        env={"PYTHONPATH": str(ROOT), "PATH": "", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for name in ("round_robin.svg", "gpipe.svg"):
        assert (ROOT / "docs" / "figures" / name).exists()
        assert "<svg" in (copied / name).read_text()
