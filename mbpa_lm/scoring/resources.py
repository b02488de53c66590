"""What experts need beside the model, made, or read where it is kept: memories, slow weights, a datastore, a learning model."""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from mbpa_lm.adaptation.slow_weights import GradientScale, SlowRule, SlowWeights
from mbpa_lm.checkpoints.checkpoint import Checkpoint
from mbpa_lm.checkpoints.gradient_scale import gradient_scale, model_gradient_scale
from mbpa_lm.checkpoints.scales import fill_in, mean_squared_norm
from mbpa_lm.config import Config
from mbpa_lm.config.checks import known
from mbpa_lm.errors import ConfigError, NumericalError
from mbpa_lm.experts.base import Expert
from mbpa_lm.experts.build import build_experts
from mbpa_lm.experts.dynamic_model import DynamicModel, DynamicRule
from mbpa_lm.memory.base import EntryStore, Memory
from mbpa_lm.memory.composite import CompositeMemory, JoinedStores
from mbpa_lm.memory.datastore.manifest import Layout
from mbpa_lm.memory.history import StreamHistory
from mbpa_lm.memory.slots import SlotMemory
from mbpa_lm.memory.window import WindowMemory
from mbpa_lm.models.base import LanguageModel
from mbpa_lm.remembering.datastores import (
    TRAINING,
    identity_of,
    knows,
    likely_words_kept,
    limit_of,
    open_datastores,
    open_one,
    training_datastore,
)
from mbpa_lm.remembering.training_text import training_text, training_tokens
from mbpa_lm.system.progress import console, token_progress

NEIGHBOURS_SHARE = 128
"""Where memory is limited, one part in so many is for the keys of a chunk's neighbours, of which there are several copies."""
NEIGHBOURS_BYTES = 1 << 29
"""For the same keys, where it is not."""


def make_memory(config: Config, checkpoint: Checkpoint, metric: Tensor | None, closing: ExitStack) -> Memory:
    """Return a memory of the stream, searched together with the configured datastores where there are any.

    Args: closing, at whose end a database is told what is still on its way and left.
    """
    likely_words = likely_words_kept(config, checkpoint)
    if config.remote.address is not None:
        stream: Memory = _remote_memory(config, checkpoint, likely_words, metric, closing)
    else:
        stream = make_stream_memory(config, checkpoint.model, likely_words, metric)
    if not config.memory.datastores:
        return stream
    stores = open_datastores(config, checkpoint, partial(training_text, config, checkpoint))
    return CompositeMemory(stream, JoinedStores(stores), metric)


