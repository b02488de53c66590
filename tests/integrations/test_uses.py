"""The many ways in which a model of transformers is called, saved, changed and misused."""

import gc
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import mbpa_lm
from mbpa_lm.errors import ConfigError, DatastoreError, ModelError
from mbpa_lm.memory.datastore.store import Datastore
from mbpa_lm.models.fingerprint import model_fingerprint
from tests.integrations.test_adapting import TEXT, loss_of
from tests.integrations.test_memory import DOCUMENTS, loss_with
from tests.integrations.tiny import V, load, tokens
from tests.integrations.words import save_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def logits_and_entries(model: Any, call: Any) -> tuple[torch.Tensor, int]:
    memory = mbpa_lm.Memory(model)
    with mbpa_lm.adapt(model, memory):
        found = call()
    return found, len(memory)


@pytest.mark.parametrize("return_dict", [True, False])
@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_what_was_read_before_is_known_by_either_name(name: str, return_dict: bool, models: Path) -> None:
    model = load("llama", models)
    whole, entries = logits_and_entries(model, lambda: model(TEXT).logits)

    def step_by_step() -> torch.Tensor:
        first, cache = model(TEXT[:, :41], use_cache=True, return_dict=False)[:2]
        logits = [first]
        for place in range(41, TEXT.shape[1]):
            output = model(TEXT[:, place : place + 1], use_cache=True, return_dict=return_dict, **{name: cache})
            logits.append(output.logits if return_dict else output[0])
        return torch.cat(logits, dim=1)

    found, found_entries = logits_and_entries(model, step_by_step)
    assert found_entries == entries == TEXT.shape[1] - 1
    torch.testing.assert_close(found, whole, atol=1e-4, rtol=0)


def test_arguments_may_be_given_by_their_places(models: Path) -> None:
    model = load("llama", models)
    padded, mask = torch.cat([torch.full((1, 10), 2), TEXT], dim=1), torch.ones(1, 90, dtype=torch.int64)
    mask[:, :10] = 0
    named, entries = logits_and_entries(model, lambda: model(input_ids=padded, attention_mask=mask).logits)
    placed, placed_entries = logits_and_entries(model, lambda: model(padded, mask).logits)
    assert entries == placed_entries == TEXT.shape[1] - 1
    assert torch.equal(named, placed)


def test_texts_that_are_read_in_turns_are_kept_apart(models: Path) -> None:
    model = load("llama", models)
    one, other = torch.arange(10, 20)[None], torch.arange(50, 60)[None]
    memory = mbpa_lm.Memory(model)
    with mbpa_lm.adapt(model, memory):
        caches = [model(text[:, :5], use_cache=True).cache for text in (one, other)]
        for text, cache in zip((one, other), caches, strict=True):
            model(text[:, 5:], cache=cache)
    assert sorted(memory.window(0).entries().values.tolist()) == [*range(11, 20), *range(51, 60)]


def test_documents_do_not_depend_on_one_another(models: Path, tokenizer: Any) -> None:
    model = load("gpt2", models)
    together, alone = mbpa_lm.Memory(model, tokenizer), mbpa_lm.Memory(model, tokenizer)
    together.add_documents(DOCUMENTS)
    for document in DOCUMENTS:
        alone.add_documents([document])
    assert len(together) == len(alone)
    for seed in range(len(DOCUMENTS)):
        text = tokens(50, seed)
        assert loss_with(model, together, text) == pytest.approx(loss_with(model, alone, text), abs=1e-4)
        assert loss_with(model, together, text) < loss_of(model(text).logits, text) - 0.5


def test_what_changes_nothing_does_not_make_another_model(models: Path) -> None:
    model = load("llama", models)
    expected = model_fingerprint(model)
    model.config.pad_token_id, model.config.use_cache, model.config.id2label = 1, False, {0: "no", 1: "yes"}
    model.config.output_hidden_states = True
    assert model_fingerprint(model) == model_fingerprint(torch.compile(model)) == expected
    model.config.num_attention_heads = 1
    assert model_fingerprint(model) != expected


def test_a_tokenizer_that_has_padded_is_the_same(models: Path, tokenizer: Any, tmp_path: Path) -> None:
    model = load("llama", models)
    memory = mbpa_lm.Memory(model, tokenizer)
    memory.add_documents(DOCUMENTS)
    memory.save(tmp_path / "saved")
    tokenizer(["w5", "w5 w6"], padding=True, truncation=True, max_length=5)
    assert len(mbpa_lm.Memory.load(tmp_path / "saved", model, tokenizer)) == len(memory)


