"""A call of `generate`: what of it is the prompt, and whether what it generates can be remembered."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mbpa_lm.errors import ModelError

Write = Literal["nothing", "prompts", "everything"]


@dataclass(frozen=True)
class Generation:
    """A call of `generate` that is under way."""

    prompt_columns: int
    mask_BT: Tensor | None  # of the prompt, False for padding
    copies: int  # rows that each prompt becomes
    ends: tuple[int, ...]  # tokens that end a text

    @classmethod
    def of(cls, model: Any, inputs: tuple[Any, ...], named: dict[str, Any], write: Write) -> "Generation":
        """Return what a model is about to generate; raises ModelError where that cannot be remembered as `write` says."""
        tokens = inputs[0] if inputs else named.get("inputs", named.get("input_ids"))
        given = inputs[1] if len(inputs) > 1 else named.get("generation_config")
        others = {name: value for name, value in named.items() if name != "generation_config"}
        config, _ = model._prepare_generation_config(given, **others)
        _check(config, named.get("assistant_model") is not None, write)
        mask, ends = named.get("attention_mask"), config.eos_token_id
        return cls(
            1 if tokens is None else tokens.shape[1],
            None if mask is None else mask.bool(),
            max(config.num_beams or 1, config.num_return_sequences or 1),
            tuple(ends) if isinstance(ends, list | tuple) else () if ends is None else (int(ends),),
        )

    def mask_of(self, columns: int) -> Tensor | None:
        """Return the mask of all rows for so many columns: what `generate` passes on to the model may be in another form."""
        if self.mask_BT is None:
            return None
        mask = self.mask_BT.repeat_interleave(self.copies, dim=0)
        return torch.nn.functional.pad(mask, (0, max(0, columns - mask.shape[1])), value=True)


def _check(config: Any, has_assistant: bool, write: Write) -> None:
    if write == "nothing":
        return
    if config.use_cache is False:
        raise ModelError(
            "generate with use_cache=False reads the prompt again at each step, and would remember it again: give "
            "use_cache=True, or adapt with write='nothing'"
        )
    if config.guidance_scale not in (None, 1):
        raise ModelError("guidance_scale has the model read a second text, which is not to be remembered: write='nothing'")
    if write == "prompts":
        return
    if (config.num_beams or 1) > 1:
        raise ModelError("beams change places at each step, so what each generates cannot be remembered: write='prompts'")
    if has_assistant or config.prompt_lookup_num_tokens or config.assistant_early_exit:
        raise ModelError("assisted decoding takes tokens back, so what is generated cannot be remembered: write='prompts'")
