"""A model type for lm-evaluation-harness: a causal language model of transformers with a memory of documents.

    mbpa-lm-eval --model mbpa_lm --model_args pretrained=FOLDER,memory=memories/notes --tasks wikitext

`mbpa-lm-eval` takes the arguments of `lm_eval`, which looks for no models in other packages; in Python, importing this module
is enough for `lm_eval.simple_evaluate(model="mbpa_lm", ...)`. Requests are independent of one another and come in any order, so
nothing that they say is remembered.
"""

import sys
from typing import Any

from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from mbpa_lm.commands import guarded
from mbpa_lm.errors import ConfigError
from mbpa_lm.integrations.adapting import adapt
from mbpa_lm.integrations.memory import SETTING_NAMES, Memory


@register_model("mbpa_lm")
class MbpaLM(HFLM):
    """The harness's own model of transformers, adapted to a memory for as long as it lives."""

    def __init__(self, pretrained: Any, memory: str | None = None, **arguments: Any) -> None:
        """Args: memory: a folder that `mbpa-memory build` or `Memory.save` wrote; settings of it (alpha, neighbours, ...) among
        the harness's own arguments. Raises ConfigError where there is no memory, DatastoreError where it is another model's.
        """
        if memory is None:
            raise ConfigError("model_args names no memory; add memory=FOLDER, or use --model hf")
        settings = {name: arguments.pop(name) for name in SETTING_NAMES if name in arguments}
        super().__init__(pretrained, **arguments)
        self._adapted = adapt(self.model, Memory.load(memory, self.model, self.tokenizer, **settings), write="nothing")
        self._adapted.__enter__()


def main() -> None:
    """Do what `lm_eval` does, with this model type too."""
    from lm_eval.__main__ import cli_evaluate

    sys.exit(guarded(lambda _: cli_evaluate(), (), "--batch_size or memory.size"))


if __name__ == "__main__":
    main()
