"""Whose hidden states a memory's keys are, for models that no checkpoint of this package describes.

Reading all weights of a large model would take longer than anything else, so that of each only some numbers are read, evenly
spread; that another model agrees in all of them is not to be expected.
"""

import hashlib
import json
import re
from typing import Any

import torch

NUMBERS = 256
"""That are read of each weight."""
LEFT_OUT = re.compile(
    r"_name_or_path|transformers_version|(torch_)?dtype|architectures|use_cache|output_\w+|return_dict|\w+_token_id|id2label|label2id"
    r"|num_labels|problem_type|chunk_size_feed_forward|initializer_range|\w*_pdrop|\w*dropout|summary_\w+|pretraining_tp"
)
"""Of a configuration: what changes no hidden state that is read outside training, or is in the weights."""


def model_fingerprint(model: Any) -> str:
    """Return a fingerprint of a model's configuration and weights, the same for a compiled model as for the model itself."""
    model = getattr(model, "_orig_mod", model)
    configuration = {name: value for name, value in model.config.to_dict().items() if not LEFT_OUT.fullmatch(name)}
    found = hashlib.sha256(json.dumps(configuration, sort_keys=True, default=str).encode())
    for name, weight in sorted(model.named_parameters()):
        found.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        if not weight.is_meta:
            flat = weight.detach().flatten()
            places = torch.linspace(0, len(flat) - 1, min(NUMBERS, len(flat)), dtype=torch.float64).long()
            found.update(flat[places.to(flat.device)].cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
