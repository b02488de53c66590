"""How a causal language model of transformers turns hidden states into logits: found out by trying, for every architecture.

What can be adapted is a linear layer, tied to the embeddings or not, with a bias or without, whose logits may be multiplied by
a number (Cohere, Granite) and softly capped (Gemma 2). A model that does anything else is refused by its name, and so is one
whose hidden states depend on the tokens after them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mbpa_lm.errors import ModelError, reason
from mbpa_lm.models.base import OutputLayer
from mbpa_lm.numerics.softcap import capped

SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap")
"""What architectures call c of a soft cap, c tanh(logit / c)."""
TRIED = 8
"""Tokens that are read to find out."""


@dataclass(frozen=True)
class Head:
    """The parts of a model that a memory needs."""

    base: nn.Module  # gives the hidden states: the input of the output layer, but for its type
    output: nn.Module  # the output layer
    scale: float  # that its logits are multiplied by
    softcap: float | None

    def layer(self) -> OutputLayer:
        """Return the output layer; it gives the model's logits for hidden states that were multiplied by `scale`."""
        bias = getattr(self.output, "bias", None)
        return OutputLayer(self.output.weight, bias, self.softcap)  # type: ignore[arg-type]

    def keys(self, hidden_states: Tensor) -> Tensor:
        """Return hidden states (..., d) as the output layer takes them, and as they are remembered."""
        hidden_states = hidden_states.to(self.layer().weight)
        return hidden_states if self.scale == 1 else hidden_states * self.scale


def positions_of(model: Any) -> int | None:
    """Return how many positions a model has, None where it has any number or does not say."""
    positions: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return positions if positions is None or positions > 0 else None