def test_generate_inside_generate_is_refused(models: Path) -> None:
    model = load("llama", models)
    with mbpa_lm.adapt(model, mbpa_lm.Memory(model)), pytest.raises(ModelError, match="generate was called inside generate"):
        model.generate(TEXT, max_new_tokens=5, do_sample=False, assistant_model=model)


def test_a_model_without_a_cache_is_read_and_not_remembered() -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("openai-gpt", vocab_size=V, n_embd=32, n_layer=1, n_head=2))
    memory = mbpa_lm.Memory(model.eval())
    with pytest.raises(ModelError, match="OpenAIGPTLMHeadModel takes no cache"), mbpa_lm.adapt(model, memory):
        pass
    with mbpa_lm.adapt(model, memory, write="nothing"):
        model(TEXT)


def test_autocast(models: Path) -> None:
    model = load("llama", models)
    with torch.autocast("cpu", torch.bfloat16):
        plain = model(TEXT).logits
        found, entries = logits_and_entries(model, lambda: model(TEXT).logits)
    assert entries == TEXT.shape[1] - 1
    assert loss_of(found.float(), TEXT) < loss_of(plain.float(), TEXT) - 0.1


def test_a_memory_outlives_inference_mode(models: Path) -> None:
    model = load("llama", models)
    memory = mbpa_lm.Memory(model)
    with torch.inference_mode(), mbpa_lm.adapt(model, memory):
        model(TEXT)
    with torch.no_grad(), mbpa_lm.adapt(model, memory):
        model(TEXT)
    assert len(memory) == 2 * (TEXT.shape[1] - 1)


def test_a_model_in_training_stays_so_and_is_remembered_without_dropout(models: Path, tokenizer: Any) -> None:
    model = load("gpt2", models).train()
    memory, expected = mbpa_lm.Memory(model, tokenizer), mbpa_lm.Memory(load("gpt2", models), tokenizer)
    assert all(module.training for module in model.modules())
    for each in (memory, expected):
        each.add_documents(DOCUMENTS)
    assert model.training
    text = tokens(50, seed=1)
    assert loss_with(model.eval(), memory, text) == pytest.approx(
        loss_with(expected.language_model.causal_lm, expected, text), abs=1e-4
    )


def test_ids_that_the_model_does_not_know_leave_the_memory_as_it_was(models: Path) -> None:
    memory = mbpa_lm.Memory(load("llama", models))
    memory.add_documents([[5, 6, 7]])
    with pytest.raises(ConfigError, match=f"the documents hold token {V}, but the model knows {V}; take the model's own"):
        memory.add_documents([[5, V, 6]])
    memory.add_documents([[8, 9, 10]])
    assert len(memory) == 4


