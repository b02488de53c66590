"""A model of transformers reads half of a folder of text files, and predicts the other half better for it.

    python examples/folder_of_texts.py --model NAME_OR_FOLDER --texts FOLDER --memory memories/texts

The first half of the files, in the order of their names, becomes a memory that is saved; the second half is scored by the model
alone, with that memory, and with that memory and what has been read of the second half so far. Without a model and texts of
your own, examples/python_documentation.py makes both from what lies on this machine.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import mbpa_lm
from mbpa_lm.commands import guarded
from mbpa_lm.errors import ConfigError, DataError, reason

SUFFIXES = (".txt", ".md", ".rst")


def read_folder(folder: Path) -> list[str]:
    """Return the texts of all files under a folder, in the order of their names; raises DataError where one is none."""
    paths, texts = sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES), []
    for path in paths:
        try:
            texts.append(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path} cannot be read: {reason(error)}; convert it to UTF-8, or take it away") from None
    if sum(bool(text.strip()) for text in texts) < 2:
        kinds = ", ".join(SUFFIXES)
        raise DataError(f"{folder} holds {len(texts)} texts ({kinds}); two halves need at least 2 that say something")
    return [text for text in texts if text.strip()]


def load_model(name: str) -> tuple[Any, Any]:
    """Return a model and its tokenizer; raises ConfigError where they are not there."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        return AutoModelForCausalLM.from_pretrained(name).eval(), AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--model {name} could not be loaded: {reason(error)}") from None


def continue_text(model: Any, tokenizer: Any, prompt: str) -> str:
    asked = tokenizer(prompt, return_tensors="pt")
    written = model.generate(**asked, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return str(tokenizer.decode(written[0][asked.input_ids.shape[1] :]))


def remember_and_score(given: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--memory", type=Path, required=True, help="where the memory is saved")
    parser.add_argument("--prompt", help="a text to go on with; the beginning of the last file where it is left out")
    arguments = parser.parse_args(given)
    texts = read_folder(arguments.texts)
    if arguments.memory.exists():
        raise ConfigError(f"{arguments.memory} is there already; name another folder")
    remembered, scored = texts[: len(texts) // 2], texts[len(texts) // 2 :]

    model, tokenizer = load_model(arguments.model)
    memory = mbpa_lm.Memory(model, tokenizer)
    start = time.perf_counter()
    memory.add_documents(remembered)
    memory.save(arguments.memory)
    print(f"remembered {len(memory):,} contexts of {len(remembered)} files in {time.perf_counter() - start:.0f} s")

    plain = mbpa_lm.perplexity(model, tokenizer, scored)
    print(f"the other {len(scored)} files, {plain.words:,} words, perplexity of a word:")
    print(f"    the model alone               {plain.per_word:10.2f}")
    memory = mbpa_lm.Memory.load(arguments.memory, model, tokenizer)
    for write, label in (("nothing", "with the memory"), ("prompts", "which goes on remembering")):
        start = time.perf_counter()
        found = mbpa_lm.perplexity(model, tokenizer, scored, memory=memory, write=write)  # type: ignore[arg-type]
        speed = found.tokens / (time.perf_counter() - start)
        change = found.per_word / plain.per_word - 1
        print(f"    {label:<30}{found.per_word:10.2f}  {change:+.1%}  {speed:,.0f} tokens/s")

    prompt = arguments.prompt or " ".join(scored[-1].split()[:12])
    print(f"{prompt} ...")
    print(f"    the model alone: {continue_text(model, tokenizer, prompt)!r}")
    with mbpa_lm.adapt(model, memory), torch.no_grad():
        print(f"    with its memory: {continue_text(model, tokenizer, prompt)!r}")


if __name__ == "__main__":
    sys.exit(guarded(remember_and_score, sys.argv[1:], "the texts or the model"))
