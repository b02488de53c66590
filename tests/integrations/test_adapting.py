"""A memory on models of transformers: what they read is remembered, logits are adapted, afterwards all is as before."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import AutoConfig, AutoModelForCausalLM, StaticCache

import mbpa_lm
from mbpa_lm.errors import ConfigError, ModelError
from tests.integrations.tiny import ARCHITECTURES, LIKE_LLAMA, V, load, tokens

TEXT = tokens(40).repeat(1, 2)


def read_by_steps(model: Any, text: torch.Tensor, sizes: tuple[int, ...] = ()) -> torch.Tensor:
    """Return the logits of a text that is read piece by piece with a cache; token by token after the given sizes."""
    parts, cache, begin = [], None, 0
    for size in (*sizes, *[1] * (text.shape[1] - sum(sizes))):
        kept = {} if cache is None else {"cache": cache}
        output = model(text[:, begin : begin + size], use_cache=True, **kept)
        cache, begin = output.cache, begin + size
        parts.append(output.logits)
    return torch.cat(parts, dim=1)


def loss_of(logits: torch.Tensor, text: torch.Tensor) -> float:
    return torch.nn.functional.cross_entropy(logits[0, :-1], text[0, 1:]).item()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_step_is_the_plain_model_to_the_bit(architecture: str, models: Path) -> None:
    model = load(architecture, models)
    plain = model(TEXT).logits
    for idle in ({"alpha": 0.0}, {"steps": 0}):
        with mbpa_lm.adapt(model, mbpa_lm.Memory(model, **idle)):
            assert torch.equal(model(TEXT).logits, plain)
            assert torch.equal(model(TEXT).logits, plain)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_text_read_step_by_step_is_the_text_read_at_once(architecture: str, models: Path) -> None:
    model = load(architecture, models)
    whole_memory, step_memory = mbpa_lm.Memory(model), mbpa_lm.Memory(model)
    plain = model(TEXT).logits
    with mbpa_lm.adapt(model, whole_memory):
        whole = model(TEXT).logits
    with mbpa_lm.adapt(model, step_memory):
        steps = read_by_steps(model, TEXT, (7,) if architecture == "mamba" else (7, 1, 13))  # its own pieces differ
    torch.testing.assert_close(steps, whole, atol=1e-4, rtol=0)
    assert len(whole_memory) == len(step_memory) == TEXT.shape[1] - 1
    assert loss_of(whole, TEXT) < loss_of(plain, TEXT) - 0.05  # the second half repeats the first
    assert torch.equal(model(TEXT).logits, plain)


@pytest.mark.parametrize("architecture", ["gpt2", "mamba"])
def test_no_prediction_sees_what_follows(architecture: str, models: Path) -> None:
    model, other = load(architecture, models), TEXT.clone()
    other[0, 60:] = tokens(20, seed=9)[0]
    found = []
    for text in (TEXT, other):
        with mbpa_lm.adapt(model, mbpa_lm.Memory(model)):
            found.append(model(text).logits[:, :60])
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=0)
    assert not torch.equal(found[0], model(TEXT).logits[:, :60])


def test_what_was_read_is_of_use_to_the_next_text(models: Path) -> None:
    model, memory = load("llama", models), mbpa_lm.Memory(load("llama", models))
    memory = mbpa_lm.Memory(model)
    with mbpa_lm.adapt(model, memory):
        first, second = (loss_of(model(tokens(40)).logits, tokens(40)) for _ in range(2))
    assert second < first - 0.5
    with mbpa_lm.adapt(model, memory, write="nothing"):
        entries = len(memory)
        third = loss_of(model(tokens(40)).logits, tokens(40))
    assert len(memory) == entries
    assert third < first - 0.5


def test_rows_of_their_own_and_padding(models: Path) -> None:
    model = load("llama", models)
    texts = [tokens(30).repeat(1, 2), tokens(20, seed=1).repeat(1, 2)]
    batch = torch.full((2, 60), 2)
    batch[0], batch[1, 20:] = texts[0], texts[1]
    mask = torch.ones_like(batch)
    mask[1, :20] = 0
    memory = mbpa_lm.Memory(model, rows="own")
    with mbpa_lm.adapt(model, memory):
        found = model(batch, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    assert len(memory) == 59 + 39
    plain = model(batch, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    assert torch.equal(found[1, :20], plain[1, :20])
    for row, text in enumerate(texts):
        with mbpa_lm.adapt(model, mbpa_lm.Memory(model)):
            alone = model(text).logits[0]
        torch.testing.assert_close(found[row, -text.shape[1] :], alone, atol=1e-4, rtol=0)


def test_rows_that_share_a_memory_are_read_one_after_another(models: Path) -> None:
    model = load("llama", models)
    batch = tokens(40).repeat(2, 1)
    with mbpa_lm.adapt(model, mbpa_lm.Memory(model)):
        found = model(batch).logits
    assert loss_of(found[1:], batch[1:]) < loss_of(found[:1], batch[:1]) - 0.5


def test_the_loss_is_that_of_the_adapted_logits(models: Path) -> None:
    model = load("gpt2", models)
    for as_dictionary in (True, False):
        with mbpa_lm.adapt(model, mbpa_lm.Memory(model)):
            output = model(TEXT, labels=TEXT, return_dict=as_dictionary)
        torch.testing.assert_close(float(output[0]), loss_of(output[1], TEXT), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kept", [1, 5, 40, torch.tensor([3, 70, 20])])
def test_some_logits_are_those_of_all(kept: int | torch.Tensor, models: Path) -> None:
    model = load("gemma2", models)
    with mbpa_lm.adapt(model, mbpa_lm.Memory(model)):
        whole = model(TEXT).logits
    memory = mbpa_lm.Memory(model)
    with mbpa_lm.adapt(model, memory):
        some = model(TEXT, logits_to_keep=kept).logits
    places = slice(-kept, None) if isinstance(kept, int) else kept
    torch.testing.assert_close(some, whole[:, places], atol=1e-4, rtol=0)
    assert len(memory) == TEXT.shape[1] - 1


@pytest.mark.parametrize("architecture", ["gpt2", "mamba", "gemma2"])
@pytest.mark.parametrize(("write", "entries"), [("nothing", 0), ("prompts", 39), ("everything", 39 + 11)])
def test_generation_remembers_what_it_is_told_to(architecture: str, write: Any, entries: int, models: Path) -> None:
    model, memory = load(architecture, models), mbpa_lm.Memory(load(architecture, models))
    memory = mbpa_lm.Memory(model)
    with mbpa_lm.adapt(model, memory, write=write):
        found = model.generate(tokens(40), max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert found.shape[1] == 52
    assert len(memory) == entries
    assert type(model).generate is model.generate.__func__


def test_generation_predicts_what_reading_does(models: Path) -> None:
    model, memory = load("llama", models), None
    memory = mbpa_lm.Memory(model)
    settings = {
        "max_new_tokens": 12,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
        "eos_token_id": None,
    }
    with mbpa_lm.adapt(model, memory, write="everything"):
        generated = model.generate(TEXT, **settings)
    with mbpa_lm.adapt(model, mbpa_lm.Memory(model)):
        read = model(generated.sequences).logits[0, TEXT.shape[1] - 1 : -1]
    torch.testing.assert_close(torch.cat(generated.logits), read, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "settings", [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}, {"prompt_lookup_num_tokens": 3}]
)
@pytest.mark.parametrize("rows", ["shared", "own"])
def test_prompts_are_remembered_once_however_they_are_continued(settings: dict[str, Any], rows: Any, models: Path) -> None:
    model, memory = load("llama", models), None
    memory = mbpa_lm.Memory(model, rows=rows)
    with mbpa_lm.adapt(model, memory):
        model.generate(TEXT, max_new_tokens=6, do_sample=False, eos_token_id=None, **settings)
    assert len(memory) == 79 * (settings.get("num_beams", 1) if rows == "own" else 1)


def test_assisted_decoding_generates_what_greedy_decoding_does(models: Path) -> None:
    model, found = load("llama", models), []
    for more in ({}, {"prompt_lookup_num_tokens": 4}, {"assistant_model": load("llama", models)}):
        with mbpa_lm.adapt(model, mbpa_lm.Memory(model)):
            found.append(model.generate(TEXT, max_new_tokens=10, do_sample=False, eos_token_id=None, **more).tolist())
    assert found[1] == found[0]
    assert found[2] == found[0]


def test_generated_text_ends_with_its_end(models: Path) -> None:
    model = load("llama", models)
    memory, prompts = mbpa_lm.Memory(model, rows="own"), torch.cat([tokens(10), tokens(10, seed=3)])
    with mbpa_lm.adapt(model, memory, write="everything"):
        plain = model.generate(prompts, max_new_tokens=8, do_sample=False, eos_token_id=None)
    memory.forget()
    ends = int(plain[0, 12])
    with mbpa_lm.adapt(model, memory, write="everything"):
        found = model.generate(prompts, max_new_tokens=8, do_sample=False, eos_token_id=ends, pad_token_id=2)
    lengths = [(row[10:] == ends).nonzero()[:1].flatten().tolist() for row in found]
    expected = sum(9 + min([*place, 7]) + (1 if place else 0) for place in lengths)
    assert len(memory) == expected


def test_a_static_cache_is_a_cache(models: Path) -> None:
    model, found = load("llama", models), []
    for more in ({}, {"cache_implementation": "static"}):
        memory = mbpa_lm.Memory(model)
        with mbpa_lm.adapt(model, memory, write="everything"):
            found.append(model.generate(TEXT, max_new_tokens=8, do_sample=False, eos_token_id=None, **more).tolist())
        assert len(memory) == 79 + 7
    assert found[0] == found[1]
    memory, cache = mbpa_lm.Memory(model), StaticCache(config=model.config, max_cache_len=96)
    with mbpa_lm.adapt(model, memory):
        model(TEXT[:, :40], cache=cache)
        model(TEXT[:, 40:], cache=cache)
    assert len(memory) == 79


@pytest.mark.parametrize(
    ("write", "settings", "message"),
    [
        ("prompts", {"use_cache": False}, "use_cache=False reads the prompt again at each step"),
        ("prompts", {"guidance_scale": 2.0}, "guidance_scale has the model read a second text"),
        ("everything", {"num_beams": 2}, "beams change places at each step"),
        ("everything", {"prompt_lookup_num_tokens": 2}, "assisted decoding takes tokens back"),
    ],
)
def test_what_cannot_be_remembered_is_refused(write: Any, settings: dict[str, Any], message: str, models: Path) -> None:
    model = load("llama", models)
    with mbpa_lm.adapt(model, mbpa_lm.Memory(model), write=write), pytest.raises(ModelError, match=message) as error:
        model.generate(TEXT, max_new_tokens=3, **settings)
    assert "\n" not in str(error.value)


def test_wrong_uses_are_named(models: Path) -> None:
    model, other = load("llama", models), load("gpt2", models)
    memory = mbpa_lm.Memory(model)
    with pytest.raises(ModelError, match="the memory was made for another GPT2LMHeadModel"), mbpa_lm.adapt(other, memory):
        pass
    with pytest.raises(ConfigError, match="write is 'all', but must be one of nothing, prompts, everything"):
        mbpa_lm.adapt(model, memory, write="all").__enter__()  # type: ignore[arg-type]
    with mbpa_lm.adapt(model, memory):
        with pytest.raises(ModelError, match="is adapted already"), mbpa_lm.adapt(model, memory):
            pass
        with pytest.raises(ModelError, match="inputs_embeds has no tokens that could be remembered"):
            model(inputs_embeds=model.get_input_embeddings()(TEXT))
    with mbpa_lm.adapt(model, memory, write="nothing"):
        model(inputs_embeds=model.get_input_embeddings()(TEXT))
    with pytest.raises(ConfigError, match=r"a memory has no setting 'neighbors'; did you mean neighbours\?"):
        mbpa_lm.Memory(model, neighbors=3)
    with pytest.raises(ConfigError, match="rows is 'each'"):
        mbpa_lm.Memory(model, rows="each")  # type: ignore[arg-type]


def test_a_head_that_is_something_else_is_refused_by_its_name() -> None:
    config = AutoConfig.for_model("bert", vocab_size=V, is_decoder=True, **LIKE_LLAMA)
    with pytest.raises(ModelError, match="BertLMHeadModel changes hidden states between its last layer and its output layer"):
        mbpa_lm.Memory(AutoModelForCausalLM.from_config(config))


def test_a_quantized_head_is_refused(models: Path) -> None:
    model = load("llama", models)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.mul(9).to(torch.int8), requires_grad=False)
    with pytest.raises(ModelError, match="the output layer of LlamaForCausalLM is quantized; load the model with its lm_head"):
        mbpa_lm.Memory(model)


def test_a_head_that_is_cut_over_devices_is_refused(models: Path) -> None:
    model = load("llama", models)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        model.lm_head.weight = torch.nn.Parameter(distribute_tensor(model.lm_head.weight.detach(), mesh, [Shard(0)]))
        with pytest.raises(
            ModelError, match="the output layer of LlamaForCausalLM is cut over several devices; load it without"
        ):
            mbpa_lm.Memory(model)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, models: Path) -> None:
    model = load("llama", models).to(dtype)
    plain = model(TEXT).logits
    with mbpa_lm.adapt(model, mbpa_lm.Memory(model)):
        found = model(TEXT).logits
    assert found.dtype == dtype
    assert loss_of(found.float(), TEXT) < loss_of(plain.float(), TEXT) - 0.1


def test_an_error_inside_the_block_leaves_the_model_as_it_was(models: Path) -> None:
    model = load("llama", models)
    plain = model(TEXT).logits
    with pytest.raises(ModelError, match="has no tokens"), mbpa_lm.adapt(model, mbpa_lm.Memory(model)):
        model(inputs_embeds=model.get_input_embeddings()(TEXT))
    assert torch.equal(model(TEXT).logits, plain)
    assert "generate" not in vars(model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
