"""What every model must do, for all of them; then what only one does."""

import pytest
import torch

from mbpa_lm.config import ModelConfig
from mbpa_lm.errors import ConfigError, ModelError
from mbpa_lm.models.build import build_model
from mbpa_lm.models.lstm import LSTMLanguageModel
from tests.conftest import GPT2, small_model

KINDS = ["lstm", "transformer"]


def random_tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 30, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def read_in_pieces(model: torch.nn.Module, tokens: torch.Tensor, length: int) -> torch.Tensor:
    state, parts = None, []
    for piece in tokens.split(length, dim=1):
        output = model(piece, state)
        state = output.state
        parts.append(output.hidden_states)
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 7, 12, 100])
def test_hidden_states_do_not_depend_on_the_pieces(kind: str, length: int) -> None:
    model, tokens = small_model(kind), random_tokens(2, 41)
    torch.testing.assert_close(read_in_pieces(model, tokens, length), read_in_pieces(model, tokens, 41), atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_do_not_see_later_tokens(kind: str) -> None:
    model, tokens = small_model(kind), random_tokens(1, 30)
    changed = tokens.clone()
    changed[0, 20] = (changed[0, 20] + 1) % 30
    before, after = read_in_pieces(model, tokens, 30), read_in_pieces(model, changed, 30)
    assert torch.equal(before[:, :20], after[:, :20])
    assert not torch.allclose(before[:, 20:], after[:, 20:])


@pytest.mark.parametrize("kind", KINDS)
def test_the_output_layer_is_the_live_parameters(kind: str) -> None:
    model = small_model(kind)
    weight = model.output_layer().weight
    assert weight.shape == (30, model.hidden_size)
    with torch.no_grad():
        weight.zero_()
    logits = model.output_layer().logits(read_in_pieces(model, random_tokens(1, 3), 3))
    assert torch.equal(logits[..., 1:], logits[..., :-1])


def test_a_transformer_is_the_library_s_own_within_a_block() -> None:
    model, tokens = small_model("transformer"), random_tokens(2, 12)
    with torch.no_grad():
        expected = model.causal_lm(input_ids=tokens).logits
    torch.testing.assert_close(model.output_layer().logits(read_in_pieces(model, tokens, 5)), expected, atol=1e-12, rtol=0)


def test_a_new_block_begins_with_the_overlap() -> None:
    model, tokens = small_model("transformer"), random_tokens(1, 16)  # context 12, overlap 4
    with torch.no_grad():
        expected = model.causal_lm.base_model(input_ids=tokens[:, 8:16]).last_hidden_state[:, 4:]
    torch.testing.assert_close(read_in_pieces(model, tokens, 16)[:, 12:], expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "qwen2", "gpt_neox"])
def test_architectures_of_the_library_are_built_from_their_configuration(architecture: str) -> None:
    settings = GPT2 if architecture == "gpt2" else {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "max_position_embeddings": 16, **({} if architecture == "gpt_neox" else {"num_key_value_heads": 2}),
    }  # fmt: skip
    config = ModelConfig(kind="transformer", architecture=architecture, settings=settings, context_length=8, context_overlap=2)
    model = build_model(config, 30).eval()
    torch.testing.assert_close(
        read_in_pieces(model, random_tokens(1, 20), 3), read_in_pieces(model, random_tokens(1, 20), 20), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"architecture": "no_such_model"}, r"model\.architecture 'no_such_model' with model\.settings"),
        ({"settings": {**GPT2, "n_embd": 15}}, r"with model\.settings: .*"),
        ({"context_length": 64}, "model.context_length is 64, but model.settings give gpt2 only 32 positions"),
        (
            {"architecture": "cohere", "settings": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
             "num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}},
            "'cohere' does more to its logits than a linear layer",
        ),
    ],
)  # fmt: skip
def test_a_transformer_that_cannot_be_made_is_refused_by_name(settings: dict[str, object], message: str) -> None:
    values = {"kind": "transformer", "settings": GPT2, "context_length": 12, "context_overlap": 4, **settings}
    with pytest.raises((ConfigError, ModelError), match=message):
        build_model(ModelConfig(**values), 30)


def test_a_model_that_sees_what_comes_after_is_refused_by_name() -> None:
    settings = {"emb_dim": 16, "n_layers": 1, "n_heads": 2, "max_position_embeddings": 32}  # XLM, which has no causal mask
    config = ModelConfig(kind="transformer", architecture="xlm", settings=settings, context_length=12, context_overlap=4)
    with pytest.raises(ModelError, match=r"'xlm': XLMWithLMHeadModel sees the tokens after the one that it predicts"):
        build_model(config, 30)


def regularized(**settings: float) -> LSTMLanguageModel:
    torch.manual_seed(0)
    nothing = {"dropout": 0.0, "embedding_dropout": 0.0, "input_dropout": 0.0, "weight_dropout": 0.0}
    model = build_model(ModelConfig(hidden_size=24, layers=1, **{**nothing, **settings}), 30)
    assert isinstance(model, LSTMLanguageModel)
    return model


def test_without_regularizers_training_reads_as_evaluation_does() -> None:
    model, tokens = regularized(), random_tokens(3, 9)
    trained = model.train()(tokens)
    assert torch.equal(trained.hidden_states, model.eval()(tokens).hidden_states)
    assert float(trained.penalty) == 0


def test_units_are_dropped_for_the_whole_sequence() -> None:
    hidden = regularized(dropout=0.5).train()(random_tokens(4, 9)).hidden_states.detach()  # (4, 9, 24)
    dropped = (hidden == 0).float().mean(dim=1)
    assert set(dropped.unique().tolist()) == {0.0, 1.0}
    assert 0.3 < float(dropped.mean()) < 0.7
    assert not torch.equal(dropped[0], dropped[1])  # another mask for each sequence


def test_whole_words_are_dropped() -> None:
    model = regularized(embedding_dropout=0.5).train()
    vectors = model._embed(torch.arange(30))
    assert set((vectors == 0).float().mean(dim=1).unique().tolist()) == {0.0, 1.0}
    kept = vectors[(vectors != 0).all(dim=1)]
    torch.testing.assert_close(kept, 2 * model.embedding.weight[(vectors != 0).all(dim=1)])


def test_recurrent_weights_are_dropped_in_training_only() -> None:
    model, tokens = regularized(weight_dropout=0.5), random_tokens(2, 6)
    one, two = model.train()(tokens), model.train()(tokens)
    torch.testing.assert_close(one.hidden_states[:, 0], two.hidden_states[:, 0])  # from an empty state: no recurrence yet
    assert not torch.allclose(one.hidden_states[:, 1:], two.hidden_states[:, 1:])
    assert torch.equal(model.eval()(tokens).hidden_states, model.eval()(tokens).hidden_states)


def test_penalties_are_those_of_the_paper() -> None:
    tokens = random_tokens(2, 6)
    plain = regularized().train()(tokens).hidden_states
    model = regularized(activation_penalty=2.0, change_penalty=3.0)
    expected = 2.0 * plain.square().mean() + 3.0 * (plain[:, 1:] - plain[:, :-1]).square().mean()
    torch.testing.assert_close(model.train()(tokens).penalty, expected)


def test_tied_weights_are_one_tensor_and_untied_two() -> None:
    tied = build_model(ModelConfig(hidden_size=24, embedding_size=16, layers=2), 30)
    assert tied.output_layer().weight is tied.embedding.weight
    assert tied.hidden_size == 16
    untied = build_model(ModelConfig(hidden_size=24, embedding_size=16, tied=False), 30)
    assert untied.output_layer().weight.shape == (30, 24)
