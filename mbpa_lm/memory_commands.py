"""`mbpa-memory`: datastores made, added to, looked at, checked, joined and copied out, from the command line."""

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser
from jsonargparse.typing import NonNegativeFloat

from mbpa_lm.commands import check_one_model, guarded, prepare_machine
from mbpa_lm.errors import ConfigError, did_you_mean, reason
from mbpa_lm.options import explained, make_parser, parse

USAGE = """usage: mbpa-memory COMMAND ...

  build   --checkpoint RUN --output FOLDER [--text PATH]   a memory of the training text, or of a file or folder of text
          --model NAME, for --checkpoint RUN,              of a model of transformers: its name on the hub, or its folder
  add     --checkpoint RUN --output FOLDER --text PATH     more text into a memory
  index   FOLDER [--kind KIND]                             an index over all entries there are now
  compact FOLDER                                           its keys in the index alone, which are half of its size
  info    FOLDER                                           what a memory is
  verify  FOLDER                                           whether every byte is what was written
  merge   FOLDER FOLDER ... --output FOLDER                several memories of one model as one
  export  FOLDER --output FILE.safetensors                 the entries as tensors

mbpa-memory COMMAND --help says more. A build or an addition that was interrupted goes on with the same command."""

KINDS = ("auto", "flat", "ivf_flat", "ivf_pq", "hnsw", "cagra")


def memory(arguments: Sequence[str] | None = None) -> int:
    """Run `mbpa-memory` with the given arguments and return its exit code."""
    return guarded(_memory, sys.argv[1:] if arguments is None else arguments, "the model (--model.dtype bfloat16)")


def _memory(arguments: Sequence[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return
    command = COMMANDS.get(arguments[0])
    if command is None:
        raise ConfigError(f"mbpa-memory {arguments[0]} does not exist; {did_you_mean(arguments[0], COMMANDS)}")
    command(arguments[1:])


def _build(arguments: Sequence[str]) -> None:
    _remember("build", "Write what a text leaves behind in a model into a new memory.", arguments)


def _add(arguments: Sequence[str]) -> None:
    _remember("add", "Write what more text leaves behind in a model into a memory.", arguments)


def _remember(command: str, description: str, arguments: Sequence[str]) -> None:
    parser = make_parser(f"mbpa-memory {command}", description)
    parser.add_argument(
        "--checkpoint", type=str, help="Run or checkpoint folder that train.py wrote (required, or model.pretrained)."
    )
    parser.add_argument("--output", type=str, help="Folder of the memory (required).")
    training = " (required)." if command == "add" else "; the training text where it is left out."
    parser.add_argument("--text", type=str, help=f"Text file, or folder of files{training}")
    names_model = [re.sub("^--model(=|$)", r"--model.pretrained\1", argument) for argument in arguments]
    config, options = parse(parser, names_model)
    check_one_model(config, options)
    checkpoint = [] if config.model.pretrained else ["checkpoint"]
    for name in (*checkpoint, "output", *(["text"] if command == "add" else [])):
        if not options[name]:
            raise ConfigError(f"--{name} is missing; mbpa-memory {command} --help says what it is")
    prepare_machine(config, keep_memory=not config.memory.resident_gib)
    from mbpa_lm.remembering.building import add_to_memory, build_memory

    path, output = Path(options["checkpoint"]) if options["checkpoint"] else None, Path(options["output"])
    if command == "add":
        add_to_memory(config, path, output, Path(options["text"]))
    else:
        build_memory(config, path, output, Path(options["text"]) if options["text"] else None)


def _index(arguments: Sequence[str]) -> None:
    parser = _parser("index", "Index all entries that a memory has now.", "folder")
    parser.add_argument("--kind", type=str, default="auto", help=", ".join(KINDS))
    _add_limit(parser)
    options = _prepare(parser, arguments)
    if options.kind not in KINDS:
        raise ConfigError(f"--kind is {options.kind!r}; {did_you_mean(options.kind, KINDS)}")
    from mbpa_lm.remembering.building import index_memory

    kind = None if options.kind == "auto" else options.kind
    index_memory(Path(options.folder), kind, options.resident_gib)


def _compact(arguments: Sequence[str]) -> None:
    description = "Keep the keys of a memory in its index alone, as exact as it keeps them; they cannot be had back."
    options = _prepare(_parser("compact", description, "folder"), arguments)
    from mbpa_lm.remembering.building import compact_memory

    compact_memory(Path(options.folder))


def _info(arguments: Sequence[str]) -> None:
    options = _prepare(_parser("info", "Say what a memory is.", "folder"), arguments)
    from mbpa_lm.remembering.building import show_memory

    show_memory(Path(options.folder))


def _verify(arguments: Sequence[str]) -> None:
    options = _prepare(_parser("verify", "Read all of a memory and compare it with what was written.", "folder"), arguments)
    from mbpa_lm.remembering.building import verify_memory

    verify_memory(Path(options.folder))


def _merge(arguments: Sequence[str]) -> None:
    parser = _parser("merge", "Copy several memories of one model into a new one.")
    parser.add_argument("folders", type=str, nargs="+", help="Memories to be copied.")
    parser.add_argument("--output", type=str, required=True, help="Folder of the new memory.")
    _add_limit(parser)
    options = _prepare(parser, arguments)
    from mbpa_lm.remembering.building import merge_memories

    merge_memories([Path(folder) for folder in options.folders], Path(options.output), options.resident_gib)


def _export(arguments: Sequence[str]) -> None:
    parser = _parser("export", "Copy the entries of a memory into a safetensors file.", "folder")
    parser.add_argument("--output", type=str, required=True, help="File to be written.")
    options = _prepare(parser, arguments)
    from mbpa_lm.remembering.building import export_memory

    export_memory(Path(options.folder), Path(options.output))


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "build": _build,
    "add": _add,
    "index": _index,
    "compact": _compact,
    "info": _info,
    "verify": _verify,
    "merge": _merge,
    "export": _export,
}


def _parser(command: str, description: str, *folders: str) -> ArgumentParser:
    parser = ArgumentParser(prog=f"mbpa-memory {command}", description=description, exit_on_error=False)
    for name in folders:
        parser.add_argument(name, type=str, help="Folder of the memory.")
    return parser


def _add_limit(parser: ArgumentParser) -> None:
    explained = "Resident memory to stay under; the index is chosen to fit. 0: no limit."
    parser.add_argument("--resident_gib", type=NonNegativeFloat, default=0.0, help=explained)


def _prepare(parser: ArgumentParser, arguments: Sequence[str]) -> Any:
    """Return the parsed options, ready to read a memory's files."""
    try:
        options = parser.parse_args(list(arguments))
    except ArgumentError as error:
        raise ConfigError(explained(reason(error))) from None
    from mbpa_lm.system.mapped_files import say_what_a_bus_error_is

    say_what_a_bus_error_is()
    return options
