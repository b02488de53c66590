"""The command lines: parse, call, report. What they do is in training/ and evaluation.py."""

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from mbpa_lm.config import Config
from mbpa_lm.config.checks import require
from mbpa_lm.errors import ConfigError, MbpaError, Terminated, reason
from mbpa_lm.options import DEBUG, given_keys, make_parser, names_of, parse

MOST_VERIFIED = 1000
"""Positions of `--verify`, each of which takes as long as the stream before it."""

INTERRUPTED, OUT_OF_MEMORY, UNEXPECTED = 130, 10, 70
"""Exit codes beside those of the errors (errors.py): Ctrl-C, no memory left, and a fault of this package."""


def train(arguments: Sequence[str] | None = None) -> int:
    """Run `train.py` with the given arguments and return its exit code."""
    memory_takers = "training.batch_size, training.sequence_length or the model (model.hidden_size, model.settings)"
    return guarded(_train, sys.argv[1:] if arguments is None else arguments, memory_takers)


def _train(arguments: Sequence[str]) -> None:
    parser = make_parser("train.py", "Train a language model.")
    resume = "Go on with the run in run.folder, or begin it where there is none; --resume auto says the same."
    parser.add_argument("--resume", nargs="?", const="auto", choices=["auto"], help=resume)
    config, options = parse(parser, arguments)
    prepare_machine(config)
    from mbpa_lm.numerics.perplexities import perplexity
    from mbpa_lm.system.progress import console
    from mbpa_lm.training import train

    result = train(config, options["resume"] is not None)
    best, minutes = perplexity(result.best_validation_loss), result.seconds / 60
    console.print(f"best checkpoint: {result.checkpoint}, validation perplexity {best:.2f}, {minutes:.1f} min of training")


def evaluate(arguments: Sequence[str] | None = None) -> int:
    """Run `evaluate.py` with the given arguments and return its exit code."""
    memory_takers = "evaluation.chunk_length, memory.size, memory.neighbours or adaptation.steps"
    return guarded(_evaluate, sys.argv[1:] if arguments is None else arguments, memory_takers)


def _evaluate(arguments: Sequence[str]) -> None:
    parser = make_parser("evaluate.py", "Score a held-out text with a trained model, with and without its memory.")
    parser.add_argument(
        "--checkpoint", type=str, help="Run folder or checkpoint folder that train.py wrote (required, or model.pretrained)."
    )
    parser.add_argument(
        "--tune", action="store_true", help="Tune the experts on the validation text first, and keep what is best."
    )
    verify = "Score so many random positions (3) again from scratch without their future; any difference is an error."
    parser.add_argument("--verify", type=int, nargs="?", const=3, default=0, help=verify)
    parser.add_argument("--experts", type=str, help="The same as evaluation.experts, as names between commas.")
    config, options = parse(parser, arguments)
    verified, most = options["verify"], f"from 1 to {MOST_VERIFIED:,}: each scores the stream from its beginning"
    require("--verify", verified, "--verify" not in names_of(arguments) or 0 < verified <= MOST_VERIFIED, most)
    if options["experts"] is not None:
        if "--evaluation.experts" in names_of(arguments):
            raise ConfigError("--experts and --evaluation.experts say the same; give one of them")
        evaluation = replace(config.evaluation, experts=[name.strip() for name in options["experts"].split(",")])
        config = replace(config, evaluation=evaluation)
    check_one_model(config, options)
    if not config.model.pretrained and not options["checkpoint"]:
        raise ConfigError("--checkpoint is missing; name the run folder that train.py wrote, for example runs/demo")
    prepare_machine(config, keep_memory=not config.memory.resident_gib)
    from mbpa_lm.evaluation import evaluate
    from mbpa_lm.system.machine import compute_repeatably

    if verified:
        compute_repeatably(config.run.device)
    path = Path(options["checkpoint"]) if options["checkpoint"] else None
    if path is not None:
        from mbpa_lm.checkpoints.checkpoint import find_checkpoint, with_saved_settings

        config = with_saved_settings(config, find_checkpoint(path), given_keys(arguments))
    evaluate(config, path, options["tune"], verified)


def check_one_model(config: Config, options: dict[str, Any]) -> None:
    """Raise ConfigError where a checkpoint and a pretrained model are both named."""
    if config.model.pretrained and options["checkpoint"]:
        raise ConfigError("--checkpoint and --model.pretrained name two models; give one of them")


def guarded(command: Callable[[Sequence[str]], None], arguments: Sequence[str], memory_takers: str) -> int:
    """Run a command and return its exit code; what went wrong is said in one line, and with `--debug` where in the code.

    Args: memory_takers: settings that are to be made smaller where memory does not do.
    """
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
            return _failed(f"out of memory ({reason(error)}); make {memory_takers} smaller", OUT_OF_MEMORY, debug)
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

    Raises ConfigError where a CUDA device is not there, DatastoreError where an index cannot be made or searched as asked.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # it tells of every retry, and the error says it all
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
    if config.memory.gpus != "none" or config.memory.index == "cagra":
        from mbpa_lm.memory.datastore.index import check_available

        check_available(None if config.memory.index == "auto" else config.memory.index, config.memory.gpus)
