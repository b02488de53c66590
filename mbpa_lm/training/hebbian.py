"""Hebbian softmax (Rae et al. 2018, arXiv 1803.10049): rows of rare words remember the hidden states that they followed.

After each optimizer step, the output layer's row of a word that is still rare moves towards the mean of the hidden states
whose next word it was (their section 3, with several occurrences in a batch):

    theta_i <- lambda_i s_i h_i + (1 - lambda_i) theta_i        lambda_i = max(n_i / c_i, gamma) while c_i <= limit, else 0

`n_i` of the `c_i` occurrences so far are in this batch, `h_i` is the mean over those, and `s_i` gives it the length of the row
that it is mixed into: hidden states and rows are of different lengths here, most of all where weights are tied. A word seen
once is its context, a word seen twice the mean of two; a common one is left to gradients.

Dimensions: `N` positions, `U` distinct words among their targets, `V` vocabulary, `d` hidden size.
"""

import torch
from torch import Tensor

from mbpa_lm.system.processes import Processes


class HebbianRule:
    """How often each word was seen, and what becomes of its row; `limit` 0 does nothing."""

    def __init__(self, limit: int, floor: float, vocabulary_size: int, processes: Processes) -> None:
        self.limit, self.floor, self.processes = limit, floor, processes
        self.seen_V = torch.zeros(vocabulary_size, dtype=torch.int64, device=processes.device)

    @torch.no_grad()
    def move_rows(self, weight_Vd: Tensor, hidden_states_Nd: Tensor, targets_N: Tensor) -> None:
        """Count the targets (N,) int64 of all processes and move their rows of `weight_Vd` in place."""
        hidden_states_Nd, targets_N = (self.processes.joined(part, 0) for part in (hidden_states_Nd, targets_N))
        words_U, place_N, counts_U = targets_N.unique(return_inverse=True, return_counts=True)
        self.seen_V[words_U] += counts_U
        rows_Ud = weight_Vd[words_U]
        means_Ud = torch.zeros_like(rows_Ud).index_add_(0, place_N, hidden_states_Nd.to(rows_Ud.dtype))
        lengths_U1 = rows_Ud.norm(dim=-1, keepdim=True) / means_Ud.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        share_U = (counts_U / self.seen_V[words_U]).clamp_min(self.floor) * (self.seen_V[words_U] <= self.limit)
        weight_Vd[words_U] = torch.lerp(rows_Ud, means_Ud * lengths_U1, share_U[:, None].to(rows_Ud.dtype))
