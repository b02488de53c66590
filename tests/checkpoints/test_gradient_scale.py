"""The output layer's gradient scales: measured once, kept with the checkpoint, measured again when they would not fit."""

from pathlib import Path

import numpy as np
import pytest
import torch

from mbpa_lm.checkpoints.gradient_scale import LAYER_FILE, gradient_scale
from mbpa_lm.config import PersistentConfig
from mbpa_lm.errors import DataError
from tests.conftest import small_model

TOKENS = np.random.default_rng(0).integers(0, 30, 200).astype(np.uint16)


class Text:
    """Training tokens that count how often they are asked for."""

    def __init__(self) -> None:
        self.opened = 0

    def __call__(self) -> np.ndarray:
        self.opened += 1
        return TOKENS


@pytest.mark.parametrize("kind", ["lstm", "transformer"])
def test_it_is_measured_once_and_kept(kind: str, tmp_path: Path) -> None:
    model, text, config = small_model(kind), Text(), PersistentConfig(interval=5)
    first = gradient_scale(tmp_path, model, text, config)
    again = gradient_scale(tmp_path, model, text, config)
    assert text.opened == 1
    assert torch.equal(first.weight_Vd, again.weight_Vd)
    assert first.weight_Vd.shape == model.output_layer().weight.shape
    assert float(first.weight_Vd.min()) >= 0
    assert (first.bias_V is None) == (model.output_layer().bias is None)
    gradient_scale(tmp_path, model, text, PersistentConfig(interval=7))
    assert text.opened == 2


def test_a_kept_file_that_is_damaged_or_another_model_s_is_measured_again(tmp_path: Path) -> None:
    text, config = Text(), PersistentConfig(interval=5)
    gradient_scale(tmp_path, small_model("lstm", vocabulary_size=40), text, config)
    gradient_scale(tmp_path, small_model("lstm"), text, config)
    (tmp_path / LAYER_FILE).write_bytes(b"no tensors")
    gradient_scale(tmp_path, small_model("lstm"), text, config)
    assert text.opened == 3
    assert [path.name for path in tmp_path.iterdir()] == [LAYER_FILE]


def test_a_kept_file_with_an_altered_digit_is_measured_again(tmp_path: Path) -> None:
    model, text = small_model("lstm"), Text()
    first = gradient_scale(tmp_path, model, text, PersistentConfig(interval=5))
    content = bytearray((tmp_path / LAYER_FILE).read_bytes())
    content[-2] ^= 1
    (tmp_path / LAYER_FILE).write_bytes(content)
    again = gradient_scale(tmp_path, model, text, PersistentConfig(interval=5))
    assert text.opened == 2
    assert torch.equal(first.weight_Vd, again.weight_Vd)


def test_a_text_shorter_than_an_interval_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the training text has 200 tokens, persistent\.interval is 500; make it smaller"):
        gradient_scale(tmp_path, small_model("lstm"), Text(), PersistentConfig(interval=500))


def test_only_so_many_tokens_are_read(tmp_path: Path) -> None:
    model, config = small_model("lstm"), PersistentConfig(interval=5, statistics_tokens=50)
    few = gradient_scale(tmp_path / "a", model, Text(), config)
    same = gradient_scale(tmp_path / "b", model, lambda: TOKENS[:51], config)
    assert torch.equal(few.weight_Vd, same.weight_Vd)
