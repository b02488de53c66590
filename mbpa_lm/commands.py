"""The command lines: parse, call, report. What they do is in training/ and evaluation.py."""

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings
from jsonargparse.typing import PositiveInt

from mbpa_lm.config import Config
from mbpa_lm.errors import ConfigError, MbpaError, Terminated, did_you_mean, reason

INTERRUPTED, OUT_OF_MEMORY, UNEXPECTED = 130, 10, 70
"""Exit codes beside those of the errors (errors.py): Ctrl-C, no memory left, and a fault of this package."""

DEBUG = "--debug"
OPEN_KEYS = ("model.settings", "mixture.weights")
"""Keys under which any name may stand."""


def train(arguments: Sequence[str] | None = None) -> int:
    """Run `train.py` with the given arguments and return its exit code."""
    return guarded(_train, sys.argv[1:] if arguments is None else arguments)


def _train(arguments: Sequence[str]) -> None:
    parser = make_parser("train.py", "Train a language model.")
    resume = "Go on with the run in run.folder, or begin it where there is none; --resume auto says the same."
    parser.add_argument("--resume", nargs="?", const="auto", choices=["auto"], help=resume)
    config, options = parse(parser, arguments)
    prepare_machine(config)
    from mbpa_lm.reporting.metrics import perplexity
    from mbpa_lm.system.progress import console
    from mbpa_lm.training import train

    result = train(config, options["resume"] is not None)
    best, minutes = perplexity(result.best_validation_loss), result.seconds / 60
    console.print(f"best checkpoint: {result.checkpoint}, validation perplexity {best:.2f}, {minutes:.1f} min of training")


def evaluate(arguments: Sequence[str] | None = None) -> int:
    """Run `evaluate.py` with the given arguments and return its exit code."""
    return guarded(_evaluate, sys.argv[1:] if arguments is None else arguments)


def _evaluate(arguments: Sequence[str]) -> None:
    parser = make_parser("evaluate.py", "Score a held-out text with a trained model, with and without its memory.")
    parser.add_argument(
        "--checkpoint", type=str, help="Run folder or checkpoint folder that train.py wrote (required, or model.pretrained)."
    )
    parser.add_argument(
        "--tune", action="store_true", help="Tune the experts on the validation text first, and keep what is best."
    )
    verify = "Score so many random positions (3) again from scratch without their future; any difference is an error."
    parser.add_argument("--verify", type=PositiveInt, nargs="?", const=3, help=verify)
    parser.add_argument("--experts", type=str, help="The same as evaluation.experts, as names between commas.")
    config, options = parse(parser, arguments)
    if options["experts"] is not None:
        evaluation = replace(config.evaluation, experts=[name.strip() for name in options["experts"].split(",")])
        config = replace(config, evaluation=evaluation)
    check_one_model(config, options)
    if not config.model.pretrained and not options["checkpoint"]:
        raise ConfigError("--checkpoint is missing; name the run folder that train.py wrote, for example runs/demo")
    prepare_machine(config, keep_memory=not config.memory.resident_gib)
    from mbpa_lm.evaluation import evaluate

    path = Path(options["checkpoint"]) if options["checkpoint"] else None
    evaluate(config, path, options["tune"], options["verify"] or 0)


def check_one_model(config: Config, options: dict[str, Any]) -> None:
    """Raise ConfigError where a checkpoint and a pretrained model are both named."""
    if config.model.pretrained and options["checkpoint"]:
        raise ConfigError("--checkpoint and --model.pretrained name two models; give one of them")


def parse(parser: ArgumentParser, arguments: Sequence[str]) -> tuple[Config, dict[str, Any]]:
    """Parse arguments and YAML files into a checked Config and the parser's other options.

    Raises ConfigError naming the key that is wrong, and the nearest valid one where it is misspelt.
    """
    sections = {section.name for section in fields(Config)}
    valid = _valid_keys()
    others = {action.dest for action in parser._actions if action.dest.split(".")[0] not in sections}
    for argument in arguments:
        if argument.startswith("--"):
            _check_key(argument[2:].split("=", 1)[0].removesuffix("+"), valid | others | sections, "option --")
    for path in _config_files(arguments):
        for key in _yaml_keys(path):
            _check_key(key, valid, f"{path}: ")
    try:
        namespace = parser.parse_args(list(arguments))
        made = parser.instantiate(namespace)
    except ArgumentError as error:
        raise ConfigError(reason(error)) from None
    config = Config(**{name: getattr(made, name) for name in sections})
    return config, {name: getattr(made, name) for name in others if hasattr(made, name)}


