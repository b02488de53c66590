"""A tokenizer of words, saved as a pretrained one is."""

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.integrations.tiny import V

WORDS = [f"w{number}" for number in range(3, V)]


def save_tokenizer(folder: Path, words: Sequence[str] = WORDS) -> int:
    """Write its files into a folder; return how many words it knows."""
    vocabulary = {word: index for index, word in enumerate(["<s>", "</s>", "<pad>", *words])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", pad_token="<pad>", unk_token="<pad>").save_pretrained(
        folder
    )
    return len(vocabulary)
