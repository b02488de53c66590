"""evaluate.py on models of transformers that were trained elsewhere."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import mbpa_lm
from mbpa_lm import commands
from mbpa_lm.memory_commands import memory as memory_command
from tests.integrations.tiny import ARCHITECTURES
from tests.integrations.words import save_tokenizer

Options = Callable[..., list[str]]


@pytest.fixture(scope="module")
def pretrained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Saves a model of an architecture with a tokenizer of the corpus's words."""
    words = sorted(set((corpus / "train.txt").read_text().split()))

    def make(architecture: str) -> Path:
        folder = tmp_path_factory.mktemp(architecture)
        V = save_tokenizer(folder, words)
        torch.manual_seed(0)
        special = {"vocab_size": V, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
        AutoModelForCausalLM.from_config(
            AutoConfig.for_model(architecture, **special, **ARCHITECTURES[architecture])
        ).save_pretrained(folder)
        return folder

    return make


def evaluate(options: Options, run: Path, folder: Path, experts: str, *more: str) -> dict[str, Any]:
    arguments = options(run, "--model.pretrained", str(folder), "--experts", experts, "--evaluation.max_tokens", "200", *more)
    assert commands.evaluate(arguments) == 0
    return dict(json.loads((run / "metrics.json").read_text())["experts"])


@pytest.mark.parametrize("architecture", ["gpt2", "mamba", "granite"])
def test_all_experts_run_on_a_pretrained_model(
    architecture: str, pretrained: Callable[[str], Path], options: Options, corpus: Path, tmp_path: Path
) -> None:
    folder = pretrained(architecture)
    every = "base,mbpa,persistent,mbpa+persistent,cache,knn,dynamic"
    count = 60 if architecture == "mamba" else 200  # a mamba's block is read again for every piece
    few = ("--persistent.statistics_tokens", "1000", "--dynamic.statistics_tokens", "1000")
    found = evaluate(options, tmp_path / "run", folder, every, *few, "--evaluation.max_tokens", str(count))
    assert set(found) >= {*every.replace("cache", "cache-100").split(","), "gate"}
    text = (corpus / "test.txt").read_text()
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids[:, : count + 1]
    with torch.no_grad():
        loss = AutoModelForCausalLM.from_pretrained(folder)(ids, labels=ids).loss.item()
    assert found["base"]["nats_per_token"] == pytest.approx(loss, abs=1e-4)
    assert found["gate"]["perplexity"] < found["base"]["perplexity"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_that_forgets_its_state_between_pieces_gives_the_same_in_any_chunks(
    dtype: str, pretrained: Callable[[str], Path], options: Options, tmp_path: Path
) -> None:
    folder, found = pretrained("mamba"), []
    for length in ("300", "16", "1"):
        more = ("--model.context_length", "64", "--model.context_overlap", "4", "--evaluation.chunk_length", length)
        scored = evaluate(options, tmp_path / length, folder, "base", "--model.dtype", dtype, *more)
        found.append(scored["base"]["nats_per_token"])
    assert found == pytest.approx([found[0]] * 3, abs=1e-6 if dtype == "float32" else 5e-3)


def test_a_model_that_sees_what_comes_after_is_refused_in_half_precision_too(
    pretrained: Callable[[str], Path], options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = pretrained("gpt2")
    torch.manual_seed(0)
    special = {"vocab_size": AutoConfig.from_pretrained(folder).vocab_size, "bos_token_id": 0, "eos_token_id": 1}
    special["pad_token_id"] = 2
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("bert-generation", **special, **sizes))
    model.to(torch.bfloat16).save_pretrained(folder)
    arguments = options(tmp_path / "run", "--model.pretrained", str(folder), "--experts", "base")
    assert commands.evaluate(arguments) == 8
    assert "BertGenerationDecoder sees the tokens after the one that it predicts" in capsys.readouterr().err


def test_a_folder_that_lacks_weights_is_refused(
    pretrained: Callable[[str], Path], options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = pretrained("gpt2")
    config = json.loads((folder / "config.json").read_text())
    for layers, code in ((config["n_layer"] + 1, 2), (config["n_layer"] - 1, 0)):
        (folder / "config.json").write_text(json.dumps({**config, "n_layer": layers}))
        arguments = ["--model.pretrained", str(folder), "--experts", "base", "--evaluation.max_tokens", "20"]
        assert commands.evaluate(options(tmp_path / "run", *arguments)) == code
        said = capsys.readouterr()
        assert ("its files lack 12 weights of its config.json" in said.err) == (code == 2)
        assert ("weights are not part of the model that config.json describes" in said.out) == (code == 0)


def test_a_soft_cap_is_for_all_but_persistent_adaptation(
    pretrained: Callable[[str], Path], options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = pretrained("gemma2")
    found = evaluate(options, tmp_path / "run", folder, "base,mbpa,cache,knn", "--model.dtype", "bfloat16")
    assert found["gate"]["perplexity"] < found["base"]["perplexity"]
    arguments = options(tmp_path / "other", "--model.pretrained", str(folder), "--experts", "base,persistent")
    assert commands.evaluate(arguments) == 2
    assert "needs logits without a soft cap" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model.pretrained", "nowhere/at/all"], "model.pretrained 'nowhere/at/all' could not be loaded"),
        (["--model.pretrained", "x", "--checkpoint", "y"], "--checkpoint and --model.pretrained name two models"),
    ],
)
def test_what_cannot_be_loaded_is_refused_in_one_line(
    more: list[str], message: str, options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert commands.evaluate(options(tmp_path / "run", *more)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_it_is_not_trained_here(options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.train(options(tmp_path / "run", "--model.pretrained", "x")) == 2
    assert "is evaluated, not trained here" in capsys.readouterr().err


def test_a_memory_of_documents_is_built_for_a_pretrained_model_and_loaded(
    pretrained: Callable[[str], Path], options: Options, corpus: Path, tmp_path: Path
) -> None:
    folder, output = pretrained("llama"), tmp_path / "memory"
    (tmp_path / "more.txt").write_text((corpus / "valid.txt").read_text())
    into = ("--output", str(output), "--text")
    named = ("--model", str(folder), *into, str(corpus / "test.txt"))  # short for --model.pretrained
    assert memory_command(["build", *options(tmp_path / "run", *named)]) == 0
    named = (f"--model={folder}", *into, str(tmp_path / "more.txt"))
    assert memory_command(["add", *options(tmp_path / "run", *named)]) == 0
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    memory = mbpa_lm.Memory.load(output, model, tokenizer)
    texts = [(corpus / f"{split}.txt").read_text() for split in ("test", "valid")]
    assert len(memory) == sum(len(tokenizer(text).input_ids) - 1 for text in texts)
    ids = tokenizer(texts[0], return_tensors="pt").input_ids[:, :200]
    with torch.no_grad(), mbpa_lm.adapt(model, memory, write="nothing"):
        with_memory = model(ids, labels=ids).loss
    assert with_memory < model(ids, labels=ids).loss - 0.3
    found = evaluate(options, tmp_path / "scored", folder, "base,mbpa,knn", "--memory.datastores", f"[{output}]")
    assert found["mbpa"]["perplexity"] < 0.8 * found["base"]["perplexity"]