def make_parser(program: str, description: str) -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    usage = "%(prog)s --config FILE [--section.name VALUE ...]"
    parser = ArgumentParser(prog=program, description=description, usage=usage, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file of values; what follows on the command line wins.")
    parser.add_argument(DEBUG, action="store_true", help="Where it fails, show where in the code too.")
    for section in fields(Config):
        parser.add_class_arguments(section.type, section.name)
    return parser


def guarded(command: Callable[[Sequence[str]], None], arguments: Sequence[str]) -> int:
    """Run a command and return its exit code; what went wrong is said in one line, and with `--debug` where in the code."""
    debug = DEBUG in arguments
    try:
        with _termination_as_error():
            command([argument for argument in arguments if argument != DEBUG])
    except MbpaError as error:
        return _failed(str(error), error.exit_code, debug)
    except KeyboardInterrupt:
        print("interrupted; what was saved before is whole", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        from mbpa_lm.system.out_of_memory import is_out_of_memory

        if is_out_of_memory(error):
            smaller = "training.batch_size, evaluation.chunk_length or memory.size"
            return _failed(f"out of memory ({reason(error)}); make {smaller} smaller", OUT_OF_MEMORY, debug)
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(place.filename).name}:{place.lineno}"
        text = f"{type(error).__name__} at {where}: {reason(error)}; this is a fault of mbpa_lm, {DEBUG} shows all of it"
        return _failed(text, UNEXPECTED, debug)
    return 0


def _failed(text: str, exit_code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"error: {text}", file=sys.stderr)
    return exit_code


@contextmanager
def _termination_as_error() -> Iterator[None]:
    """Turn SIGTERM into an error that unwinds what is open, where nothing else has been arranged for."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise Terminated("stopped by SIGTERM; what was saved before is whole")

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def prepare_machine(config: Config, keep_memory: bool = True) -> None:
    """Set threads and the C library up, freed memory kept or not, and what is said where a mapped file is lost.

    Raises ConfigError where a CUDA device is not there.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch

    from mbpa_lm.system.machine import keep_freed_memory, return_freed_memory
    from mbpa_lm.system.mapped_files import say_what_a_bus_error_is

    say_what_a_bus_error_is()
    if keep_memory:
        keep_freed_memory()
    else:
        return_freed_memory()
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    if config.run.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("run.device is cuda, but PyTorch sees no CUDA device; use cpu or auto")


def _valid_keys() -> set[str]:
    return {f"{section.name}.{value.name}" for section in fields(Config) for value in fields(section.type)}  # type: ignore[arg-type]


def _check_key(key: str, valid: set[str], where: str) -> None:
    if key in valid or key == "help" or any(key.startswith(f"{name}.") for name in OPEN_KEYS):
        return
    raise ConfigError(f"{where}{key} does not exist; {did_you_mean(key, valid)}")


def _config_files(arguments: Sequence[str]) -> list[str]:
    files = [argument.split("=", 1)[1] for argument in arguments if argument.startswith("--config=")]
    return files + [value for option, value in zip(arguments, arguments[1:], strict=False) if option == "--config"]


def _yaml_keys(path: str) -> list[str]:
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.safe_load(file) or {}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} cannot be read: {reason(error)}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {path} is not valid YAML: {reason(error)}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"--config {path} holds no sections; see configs/ for examples")
    keys = []
    for section, values in content.items():
        if section in {item.name for item in fields(Config)}:
            if not isinstance(values, dict):
                raise ConfigError(f"--config {path}: {section} holds no values; leave it out, or give some by name")
            keys += [f"{section}.{name}" for name in values]
        else:
            keys.append(str(section))
    return keys
