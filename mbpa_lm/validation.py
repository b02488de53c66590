"""The loss on the validation text after each epoch: rows read side by side, faster than evaluate.py's one stream."""

import torch
from torch.nn.functional import cross_entropy

from mbpa_lm.config import TrainingConfig
from mbpa_lm.data.streams import SequenceBatches, TokenStream
from mbpa_lm.errors import DataError
from mbpa_lm.models.base import State
from mbpa_lm.models.build import Model


def validation_batches(stream: TokenStream, training: TrainingConfig) -> SequenceBatches:
    """Cut the validation text into as many rows as it has room for, up to the configured number."""
    rows = min(training.validation_rows, (len(stream) - 1) // training.sequence_length - 1)
    if rows < 1:
        raise DataError(
            f"{stream.name} has {len(stream)} tokens, but with training.sequence_length {training.sequence_length} validation "
            f"needs at least {2 * training.sequence_length + 1}; give more text or make it smaller"
        )
    return SequenceBatches(stream.tokens, rows, training.sequence_length)


@torch.no_grad()
def validation_loss(model: Model, batches: SequenceBatches, device: torch.device) -> float:
    """Return the mean loss in nats a token over rows read side by side, each from an empty state."""
    model.eval()
    total, count = 0.0, 0
    state: State | None = None
    for inputs, targets in batches.batches(seed=0, epoch=0):
        output = model(torch.from_numpy(inputs).to(device), state)
        state = output.state
        logits = model.output_layer().logits(output.hidden_states).float()
        total += float(cross_entropy(logits.flatten(0, 1), torch.from_numpy(targets).to(device).flatten(), reduction="sum"))
        count += targets.size
    return total / count
