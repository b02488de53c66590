"""The training loss with the softmax's sum estimated on a sample of the vocabulary (Bengio and Senecal 2008).

Each word u is drawn on its own with a probability pi_u that grows with its count and is 1 for the frequent ones. A drawn
word counts 1 / pi_u, so the estimate of the sum is unbiased whatever the model (Horvitz and Thompson 1952), and a
position's own target always counts once, exactly:

    log Z ~ log( exp(l_y) + sum_{u drawn, u != y} exp(l_u - log pi_u) )

One sample serves all positions of a batch. Evaluation never uses this: it is always the whole softmax.
Dimensions: `N` positions, `s` drawn words, `S` those and some that do not count, `V` vocabulary, `d` hidden size.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import linear

from mbpa_lm.models.base import OutputLayer

COUNT_POWER = 0.75
"""Between drawing in proportion to counts, which starves rare words, and drawing them all alike."""


MULTIPLE = 128
"""What the number of columns is rounded up to: oneDNN keeps a program for every shape of a product, of megabytes each."""


def inclusion_probabilities(training_counts_V: Tensor, expected_words: int) -> Tensor:
    """Return pi (V,) float32 = min(1, kappa (count + 1)^0.75), with kappa such that they sum to `expected_words`.

    `expected_words` is the mean number of words drawn; all are 1 where it is not less than V.
    """
    sizes_V = (training_counts_V.double() + 1).pow(COUNT_POWER)
    probabilities_V = torch.ones_like(sizes_V)
    capped_V = torch.full_like(sizes_V, expected_words >= len(sizes_V), dtype=torch.bool)
    while not bool(capped_V.all()):
        left = expected_words - int(capped_V.sum())
        scaled_V = torch.where(capped_V, 1.0, sizes_V * (left / sizes_V[~capped_V].sum()))
        if bool((scaled_V <= 1).all()):
            probabilities_V = scaled_V
            break
        capped_V = scaled_V >= 1
    return probabilities_V.float()


def sampled_cross_entropy(layer: OutputLayer, hidden_states_Nd: Tensor, targets_N: Tensor, inclusion_V: Tensor) -> Tensor:
    """Return the estimated loss (N,) float32 in nats of each target; `inclusion_V` as `inclusion_probabilities` gives it."""
    drawn_s = (torch.rand_like(inclusion_V) < inclusion_V).nonzero()[:, 0]
    column_V = torch.full_like(inclusion_V, -1, dtype=torch.int64)
    column_V[drawn_s] = torch.arange(len(drawn_s), device=drawn_s.device)
    words_S = torch.nn.functional.pad(drawn_s, (0, -len(drawn_s) % MULTIPLE))
    bias_S = -inclusion_V[words_S].log()
    bias_S[len(drawn_s) :] = -math.inf
    own_N = (hidden_states_Nd * layer.weight[targets_N]).sum(-1, dtype=torch.float32)
    if layer.bias is not None:
        bias_S = bias_S + layer.bias[words_S]
        own_N = own_N + layer.bias[targets_N]
    logits_NS = linear(hidden_states_Nd, layer.weight[words_S], bias_S).float()
    column_N = column_V[targets_N]
    is_drawn_N = column_N >= 0
    logits_NS[is_drawn_N, column_N[is_drawn_N]] = -math.inf  # the target has its own, exact term
    return torch.logaddexp(logits_NS.logsumexp(-1), own_N) - own_N
