"""Documents that a model remembers, saved and loaded."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import mbpa_lm
from mbpa_lm.errors import ConfigError, DatastoreError
from tests.integrations.test_adapting import loss_of
from tests.integrations.tiny import load, tokens
from tests.integrations.words import WORDS, save_tokenizer

DOCUMENTS = [" ".join(WORDS[index] for index in (tokens(50, seed)[0] - 3).tolist()) for seed in range(4)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tokenizer of words, saved and loaded as a pretrained one is."""
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def loss_with(model: Any, memory: mbpa_lm.Memory, text: torch.Tensor) -> float:
    with mbpa_lm.adapt(model, memory, write="nothing"):
        return loss_of(model(text).logits, text)


def test_documents_are_remembered_saved_and_loaded(models: Path, tokenizer: Any, tmp_path: Path) -> None:
    model, text = load("llama", models), tokens(50, seed=2)
    plain = loss_of(model(text).logits, text)
    memory = mbpa_lm.Memory(model, tokenizer, neighbours=8)
    memory.add_documents(DOCUMENTS)
    assert len(memory) == 4 * 50  # each document ends with its end, which has no token after it
    memory.add_documents(DOCUMENTS)
    assert len(memory) == 4 * 50
    found = loss_with(model, memory, text)
    assert found < plain - 0.5
    memory.save(tmp_path / "saved")
    loaded = mbpa_lm.Memory.load(tmp_path / "saved", load("llama", models), tokenizer)
    assert len(loaded) == len(memory)
    assert loss_with(loaded.language_model.causal_lm, loaded, text) == pytest.approx(found, abs=1e-5)
    loaded.add_documents([tokens(30, seed=9)[0].tolist()])
    assert len(mbpa_lm.Memory.load(tmp_path / "saved", model, tokenizer)) == len(memory) + 29


def test_what_was_read_is_saved_with_the_documents(models: Path, tokenizer: Any, tmp_path: Path) -> None:
    model, text = load("gpt2", models), tokens(60, seed=5)
    memory = mbpa_lm.Memory(model, tokenizer, alpha=0.05, steps=3)
    with mbpa_lm.adapt(model, memory):
        model(text)
    assert len(memory) == 59
    expected = loss_with(model, memory, text)
    memory.save(tmp_path / "saved")
    assert len(memory) == 59
    assert loss_with(model, memory, text) == pytest.approx(expected, abs=1e-4)
    loaded = mbpa_lm.Memory.load(tmp_path / "saved", model, tokenizer)
    assert loss_with(model, loaded, text) == pytest.approx(expected, abs=1e-4)
    assert loss_with(model, mbpa_lm.Memory.load(tmp_path / "saved", model, tokenizer, steps=0), text) > expected + 0.1


def test_a_memory_of_another_model_or_tokenizer_is_refused(models: Path, tokenizer: Any, tmp_path: Path) -> None:
    model, other = load("llama", models), load("llama", models)
    memory = mbpa_lm.Memory(model, tokenizer)
    memory.add_documents(DOCUMENTS)
    memory.save(tmp_path / "saved")
    with torch.no_grad():
        other.lm_head.weight[50] += 1
    for refused, its_tokenizer, what in ((other, tokenizer, "model"), (model, None, "tokenizer")):
        with pytest.raises(DatastoreError, match=rf"was written with {what} \w+, this {what} is \w+; build another one"):
            mbpa_lm.Memory.load(tmp_path / "saved", refused, its_tokenizer)
    with pytest.raises(DatastoreError, match="keeps 96 likely words an entry; open it with likely_words=96"):
        mbpa_lm.Memory.load(tmp_path / "saved", model, tokenizer, likely_words=5)
    with pytest.raises(DatastoreError, match="is there already; name another folder"):
        mbpa_lm.Memory(model, tokenizer).save(tmp_path / "saved")
    (tmp_path / "saved" / "settings.json").write_text("[")
    with pytest.raises(DatastoreError, match=r"settings.json cannot be read"):
        mbpa_lm.Memory.load(tmp_path / "saved", model, tokenizer)


def test_text_needs_a_tokenizer(models: Path) -> None:
    memory = mbpa_lm.Memory(load("llama", models))
    with pytest.raises(ConfigError, match=r"the memory has no tokenizer: Memory\(model, tokenizer\)"):
        memory.add_documents(DOCUMENTS)
    memory.add_documents([])
    memory.add_documents([[5]])
    assert len(memory) == 0


def test_a_memory_that_cannot_be_written_leaves_nothing(models: Path, tokenizer: Any, tmp_path: Path) -> None:
    memory = mbpa_lm.Memory(load("llama", models), tokenizer)
    memory.add_documents(DOCUMENTS)
    (tmp_path / "file").write_text("")
    with pytest.raises(DatastoreError, match=r"could not be written: (Not a directory|File exists)"):
        memory.save(tmp_path / "file" / "saved")
    assert len(memory) == 4 * 50