def chunk_length(config: Config, experts: Sequence[Expert], hidden_size: int) -> int:
    """Return how many tokens are processed at once: so few that the keys of their neighbours fit in."""
    limit, neighbours = limit_of(config.memory), max(expert.neighbours for expert in experts)
    wanted = config.evaluation.chunk_length
    if not neighbours:
        return wanted
    room = limit // NEIGHBOURS_SHARE if limit else NEIGHBOURS_BYTES
    return max(1, min(wanted, room // (4 * hidden_size * neighbours)))


def _remote_memory(
    config: Config, checkpoint: Checkpoint, likely_words: int, metric: Tensor | None, closing: ExitStack
) -> Memory:
    from mbpa_lm.memory.remote.memory import RemoteMemory
    from mbpa_lm.memory.remote.settings import RemoteSettings
    from mbpa_lm.memory.remote.store import RemoteStore

    remote = config.remote
    assert remote.address is not None
    settings = RemoteSettings(
        remote.address,
        remote.collection,
        remote.index,
        batch=remote.batch,
        attempts=remote.attempts,
        timeout_s=remote.timeout,
    )
    layout = Layout(checkpoint.model.hidden_size, likely_words, config.memory.key_type)
    store = closing.enter_context(RemoteStore(settings, identity_of(checkpoint), layout))
    if len(store):
        console.print(f"{settings.place} holds {len(store):,} entries: they count as read before the stream")
    return closing.enter_context(RemoteMemory(store, _surprise(config), metric))


def make_stream_memory(config: Config, model: LanguageModel, likely_words: int, metric: Tensor | None = None) -> Memory:
    """Return an empty memory of the stream alone."""
    memory, weight = config.memory, model.output_layer().weight
    shape = (memory.size, model.hidden_size, likely_words, weight.dtype, weight.device)
    surprise = _surprise(config)
    if memory.write == "reservoir":
        return SlotMemory(*shape, "reservoir", metric, surprise, config.run.seed)
    if memory.eviction == "least_retrieved":
        return SlotMemory(*shape, "least_retrieved", metric, surprise)
    return WindowMemory(*shape, metric, surprise)


def _surprise(config: Config) -> float:
    return config.memory.surprise if config.memory.write == "surprising" else 0.0


def make_history(experts: Sequence[Expert], model: LanguageModel) -> StreamHistory | None:
    """Return an empty history as long as the experts ask for, None where none does; of single precision or better."""
    size, weight = max(expert.window for expert in experts), model.output_layer().weight
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return StreamHistory(size, model.hidden_size, dtype, weight.device) if size else None


def fill_in_scales(config: Config, checkpoint: Checkpoint) -> Config:
    """Return the configuration with what it leaves open measured on the training text: see `scales.fill_in`."""
    tokens = partial(training_tokens, config, checkpoint)

    def gradient_size() -> float:
        size = float(_measured_scale(config, checkpoint).weight_Vd.mean())
        if not math.isfinite(size):
            raise NumericalError("the model gives no numbers on its training text: the gradients of its output layer are none")
        return size

    norm = cache(partial(mean_squared_norm, checkpoint.folder, checkpoint.model, tokens))
    return fill_in(config, checkpoint.model.vocabulary_size, norm, gradient_size)


def _measured_scale(config: Config, checkpoint: Checkpoint) -> GradientScale:
    with token_progress("measuring gradients on the training text") as progress:
        tokens = partial(training_tokens, config, checkpoint)
        return gradient_scale(checkpoint.folder, checkpoint.model, tokens, config.persistent, progress)


def make_slow_weights(config: Config, checkpoint: Checkpoint, experts: Sequence[Expert]) -> SlowWeights | None:
    """Return the trained output layer, ready to follow a stream, None where no expert needs it.

    Gradients are measured where they are not kept.
    """
    if not any(expert.needs_slow_weights for expert in experts):
        return None
    persistent, scale = config.persistent, _measured_scale(config, checkpoint)
    layer = checkpoint.model.output_layer()
    if layer.softcap is not None:
        raise ConfigError(
            "persistent adaptation needs logits without a soft cap, which this model has; leave those experts out"
        )
    rule = SlowRule(persistent.interval, known("persistent.rate", persistent.rate), persistent.decay, persistent.smoothing)
    return SlowWeights(layer.weight, layer.bias, rule, scale)


def make_knn_store(config: Config, checkpoint: Checkpoint) -> EntryStore:
    """Return the datastore of the training text, made where it is not kept, together with the configured ones.

    Where one of those holds the training text, that is the one.
    """
    others = [open_one(config, checkpoint, Path(name)) for name in config.memory.datastores if name != TRAINING]
    if knows(config, checkpoint.corpus["train"]):
        return JoinedStores(others)
    return JoinedStores([training_datastore(config, checkpoint, partial(training_text, config, checkpoint)), *others])


def make_experts(config: Config, checkpoint: Checkpoint) -> list[Expert]:
    """Return the configured experts; a datastore and gradients are made from the training text where they are not kept."""
    tokens = partial(training_tokens, config, checkpoint)

    def dynamic_model() -> DynamicModel:
        dynamic = config.dynamic
        rate = known("dynamic.rate", dynamic.rate)
        rule = DynamicRule(dynamic.interval, rate, dynamic.decay, dynamic.smoothing, dynamic.optimizer)
        scale: dict[str, Tensor] = {}
        if dynamic.optimizer == "rms":
            with token_progress("measuring all gradients on the training text") as progress:
                scale = model_gradient_scale(checkpoint.folder, checkpoint.model, tokens, dynamic, progress)
        return DynamicModel(checkpoint.model, rule, scale)

    store = partial(make_knn_store, config, checkpoint)
    return build_experts(config, checkpoint.model.output_layer(), store, dynamic_model)
