"""A model of transformers reads half of a folder of text files, and predicts the other half better for it.

    python examples/folder_of_texts.py --model NAME_OR_FOLDER --texts FOLDER --memory memories/texts

The first half of the files, in the order of their names, becomes a memory that is saved; the second half is scored by the model
alone, with that memory, and with that memory and what has been read of the second half so far. Without a model and texts of
your own, examples/python_documentation.py makes both from what lies on this machine.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

import mbpa_lm


def read_folder(folder: Path) -> list[str]:
    """Return the texts of all files under a folder, in the order of their names."""
    return [path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*.txt"))]


def continue_text(model: Any, tokenizer: Any, prompt: str) -> str:
    asked = tokenizer(prompt, return_tensors="pt")
    written = model.generate(**asked, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return str(tokenizer.decode(written[0][asked.input_ids.shape[1] :]))


def main() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--memory", type=Path, required=True, help="where the memory is saved")
    parser.add_argument("--prompt", help="a text to go on with; the beginning of the last file where it is left out")
    arguments = parser.parse_args()
    texts = read_folder(arguments.texts)
    if len(texts) < 2:
        sys.exit(f"error: {arguments.texts} holds {len(texts)} .txt files; two halves need at least 2")
    if arguments.memory.exists():
        sys.exit(f"error: {arguments.memory} is there already; name another folder")
    remembered, scored = texts[: len(texts) // 2], texts[len(texts) // 2 :]

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model).eval()
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
    main()