def find_head(model: Any) -> Head:
    """Return the parts of a causal language model; raises ModelError, naming it, where they are not to be adapted."""
    name = type(model).__name__
    output, bases = model.get_output_embeddings(), [model.base_model, model.get_decoder()]
    if output is None or model in bases or model.config.is_encoder_decoder:
        raise ModelError(f"{name} is no causal language model with an output layer; only such a model can have a memory")
    _check_weight(name, output)
    tokens = torch.arange(1, TRIED + 1, device=model.device).repeat(2, 1) % output.weight.shape[0]
    tokens[1, TRIED // 2 :] = (tokens[1, TRIED // 2 :] + 1) % output.weight.shape[0]
    seen: dict[Any, Tensor] = {}
    with _observed(bases, output, seen), in_evaluation(model), torch.no_grad():
        try:
            logits = model(input_ids=tokens, use_cache=False, return_dict=True).logits
        except (ValueError, IndexError, TypeError, AttributeError, NotImplementedError) as error:
            raise ModelError(f"{name} cannot read a text ({reason(error)}); it cannot have a memory") from None
    base = next((base for base in bases if base in seen), None)
    if base is None:
        raise ModelError(f"{name} computes its hidden states in an unknown place; it cannot have a memory")
    hidden_states, raw = seen[base], seen["logits"].float()
    before, other = hidden_states[:, : TRIED // 2]
    if not _equal(before, other, _leak(model, hidden_states)):
        raise ModelError(f"{name} sees the tokens after the one that it predicts; it is no causal language model")
    if not _equal(seen["input"], hidden_states.to(seen["input"])):
        raise ModelError(f"{name} changes hidden states between its last layer and its output layer; it cannot have a memory")
    for softcap in (None, *(getattr(model.config.get_text_config(), name, None) for name in SOFTCAPS)):
        scale = 1.0 if _equal(logits, capped(raw, softcap)) else _factor(raw, logits.float(), softcap)
        if _equal(logits, capped(raw * scale, softcap)):
            break
    else:
        raise ModelError(f"{name} does more to its logits than a factor and a soft cap; it cannot have a memory")
    if scale != 1 and getattr(output, "bias", None) is not None:
        raise ModelError(f"{name} multiplies the logits of an output layer with a bias; it cannot have a memory")
    head = Head(base, output, scale, softcap)
    if not _equal(logits, head.layer().logits(head.keys(hidden_states))):
        raise ModelError(f"the output layer of {name} is not a plain linear layer; it cannot have a memory")
    return head


def reads_in_pieces(model: Any, head: Head) -> bool:
    """Say whether a model gives the same hidden states for a text in pieces, with a cache of keys and values, as at once."""
    from transformers import DynamicCache

    weight = head.layer().weight
    if getattr(model, "_is_stateful", False) and torch.finfo(weight.dtype).bits < 32:
        return False  # rounding would hide what a state forgets
    tokens = torch.arange(1, TRIED + 1, device=model.device)[None] % len(weight)
    with in_evaluation(model), torch.no_grad():
        try:
            whole = head.base(input_ids=tokens, use_cache=False).last_hidden_state
            cache = DynamicCache(config=model.config)
            cut = (tokens[:, :3], tokens[:, 3:4], tokens[:, 4:])
            pieces = [head.base(input_ids=each, cache=cache, use_cache=True).last_hidden_state for each in cut]
        except (ValueError, IndexError, TypeError, AttributeError, KeyError, RuntimeError, NotImplementedError):
            return False
    return _equal(whole, torch.cat(pieces, dim=1))


def _leak(model: Any, hidden_states: Tensor) -> float:
    """Return how much of the largest number hidden states may change with what comes after, by rounding alone.

    Two rows of one batch are computed alike, but for experts, which read as many tokens as are sent to them.
    """
    rounding = _rounding(hidden_states, hidden_states)
    has_experts = any(
        "expert" in name and isinstance(value, int) and value > 1 for name, value in model.config.to_dict().items()
    )
    return rounding if has_experts else min(rounding, 1e-5)


def _check_weight(name: str, output: nn.Module) -> None:
    weight = getattr(output, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
        raise ModelError(f"the output layer of {name} is quantized; load the model with its lm_head left as it is")
    if weight.is_meta:
        raise ModelError(f"the output layer of {name} lies on the disk (device_map); give it a device, the first GPU or cpu")
    if type(weight).__name__ == "DTensor":
        raise ModelError(
            f"the output layer of {name} is cut over several devices; load it without a tensor-parallel plan for it"
        )


@contextmanager
def _observed(bases: list[nn.Module], output: nn.Module, seen: dict[Any, Tensor]) -> Iterator[None]:
    def see_base(module: nn.Module, inputs: Any, result: Any) -> None:
        seen[module] = result[0]

    def see_output(module: nn.Module, inputs: Any, result: Tensor) -> None:
        seen["input"], seen["logits"] = inputs[0], result

    hooks = [*(base.register_forward_hook(see_base) for base in bases), output.register_forward_hook(see_output)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """Have a model compute as in evaluation, without dropout, for the length of the block."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _factor(raw: Tensor, logits: Tensor, softcap: float | None) -> float:
    """Return the factor of the raw logits that explains the others best."""
    before = logits if softcap is None else softcap * torch.atanh((logits / softcap).clamp(-0.999999, 0.999999))
    return float((before * raw).sum() / raw.square().sum().clamp(min=torch.finfo(raw.dtype).tiny))


def _equal(one: Tensor, other: Tensor, share: float | None = None) -> bool:
    """Say whether tensors are the same but for a share of their largest number, rounding where none is given."""
    if one.shape != other.shape:
        return False
    most = (_rounding(one, other) if share is None else share) * max(float(one.float().abs().max()), 1e-30)
    return torch.allclose(one.float(), other.to(one.device).float(), rtol=0, atol=most)


def _rounding(one: Tensor, other: Tensor) -> float:
    """Return how far apart two ways to compute the same may be, as a share of the largest number."""
    return 20 * max(torch.finfo(one.dtype).eps, torch.finfo(other.dtype).eps)
