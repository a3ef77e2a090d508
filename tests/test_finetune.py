"""`rpcompile train` on a tiny model made here: it learns, and what it saves can be loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rpcompile.cli import main
from rpcompile.compiled import Compiled
from rpcompile.errors import CheckpointError, InvalidArgument
from rpcompile.finetune import TrainOptions, train
from rpcompile.plan import Plan

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    vocabulary = {word: number for number, word in enumerate([*WORDS, "<unk>"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    LlamaForCausalLM(config).save_pretrained(path)
    (path / "text.txt").write_text(" ".join(WORDS * 30))
    return path


def test_training_from_yaml_and_flags(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model: {folder}\ntext: {folder / 'text.txt'}\nout: {tmp_path / 'out'}\n"
        "steps: 99\nbatch: 4\nseq: 9\nmicrobatches: 2\ngpus: 2\nlora: 0\nlr: 1e-2\n"
    )
    assert main(["train", str(config), "--steps", "12", "--json"]) == 0
    losses = json.loads(capsys.readouterr().out)["losses"]
    assert len(losses) == 12
    assert losses[-1] < losses[0] - 0.3
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    before = AutoModelForCausalLM.from_pretrained(folder)
    assert not torch.equal(trained.lm_head.weight, before.lm_head.weight)
    assert Plan.load(tmp_path / "out" / "plan.json").microbatches == 2


def test_lora_saves_an_adapter(folder: Path, tmp_path: Path) -> None:
    options = TrainOptions(
        str(folder), folder / "text.txt", tmp_path, steps=1, batch=2, seq=9, microbatches=2, gpus=2, lora=2
    )
    assert len(train(options, progress=False).losses) == 1
    assert (tmp_path / "adapter_config.json").exists()


def options_for(folder: Path, out: Path, **given: object) -> TrainOptions:
    base = {"batch": 2, "seq": 9, "microbatches": 2, "gpus": 2, "lora": 2, "steps": 5, "save_every": 2}
    return TrainOptions.of({"model": folder, "text": folder / "text.txt", "out": out, **base, **given})


class Killed(BaseException):
    """Nothing that catches errors catches it."""


def test_resumed_training_is_as_if_it_had_not_been_interrupted(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Interrupted in step 4, resumed from the checkpoint of step 2, on another number of GPUs."""
    whole = train(options_for(folder, tmp_path / "whole"), progress=False)
    forward_backward, calls = Compiled.forward_backward, []

    def die(self: Compiled, **batch: torch.Tensor) -> object:
        calls.append(1)
        if len(calls) == 4:
            raise Killed
        return forward_backward(self, **batch)

    with monkeypatch.context() as patch:
        patch.setattr(Compiled, "forward_backward", die)
        with pytest.raises(Killed):
            train(options_for(folder, tmp_path / "out"), progress=False)
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model: {folder}\ntext: {folder / 'text.txt'}\nout: {tmp_path / 'out'}\n"
        "batch: 2\nseq: 9\nmicrobatches: 2\ngpus: 1\nlora: 2\nsteps: 5\nsave_every: 2\n"
    )
    assert main(["train", str(config), "--resume", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["first_step"] == 2
    assert found["losses"] == list(whole.losses[2:])
    trained = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "out")]
    assert trained[0].keys() == trained[1].keys()
    assert all(torch.equal(value, trained[1][name]) for name, value in trained[0].items())


def test_resuming_another_run_or_none_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there is no checkpoint.*give the folder"):
        train(options_for(folder, tmp_path, resume=True), progress=False)
    train(options_for(folder, tmp_path, steps=1), progress=False)
    with pytest.raises(
        CheckpointError, match=r"was trained with lr 0\.0002, not 0\.01; resume with the same"
    ):
        train(options_for(folder, tmp_path, lr=0.01, resume=True), progress=False)
    with pytest.raises(InvalidArgument, match="the checkpoint is at step 1 of 1; give more steps"):
        train(options_for(folder, tmp_path, steps=1, resume=True), progress=False)


def test_text_shorter_than_a_row(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="has 270 tokens, fewer than one row of 512"):
        train(TrainOptions(str(folder), folder / "text.txt", tmp_path, seq=512))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"steps": "many"}, "steps is 'many'; it must be like 20"),
        ({"steps": 2.5}, "steps is 2.5"),
        ({"lr": "nan"}, "lr is nan"),
        ({"lr": -1}, "lr is -1.0"),
        ({"lora": -1}, "lora is -1"),
        ({"save_every": 0}, "save_every=0 must be at least 1"),
        ({"resume": "no"}, "resume is 'no'; it must be like False"),
        ({"batches": 3}, "training option 'batches' is unknown; did you mean 'batch'"),
    ],
)
def test_options_out_of_range(given: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        TrainOptions.of({"model": "m", "text": "t", **given})
