"""Perplexities as transformers and lm-evaluation-harness define them, with and without a memory."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import mbpa_lm
from mbpa_lm.errors import ConfigError
from tests.integrations.test_memory import DOCUMENTS
from tests.integrations.tiny import folder_of, load
from tests.integrations.words import save_tokenizer

lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")

TASK = """
task: local_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: byte_perplexity}}, {{metric: bits_per_byte}}]
"""


@pytest.fixture(scope="module")
def pretrained(models: Path) -> Path:
    """A model with a tokenizer, in one folder."""
    folder = folder_of("llama", models)
    save_tokenizer(folder)
    return folder


def guide_s_perplexity(model: Any, ids: torch.Tensor, size: int, stride: int) -> float:
    """The loop of the guide "Perplexity of fixed-length models", with the sum over all tokens instead of a mean of means."""
    nats, count, before = 0.0, 0, 0
    for begin in range(0, ids.shape[1], stride):
        end = min(begin + size, ids.shape[1])
        targets = ids[:, begin:end].clone()
        targets[:, : -(end - before)] = -100
        scored = int((targets[:, 1:] != -100).sum())
        with torch.no_grad():
            nats += float(model(ids[:, begin:end], labels=targets).loss) * scored
        count, before = count + scored, end
        if end == ids.shape[1]:
            break
    return float(torch.tensor(nats / count).exp())


@pytest.mark.parametrize(("size", "stride"), [(32, 8), (20, 20), (100, 50)])
def test_sliding_windows_are_those_of_the_guide(pretrained: Path, models: Path, size: int, stride: int) -> None:
    model, tokenizer = load("llama", models), AutoTokenizer.from_pretrained(pretrained)
    found = mbpa_lm.perplexity(model, tokenizer, DOCUMENTS[:1], window=size, stride=stride)
    ids = tokenizer(DOCUMENTS[0], return_tensors="pt").input_ids
    expected = guide_s_perplexity(model, ids, size, stride)
    assert found.per_token == pytest.approx(expected, rel=1e-5)
    assert found.tokens == ids.shape[1] - 1 - (0 if stride < size else len(range(stride, ids.shape[1], stride)))


def harness(task_folder: Path, model: str, arguments: str) -> dict[str, float]:
    from lm_eval.tasks import TaskManager

    import mbpa_lm.integrations.harness  # noqa: F401 - registers the model type

    tasks = TaskManager(include_path=str(task_folder), include_defaults=False)
    found = lm_eval.simple_evaluate(
        model=model, model_args=arguments, tasks=["local_text"], task_manager=tasks, device="cpu", bootstrap_iters=0
    )
    return {name.split(",")[0]: value for name, value in found["results"]["local_text"].items() if isinstance(value, float)}


def test_the_harness_finds_what_we_find(
    pretrained: Path, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    texts = [f"{document}\n{document}" for document in DOCUMENTS[:2]]
    (tmp_path / "texts.json").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "local.yaml").write_text(TASK.format(file=tmp_path / "texts.json"))
    model, tokenizer = load("llama", models), AutoTokenizer.from_pretrained(pretrained)
    memory = mbpa_lm.Memory(model, tokenizer)
    memory.add_documents(DOCUMENTS[1:])
    memory.save(tmp_path / "memory")
    plain = harness(tmp_path / "tasks", "hf", f"pretrained={pretrained},max_length=40")
    idle = harness(
        tmp_path / "tasks", "mbpa_lm", f"pretrained={pretrained},max_length=40,memory={tmp_path / 'memory'},alpha=0.0"
    )
    adapted = harness(tmp_path / "tasks", "mbpa_lm", f"pretrained={pretrained},max_length=40,memory={tmp_path / 'memory'}")
    assert idle == plain
    for expected, used, write in ((plain, None, "prompts"), (adapted, memory, "nothing")):
        found = mbpa_lm.perplexity(model, tokenizer, texts, window=40, memory=used, write=write)  # type: ignore[arg-type]
        assert found.per_word == pytest.approx(expected["word_perplexity"], rel=1e-4)
        assert found.per_byte == pytest.approx(expected["byte_perplexity"], rel=1e-4)
        assert found.bits_per_byte == pytest.approx(expected["bits_per_byte"], rel=1e-4)
    assert adapted["word_perplexity"] < 0.8 * plain["word_perplexity"]


@pytest.mark.parametrize("stride", [None, 10])
def test_texts_are_remembered_once_as_they_are_read(pretrained: Path, models: Path, stride: int | None) -> None:
    model, tokenizer = load("llama", models), AutoTokenizer.from_pretrained(pretrained)
    memory = mbpa_lm.Memory(model, tokenizer)
    twice = [DOCUMENTS[0], DOCUMENTS[0]]
    found = mbpa_lm.perplexity(model, tokenizer, twice, window=30, stride=stride, memory=memory)
    alone = mbpa_lm.perplexity(model, tokenizer, twice, window=30, stride=stride)
    assert found.tokens == alone.tokens == len(memory) == (100 if stride is None else 98)
    assert found.nats < alone.nats - 20
    first = mbpa_lm.perplexity(model, tokenizer, twice[:1], window=30, stride=stride, memory=mbpa_lm.Memory(model, tokenizer))
    assert first.nats == pytest.approx(alone.nats / 2, rel=0.1)  # of what it has not read it knows nothing


def test_impossible_windows_are_refused(pretrained: Path, models: Path) -> None:
    model, tokenizer = load("llama", models), AutoTokenizer.from_pretrained(pretrained)
    for window, stride in ((1, None), (10_000, None), (10, 11), (10, 0)):
        with pytest.raises(ConfigError, match=r"(window|stride) is .*; it must be a whole number from"):
            mbpa_lm.perplexity(model, tokenizer, DOCUMENTS, window=window, stride=stride)
