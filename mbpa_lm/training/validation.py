"""The loss on the validation text after each epoch: rows read side by side, faster than evaluate.py's one stream."""

import numpy as np
import torch
from torch import nn

from mbpa_lm.config import TrainingConfig
from mbpa_lm.data.streams import SequenceBatches, TokenStream
from mbpa_lm.errors import DataError
from mbpa_lm.models.base import State
from mbpa_lm.system.processes import Processes


def validation_batches(stream: TokenStream, training: TrainingConfig, processes: int = 1) -> SequenceBatches:
    """Cut the validation text into as many rows as it has room for, up to the configured number and at least one a process.

    Raises DataError where there is too little text.
    """
    rows = min(training.validation_rows, (len(stream) - 1) // training.sequence_length - 1)
    if 1 <= rows < processes:
        raise DataError(f"{processes} processes need a row of validation text each, but there are {rows}; start fewer")
    if rows < 1:
        raise DataError(
            f"{stream.name} has {len(stream)} tokens, but with training.sequence_length {training.sequence_length} validation "
            f"needs at least {2 * training.sequence_length + 1}; give more text or make it smaller"
        )
    return SequenceBatches(stream.tokens, rows, training.sequence_length)


@torch.no_grad()
def validation_loss(objective: nn.Module, batches: SequenceBatches, processes: Processes) -> float:
    """Return the mean loss in nats a token over rows read side by side, each from an empty state.

    The processes share the rows; the sums of all rows are added in their order, however many processes there are.
    """
    objective.eval()
    state: State | None = None
    mine = processes.rows(batches.batch_size)
    sums = np.zeros(batches.batch_size)
    for inputs, targets in batches.batches(seed=0, epoch=0):
        output = objective(*(torch.from_numpy(part[mine]).to(processes.device) for part in (inputs, targets)), state)
        state = output.state
        sums[mine] += output.loss.view(len(inputs[mine]), -1).sum(-1, dtype=torch.float64).cpu().numpy()
    total = float(np.sum(processes.total(sums.tolist())))
    return total / (batches.steps * batches.batch_size * batches.sequence_length)