def test_settings_are_saved_whole_or_refused(models: Path, tmp_path: Path) -> None:
    model = load("llama", models)
    memory = mbpa_lm.Memory(model, rows="own", alpha=np.float32(0.01))  # type: ignore[arg-type]
    memory.add_documents([[5, 6, 7]])
    memory.save(tmp_path / "m")
    loaded = mbpa_lm.Memory.load(tmp_path / "m", model)
    assert (loaded.rows, loaded.expert._rule.alpha) == ("own", pytest.approx(0.01))
    assert mbpa_lm.Memory.load(tmp_path / "m", model, rows="shared").rows == "shared"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kernel": "gausian"}, r"kernel is 'gausian'; it must be one of \w+"),
        ({"index": "foo"}, "index is 'foo'; it must be one of auto, flat"),
        ({"steps": 1.5}, "steps is 1.5; it must be of type int"),
        ({"alpha": "x"}, "alpha is 'x'; it must be of type"),
    ],
)
def test_settings_that_no_parser_has_seen_are_checked(settings: dict[str, Any], message: str, models: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        mbpa_lm.Memory(load("llama", models), **settings)


def test_misuse_is_named(models: Path, tokenizer: Any) -> None:
    model = load("llama", models)
    memory = mbpa_lm.Memory(model, tokenizer)
    with pytest.raises(ConfigError, match=r"takes a list of texts: .* add_documents\(\[text\]\)"):
        memory.add_documents("w5 w6 w7")
    documents: list[tuple[Any, str]] = [
        ([None], "a document is a NoneType, but must be text, or a list of token ids"),
        (None, "add_documents takes a list of texts, and this is a NoneType"),
        ({"a": "w5 w6"}, "add_documents takes a list of texts, and this is a dict"),
        ([[1, 2**70]], "a document is a list, but must be text, or a list of token ids"),
        ([[1.5, 2.5]], "a document is a list, but must be text, or a list of token ids"),
        (["w5 \ud800"], "a text holds half a character"),
    ]
    for given, message in documents:
        with pytest.raises(ConfigError, match=message):
            memory.add_documents(given)
    assert len(memory) == 0
    with pytest.raises(DatastoreError, match="a memory is saved into a folder, and None names none"):
        memory.save(None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"there is no room for size=1,000,000,000,000 entries"):
        mbpa_lm.Memory(model, tokenizer, size=10**12).window(0)
    windows: list[tuple[dict[str, Any], str]] = [
        ({"window": 1}, "window is 1; it must be a whole number from 2"),
        ({"stride": 0}, "stride is 0; it must be a whole number from 1"),
    ]
    for wrong, message in windows:
        with pytest.raises(ConfigError, match=message):
            mbpa_lm.perplexity(model, tokenizer, ["w5 w6 w7"], **wrong)
    with pytest.raises(ConfigError, match="a text is a int; give it as str"):
        mbpa_lm.perplexity(model, tokenizer, [5])  # type: ignore[list-item]
    with pytest.raises(ConfigError, match="perplexity needs the model's tokenizer"):
        mbpa_lm.perplexity(model, None, ["w5 w6 w7"])
    with pytest.raises(ConfigError, match="perplexity takes a list of texts"):
        mbpa_lm.perplexity(model, tokenizer, "w5 w6 w7")
    with pytest.raises(ConfigError, match="hold no token that could be scored"):
        mbpa_lm.perplexity(model, tokenizer, [""])
    with pytest.raises(ModelError, match=r"this is a str; load one with AutoModelForCausalLM"):
        mbpa_lm.Memory("gpt2")
    with pytest.raises(ConfigError, match="the tokenizer is a str; load one with AutoTokenizer"):
        mbpa_lm.Memory(model, "gpt2")
    with pytest.raises(ConfigError, match="the memory is a str; make one with"), mbpa_lm.adapt(model, "m"):  # type: ignore[arg-type]
        pass
    with mbpa_lm.adapt(model, memory), pytest.raises(ModelError, match="is adapted now; make its memory before the with block"):
        mbpa_lm.Memory(model)


def test_a_model_whose_weights_have_changed_is_not_adapted(models: Path, tokenizer: Any, tmp_path: Path) -> None:
    model = load("llama", models)
    memory = mbpa_lm.Memory(model, tokenizer)
    memory.add_documents(["w5 w6 w7 w8"])
    with mbpa_lm.adapt(model, memory), pytest.raises(ConfigError, match="call perplexity outside of the with block"):
        mbpa_lm.perplexity(model, tokenizer, ["w5 w6 w7"])
    memory.save(tmp_path / "memory")
    settings = tmp_path / "memory" / "settings.json"
    settings.write_text("{}")
    with pytest.raises(DatastoreError, match=r"settings.json cannot be read: its content is not what was written"):
        mbpa_lm.Memory.load(tmp_path / "memory", model, tokenizer)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    with pytest.raises(ModelError, match="weights of this LlamaForCausalLM have changed"), mbpa_lm.adapt(model, memory):
        pass


def test_the_router_s_loss_stays_in_the_loss() -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "mixtral", vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2, output_router_logits=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        plain = model(TEXT, labels=TEXT).loss
        with mbpa_lm.adapt(model, mbpa_lm.Memory(model, steps=0)):
            assert float(model(TEXT, labels=TEXT).loss) == pytest.approx(float(plain), abs=1e-6)


def test_files_are_closed(models: Path, tokenizer: Any) -> None:
    memory = mbpa_lm.Memory(load("llama", models), tokenizer)
    memory.add_documents(["w5 w6 w7"])
    gc.collect()
    gc.disable()
    try:
        before = len(os.listdir("/proc/self/fd"))
        for number in range(10):
            memory.add_documents([f"w{number + 5} w6 w7 w8"])
        assert len(os.listdir("/proc/self/fd")) <= before + 2
    finally:
        gc.enable()


def test_a_memory_in_use_elsewhere_is_not_written(models: Path, tokenizer: Any, tmp_path: Path) -> None:
    model = load("llama", models)
    memory = mbpa_lm.Memory(model, tokenizer)
    memory.add_documents(DOCUMENTS)
    memory.save(tmp_path / "m")
    with Datastore.open(tmp_path / "m", memory.identity, writable=True), pytest.raises(DatastoreError):
        memory.add_documents(["w5 w6"])
    memory.add_documents(["w5 w6"])
