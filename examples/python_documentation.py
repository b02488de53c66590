"""A small GPT-2 and a folder of texts that it has not seen, made from the documentation that comes with Python: no download.

    python examples/python_documentation.py --output runs/python_documentation
    python examples/folder_of_texts.py --model runs/python_documentation/model --texts runs/python_documentation/texts \
        --memory runs/python_documentation/memory

A byte-level BPE tokenizer is learnt from the training documents, the model of configs/builtin_transformer.yaml is trained with
it as train.py does, and both are saved as transformers expects them. The documents that the corpus holds out for testing become
text files.
"""

import argparse
import sys
from pathlib import Path

from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

from mbpa_lm.checkpoints.checkpoint import load_checkpoint
from mbpa_lm.commands import train
from mbpa_lm.data.builtin import BuiltinCorpus
from mbpa_lm.models.transformer import TransformerLanguageModel

END, VOCABULARY = "<end>", 4000
CONFIG = Path(__file__).resolve().parents[1] / "configs" / "builtin_transformer.yaml"


def save_texts(corpus: BuiltinCorpus, folder: Path) -> None:
    """Write each document that is held out for testing into a file."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, piece in zip(corpus.document_names("test"), corpus.pieces("test"), strict=True):
        (folder / f"{name.replace(':', '.')}.txt").write_text(piece.text, encoding="utf-8")


def save_tokenizer(corpus: BuiltinCorpus, folder: Path) -> None:
    """Learn a tokenizer from the training documents."""
    made = ByteLevelBPETokenizer()
    made.train_from_iterator((piece.text for piece in corpus.pieces("train")), VOCABULARY, special_tokens=[END])
    PreTrainedTokenizerFast(tokenizer_object=made._tokenizer, eos_token=END).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--epochs", default="3")
    arguments = parser.parse_args()
    output, corpus = arguments.output, BuiltinCorpus(0.05, 0.05)
    save_texts(corpus, output / "texts")
    save_tokenizer(corpus, output / "tokenizer")
    run = ["--config", str(CONFIG), "--run.folder", str(output / "run"), "--tracking.mode", "disabled", "--resume"]
    of_tokenizer = ["--tokenizer.kind", "huggingface", "--tokenizer.name", str(output / "tokenizer")]
    failed = train([*run, *of_tokenizer, "--tokenizer.vocabulary_size", "0", "--training.epochs", arguments.epochs])
    if failed:
        sys.exit(failed)
    model = load_checkpoint(output / "run").model
    assert isinstance(model, TransformerLanguageModel)
    model.causal_lm.save_pretrained(output / "model")
    PreTrainedTokenizerFast.from_pretrained(output / "tokenizer").save_pretrained(output / "model")
    print(f"the model is in {output / 'model'}, texts that it has not seen in {output / 'texts'}")


if __name__ == "__main__":
    main()
