"""The demo's command, on a tiny model and with plain PyTorch in place of the compiler."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

import rpcompile
from rpcompile.demo import __main__ as demo
from rpcompile.demo.data import Pair
from rpcompile.demo.packages import MissingPackage

if TYPE_CHECKING:
    from pathlib import Path


class LetterTokenizer:
    """One token a letter; no system message."""

    eos_token_id = 1
    pad_token_id = 2

    def apply_chat_template(self, chat: list[dict[str, str]], **_: object) -> str:
        return f"<{chat[1]['content']}>"

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}

    def decode(self, tokens: torch.Tensor, skip_special_tokens: bool) -> str:
        return "".join(chr(token) for token in tokens.tolist() if token > 31)


class PlainPlan:
    """Writes what it was asked to write."""

    def __str__(self) -> str:
        return "the plan"

    def save(self, path: Path) -> None:
        path.write_text("plan")

    def save_trace(self, path: Path) -> None:
        path.write_text("trace")


class PlainCompiled:
    """The interface of a compiled model over eager PyTorch; `interrupt_at` is the step that Ctrl-C hits."""

    def __init__(self, model: Any, interrupt_at: int | None, microbatches: int) -> None:
        self.model, self.interrupt_at, self.microbatches = model, interrupt_at, microbatches
        self.plan = PlainPlan()
        self.steps = 0

    def parameters(self) -> list[torch.nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def __call__(self, **batch: torch.Tensor) -> Any:
        return self.model(**batch)

    def forward_backward(self, **batch: torch.Tensor) -> torch.Tensor:
        if self.steps == self.interrupt_at:
            raise KeyboardInterrupt
        total = torch.zeros(())
        for index in range(self.microbatches):
            part = {name: tensor.chunk(self.microbatches)[index] for name, tensor in batch.items()}
            loss = self.model(**part).loss / self.microbatches
            loss.backward()
            total += loss.detach()
        return total

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        self.steps += 1
        optimizer.step()


class Stage:
    """What the stand-in for `rpcompile.compile` was given, and when Ctrl-C is to come."""

    def __init__(self) -> None:
        self.interrupt_at: int | None = None
        self.call: dict[str, Any] = {}

    def compile(self, model: Any, **options: Any) -> PlainCompiled:
        self.call = options
        return PlainCompiled(model, self.interrupt_at, options["microbatches"])


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    """A tiny Llama, ten pairs, and plain PyTorch behind `rpcompile.compile`."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("peft")
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    pairs = tuple(Pair(f"question {n}", f"answer {n}") for n in range(10))
    stage = Stage()
    monkeypatch.setattr(demo, "load_smollm2", lambda: (model, LetterTokenizer()))
    monkeypatch.setattr(demo, "read_pairs", lambda: pairs)
    monkeypatch.setattr(rpcompile, "compile", stage.compile, raising=False)
    return stage


def _losses(printed: str) -> list[float]:
    lines = [line for line in printed.splitlines() if line.startswith("Held-out loss")]
    return [float(line.partition(": ")[2].split()[0]) for line in lines]


def test_demo_trains_and_saves(stage: Stage, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "out"
    assert demo.main(["--steps", "8", "--lr", "1e-2", "--gpus", "3", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    before, after = _losses(printed)
    assert after < before
    assert "the plan" in printed
    assert "Expected: answer " in printed
    assert (out / "plan.json").read_text() == "plan"
    assert (out / "trace.json").read_text() == "trace"
    assert (out / "adapter" / "adapter_model.safetensors").stat().st_size > 0
    assert (stage.call["gpus"], stage.call["microbatches"]) == (3, 4)
    example = stage.call["example_inputs"]
    assert {name: tuple(tensor.shape) for name, tensor in example.items()} == {
        "input_ids": (8, 48),
        "labels": (8, 48),
    }


def test_interrupt_says_what_is_saved(
    stage: Stage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage.interrupt_at = 2
    assert demo.main(["--steps", "5", "--out", str(tmp_path)]) == 130
    assert (
        f"Stopped in step 3 of 5. The plan and the trace are in {tmp_path}; the adapter was not saved."
        in capsys.readouterr().err
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.json", "trace.json"]


def test_missing_package_is_one_line_and_status_1(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load() -> None:
        raise MissingPackage("the demo reads a file")

    monkeypatch.setattr(demo, "load_smollm2", load)
    assert demo.main(["--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "MissingPackage: the demo reads a file\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch-size", "6"], "--batch-size 6 is no multiple of --microbatches 4"),
        (["--steps", "0"], "--steps is 0; give 1 or more"),
        (["--gpus", "-1"], "--gpus is -1; give 1 or more"),
    ],
)
def test_bad_options(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        demo.main(options)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
