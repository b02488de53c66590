"""What the machine, the disk and other processes can do to a run: what is kept, what is said, and the exit code.

docs/reliability.md lists them.
"""

import io
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import Tensor
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

from mbpa_lm import commands, memory_commands
from mbpa_lm.checkpoints.checkpoint import find_checkpoint, has_checkpoint
from mbpa_lm.checkpoints.tuned import being_tuned
from mbpa_lm.experts.cache import CacheExpert
from mbpa_lm.memory.base import Entries
from mbpa_lm.memory.datastore.store import Datastore
from mbpa_lm.memory.window import WindowMemory
from mbpa_lm.models.lstm import LSTMLanguageModel
from mbpa_lm.reporting import tracking
from mbpa_lm.scoring import stream, whole_pass
from mbpa_lm.system.durable import lock_open_file, take_lock
from mbpa_lm.system.mapped_files import LOST_FILE, MESSAGE
from mbpa_lm.system.out_of_memory import in_halves
from mbpa_lm.training.run import TrainingRun
from tests.conftest import GPT2

Options = Callable[..., list[str]]
KILLS = int(os.environ.get("MBPA_KILLS", "2"))


def last_error(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


# --- other processes ---


@pytest.mark.parametrize("job", ["train", "evaluate"])
def test_a_second_writer_of_a_run_folder_is_refused(
    options: Options, trained_run: Path, tmp_path: Path, job: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with (tmp_path / "log.jsonl").open("a") as first:
        lock_open_file(first)
        arguments = options(tmp_path, *(["--checkpoint", str(trained_run)] if job == "evaluate" else []))
        assert getattr(commands, job)(arguments) == 6
        assert f"run.folder {tmp_path} is being written by another process; name another folder" in last_error(capsys)
        assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]
    assert getattr(commands, job)(arguments) == 0  # and when the first is done, it is free


def test_a_run_that_is_being_trained_is_not_read_to_be_resumed(
    options: Options, trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(trained_run, tmp_path / "run")
    with (run / "log.jsonl").open("a") as first:
        lock_open_file(first)
        for resume in ([], ["--resume"]):
            assert commands.train(options(run, *resume)) == 6
            assert "is being written by another process" in last_error(capsys)


def test_what_another_process_has_trained_meanwhile_is_not_trained_over(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, begin = tmp_path / "run", TrainingRun.__init__

    def after_another(self: TrainingRun, *arguments: object) -> None:
        monkeypatch.undo()
        assert commands.train(options(folder, "--training.epochs", "1")) == 0
        begin(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(TrainingRun, "__init__", after_another)
    assert commands.train(options(folder, "--training.epochs", "1", "--run.seed", "7")) == 6
    assert f"run.folder {folder} has been written by another process meanwhile; begin again" in last_error(capsys)
    assert json.loads(next(folder.glob("checkpoints/*/training.json")).read_text())["seed"] != 7


def test_one_process_tunes_a_checkpoint(
    options: Options, trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(trained_run, tmp_path / "run")
    arguments = options(tmp_path / "scored", "--checkpoint", str(run), "--experts", "base,cache", "--tune")
    with being_tuned(find_checkpoint(run)):
        assert commands.evaluate(arguments) == 6
    assert "is being tuned by another process; wait until it is done" in last_error(capsys)


def test_one_process_merges_into_a_folder(
    options: Options, trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    build = options(tmp_path / "run", "--checkpoint", str(trained_run))
    for folder in folders:
        assert memory_commands.memory(["build", *build, "--output", str(folder)]) == 0
    merge = ["merge", *map(str, folders), "--output", str(tmp_path / "both")]
    lock = take_lock(tmp_path / ".both.lock")
    assert lock is not None
    assert memory_commands.memory(merge) == 7
    assert "both is being written by another process; wait until it is done" in last_error(capsys)
    os.close(lock)
    assert memory_commands.memory(merge) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["both", "one", "two"]


def test_what_a_stranger_put_into_a_run_folder_is_not_written_through_nor_removed(
    options: Options, trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    precious, run = tmp_path / "precious", tmp_path / "run"
    precious.write_text("mine")
    run.mkdir()
    (run / ".losses.safetensors").symlink_to(precious)
    (run / ".metrics.json.saving").symlink_to(precious)
    scoring = options(run, "--checkpoint", str(trained_run), "--experts", "base", "--evaluation.max_tokens", "50")
    assert commands.evaluate(scoring) == 0
    (run / "log.jsonl").unlink()
    (run / "log.jsonl").symlink_to(precious)
    assert commands.evaluate(scoring) == 6
    assert "log.jsonl is a link, a pipe or a device; remove it, or name another run.folder" in last_error(capsys)
    assert precious.read_text() == "mine"

    trained = options(tmp_path / "trained", "--training.save_steps", "20")
    (tmp_path / "trained" / "checkpoints" / "notes").mkdir(parents=True)
    assert commands.train(trained) == 0
    assert (tmp_path / "trained" / "checkpoints" / "notes").is_dir()
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "checkpoints").symlink_to(tmp_path)
    assert commands.train(options(tmp_path / "linked")) == 4
    assert "checkpoints is a link; checkpoints lie in their run folder" in last_error(capsys)


@pytest.fixture
def silent_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Weights & Biases server that takes every connection and answers none."""
    server = socket.create_server(("127.0.0.1", 0))
    kept: list[socket.socket] = []

    def accept() -> None:
        while True:
            try:
                kept.append(server.accept()[0])
            except OSError:
                return

    threading.Thread(target=accept, daemon=True).start()
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    yield
    server.close()


def test_a_tracker_that_never_answers_stops_nothing(
    options: Options, tmp_path: Path, silent_server: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tracking, "LONGEST_ANSWER", 3.0)
    started = time.monotonic()
    assert commands.train(options(tmp_path / "run", "--tracking.mode", "online", "--training.epochs", "1")) == 0
    assert time.monotonic() - started < 60
    assert "Weights & Biases is not available" in capsys.readouterr().out
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert any("valid/loss" in record for record in records)


# --- memory ---


def test_a_chunk_that_memory_is_too_short_for_is_halved(
    options: Options, trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--checkpoint", str(trained_run), "--experts", "base,cache", "--evaluation.max_tokens", "200"]
    assert commands.evaluate(options(tmp_path / "enough", *arguments)) == 0
    forward, targets = LSTMLanguageModel.forward, CacheExpert.target_log_probabilities

    def short_of_memory(self: LSTMLanguageModel, tokens: Tensor, state: object = None) -> object:
        if tokens.shape[1] > 50:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        return forward(self, tokens, state)  # type: ignore[arg-type]

    def short_too(self: CacheExpert, chunk: object, wanted: Tensor) -> Tensor:
        if len(wanted) > 20:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")
        return targets(self, chunk, wanted)  # type: ignore[arg-type]

    monkeypatch.setattr(LSTMLanguageModel, "forward", short_of_memory)
    monkeypatch.setattr(CacheExpert, "target_log_probabilities", short_too)
    capsys.readouterr()
    assert commands.evaluate(options(tmp_path / "short", *arguments)) == 0
    said = capsys.readouterr().out
    assert "out of memory for the model on 200 positions at once: going on with 100" in said
    assert "out of memory for expert cache-100 on" in said
    enough, short = (load_file(tmp_path / run / "losses.safetensors") for run in ("enough", "short"))
    for name in ("base", "cache-100", "cache-5000"):
        np.testing.assert_allclose(short[name], enough[name], atol=1e-5)


@pytest.mark.parametrize("where", ["the logits", "a layer"])
def test_a_transformer_whose_cache_was_written_before_memory_ended_reads_the_same(
    options: Options, tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["--model.kind", "transformer", "--model.context_length", "40", "--model.context_overlap", "8"]
    model += ["--training.sequence_length", "40", "--model.settings", json.dumps({**GPT2, "n_positions": 64})]
    assert commands.train(options(tmp_path / "run", *model, "--training.epochs", "1")) == 0
    arguments = ["--checkpoint", str(tmp_path / "run"), "--experts", "base,cache", "--evaluation.chunk_length", "25"]
    assert commands.evaluate(options(tmp_path / "enough", *arguments)) == 0
    module, name = (stream, "normalize") if where == "the logits" else (GPT2MLP, "forward")
    real, calls = getattr(module, name), [0]

    def short_of_memory(*parts: object) -> object:
        calls[0] += 1
        if calls[0] in ((7, 14) if where == "the logits" else (40, 63)):  # the first ones are to find out what it is
            raise MemoryError("9 GiB")
        return real(*parts)

    monkeypatch.setattr(module, name, short_of_memory)
    assert commands.evaluate(options(tmp_path / "short", *arguments)) == 0
    assert "out of memory for the model on 25 positions at once: going on with 13" in capsys.readouterr().out
    enough, short = (load_file(tmp_path / run / "losses.safetensors") for run in ("enough", "short"))
    for expert in ("base", "cache-500"):
        np.testing.assert_allclose(short[expert], enough[expert], atol=1e-5)


def test_a_pass_that_memory_is_too_short_for_begins_again_with_shorter_chunks(
    options: Options, trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    every = "base,mbpa,persistent,mbpa+persistent,cache,dynamic"
    arguments = ["--checkpoint", str(trained_run), "--experts", every, "--evaluation.max_tokens", "200"]
    arguments += ["--evaluation.chunk_length", "200"]
    assert commands.evaluate(options(tmp_path / "enough", *arguments, "--evaluation.chunk_length", "50")) == 0
    write = WindowMemory.read_and_write

    def short_of_memory(self: WindowMemory, entries: Entries, *more: object) -> object:
        if len(entries.values) > 50 or (len(entries.values) == 50 and len(self) == 100):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        return write(self, entries, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(WindowMemory, "read_and_write", short_of_memory)
    capsys.readouterr()
    assert commands.evaluate(options(tmp_path / "short", *arguments, "--verify", "2")) == 0
    said = capsys.readouterr().out
    for before, after in ((200, 100), (100, 50), (50, 25)):
        assert f"out of memory on {before} positions at once: beginning again with {after}" in said
    enough, short = (load_file(tmp_path / run / "losses.safetensors") for run in ("enough", "short"))
    assert set(short) == set(enough)
    for name in short:
        np.testing.assert_allclose(short[name], enough[name], atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device on this machine")
def test_a_gpu_that_is_too_small_for_a_chunk_is_given_halves(
    options: Options, trained_run: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "long.txt").write_text((corpus / "train.txt").read_text() * 25)
    arguments = ["--checkpoint", str(trained_run), "--experts", "base,mbpa,cache", "--evaluation.chunk_length", "100000"]
    arguments += ["--evaluation.text", str(tmp_path / "long.txt"), "--run.device", "cuda"]
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    assert commands.evaluate(options(tmp_path / "enough", *arguments)) == 0
    assert "out of memory" not in capsys.readouterr().out
    peak = torch.cuda.max_memory_reserved()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.6 * peak / torch.cuda.mem_get_info()[1])
    try:
        assert commands.evaluate(options(tmp_path / "short", *arguments)) == 0
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    said = capsys.readouterr().out
    print(said)  # the halvings, for whoever runs it with -s
    assert "out of memory for" in said
    enough, short = (load_file(tmp_path / run / "losses.safetensors") for run in ("enough", "short"))
    for name in ("base", "mbpa", "cache-100", "cache-500", "cache-5000"):  # a gate makes more of what rounding began
        np.testing.assert_allclose(short[name], enough[name], atol=1e-3)


def test_a_text_that_memory_is_too_short_for_is_remembered_in_smaller_parts(
    options: Options, trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    build = ["build", *options(tmp_path / "run"), "--checkpoint", str(trained_run), "--memory.key_type", "float32"]
    assert memory_commands.memory([*build, "--output", str(tmp_path / "enough")]) == 0
    forward = LSTMLanguageModel.forward

    def short_of_memory(self: LSTMLanguageModel, tokens: Tensor, state: object = None) -> object:
        if tokens.numel() > 500:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        return forward(self, tokens, state)  # type: ignore[arg-type]

    monkeypatch.setattr(LSTMLanguageModel, "forward", short_of_memory)
    capsys.readouterr()
    assert memory_commands.memory([*build, "--output", str(tmp_path / "short")]) == 0
    said = capsys.readouterr().out
    assert "out of memory for the model: going on with half as many positions at once" in said
    enough, short = (Datastore.open(tmp_path / name) for name in ("enough", "short"))
    torch.testing.assert_close(*(store.entries_between(0, len(store))[0].keys for store in (enough, short)), atol=1e-5, rtol=0)
    monkeypatch.setattr(LSTMLanguageModel, "forward", lambda self, tokens, state=None: (_ for _ in ()).throw(MemoryError("no")))
    assert memory_commands.memory([*build, "--output", str(tmp_path / "none")]) == 10
    assert last_error(capsys).startswith("error: out of memory (no); make the model (--model.dtype bfloat16)")


def test_where_one_position_is_too_much_it_is_said_in_one_line(
    options: Options, trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def never(self: LSTMLanguageModel, tokens: Tensor, state: object = None) -> object:
        raise MemoryError("no room for an LSTM")

    monkeypatch.setattr(LSTMLanguageModel, "forward", never)
    assert commands.evaluate(options(tmp_path, "--checkpoint", str(trained_run), "--experts", "base")) == 10
    message = (
        "error: out of memory (no room for an LSTM); make evaluation.chunk_length, memory.size, memory.neighbours or "
        "adaptation.steps smaller"
    )
    assert message in capsys.readouterr().err


def test_halves_are_done_once_each_and_in_order() -> None:
    done: list[int] = []

    def work(part: slice) -> None:
        if part.stop - part.start > 3:
            raise MemoryError
        done.extend(range(part.start, part.stop))

    list(in_halves(work, 17, "a test"))
    assert done == list(range(17))
    with pytest.raises(RuntimeError, match="another"):
        list(in_halves(lambda part: (_ for _ in ()).throw(RuntimeError("another")), 4, "a test"))


# --- the disk ---


def test_a_folder_that_cannot_be_written_is_refused(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A read-only file system, as root may write into any folder."""
    real = Path.mkdir

    def mkdir(self: Path, *arguments: object, **more: object) -> None:
        if self == tmp_path / "run":
            raise OSError(30, os.strerror(30))
        real(self, *arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "mkdir", mkdir)
    assert commands.train(options(tmp_path / "run")) == 6
    assert "cannot be written: Read-only file system; name another folder" in last_error(capsys)


@pytest.mark.parametrize("error", [OSError(28, os.strerror(28)), BrokenPipeError(32, os.strerror(32))], ids=type)
def test_output_that_cannot_be_written_is_no_fault_of_the_package(
    options: Options, tmp_path: Path, error: OSError, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(text: str) -> int:
        raise error

    broken = io.StringIO()
    monkeypatch.setattr(broken, "write", fail)
    monkeypatch.setattr(sys, "stdout", broken)
    assert commands.train(options(tmp_path / "run")) == 12
    assert f"output could not be written ({error.strerror}); send it elsewhere" in last_error(capsys)


@pytest.mark.parametrize("fate", ["deleted", "truncated"])
def test_a_token_file_that_goes_away_while_it_is_read_is_built_again(
    options: Options, tmp_path: Path, fate: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = tmp_path / "tokens"
    step = TrainingRun._step
    files: list[Path] = []

    def step_and_lose(run: TrainingRun, *batch: object) -> float:
        if run.position.step == 3 and not files:
            files.extend(tokens.glob("*-train-*/tokens.bin"))
            for file in files:
                file.unlink()  # what is mapped stays until it is closed
                if fate == "truncated":
                    file.write_bytes(b"\0" * 10)
        return step(run, *batch)  # type: ignore[arg-type]

    monkeypatch.setattr(TrainingRun, "_step", step_and_lose)
    arguments = ["--data.token_folder", str(tokens), "--training.epochs", "1"]
    assert commands.train(options(tmp_path / "one", *arguments)) == 0
    assert files
    capsys.readouterr()
    assert commands.train(options(tmp_path / "two", *arguments)) == 3
    error = last_error(capsys)
    assert "delete it and it will be built again" in error
    folder = re.search(r"token file (\S+) is damaged", error)
    assert folder is not None
    for file in Path(folder[1]).iterdir():
        file.unlink()
    Path(folder[1]).rmdir()
    assert commands.train(options(tmp_path / "two", *arguments)) == 0


def _train_and_lose(folder: Path, said: Path, arguments: list[str]) -> None:
    step = TrainingRun._step

    def step_and_lose(run: TrainingRun, *batch: object) -> float:
        if run.position.step == 3:
            _cut_off(folder)
        return step(run, *batch)  # type: ignore[arg-type]

    TrainingRun._step = step_and_lose  # type: ignore[method-assign]
    os.dup2(os.open(said, os.O_CREAT | os.O_WRONLY), 2)
    raise SystemExit(commands.train(arguments))


def _evaluate_and_lose(folder: Path, said: Path, arguments: list[str]) -> None:
    score_stream = whole_pass.score_stream

    def lose_and_score(*parts: object) -> object:
        _cut_off(folder)
        return score_stream(*parts)  # type: ignore[arg-type]

    whole_pass.score_stream = lose_and_score  # type: ignore[assignment]
    os.dup2(os.open(said, os.O_CREAT | os.O_WRONLY), 2)
    raise SystemExit(commands.evaluate(arguments))


def _cut_off(folder: Path) -> None:
    for path in folder.rglob("*.bin"):
        os.truncate(path, 0)


def test_a_mapped_file_that_is_cut_off_in_place_ends_the_process_with_a_line(
    options: Options, trained_run: Path, tmp_path: Path
) -> None:
    """A text in training, and a memory in an evaluation, which compiled loops of several threads read."""
    run, memory = tmp_path / "run", tmp_path / "memory"
    training = options(run, "--data.token_folder", str(tmp_path / "tokens"), "--training.save_steps", "2")
    scoring = options(tmp_path / "scored", "--checkpoint", str(trained_run))
    assert memory_commands.memory(["build", *scoring, "--output", str(memory)]) == 0
    scoring += ["--experts", "base,mbpa", "--memory.datastores", f"[{memory}]"]
    for target, folder, arguments in ((_train_and_lose, tmp_path / "tokens", training), (_evaluate_and_lose, memory, scoring)):
        said = tmp_path / f"{target.__name__}.txt"
        process = _started(target, folder, said, arguments)
        process.join(120)
        assert process.exitcode == LOST_FILE
        assert said.read_text().splitlines()[-1] == MESSAGE.strip()
    assert has_checkpoint(run)
    shutil.rmtree(tmp_path / "tokens")
    assert commands.train([*training, "--resume"]) == 0


# --- the clock and signals ---


def test_a_clock_that_goes_backwards_changes_nothing(
    options: Options, trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [2e9]

    def backwards() -> float:
        now[0] -= 3600
        return now[0]

    arguments = ["--checkpoint", str(trained_run), "--experts", "base,mbpa", "--evaluation.max_tokens", "100"]
    assert commands.evaluate(options(tmp_path / "forwards", *arguments)) == 0
    monkeypatch.setattr(time, "time", backwards)
    assert commands.train(options(tmp_path / "run", "--training.epochs", "1")) == 0
    assert commands.evaluate(options(tmp_path / "backwards", *arguments)) == 0
    metrics = json.loads((tmp_path / "backwards" / "metrics.json").read_text())
    assert all(values["seconds"] > 0 for values in metrics["experts"].values())
    one, two = (load_file(tmp_path / run / "losses.safetensors") for run in ("forwards", "backwards"))
    np.testing.assert_array_equal(one["mbpa"], two["mbpa"])


def _evaluate(arguments: list[str]) -> None:
    raise SystemExit(commands.evaluate(arguments))


def _remember(arguments: list[str]) -> None:
    raise SystemExit(memory_commands.memory(arguments))


def _started(target: Callable[..., None], *arguments: object) -> BaseProcess:
    context = multiprocessing.get_context("forkserver")  # it has imported everything, and never run anything
    context.set_forkserver_preload([__name__])
    process = context.Process(target=target, args=arguments, daemon=True)
    process.start()
    return process


def _interrupt(target: Callable[[list[str]], None], arguments: list[str], number: signal.Signals, seconds: float) -> int | None:
    process = _started(target, arguments)
    process.join(seconds)
    if process.is_alive():
        assert process.pid is not None
        os.kill(process.pid, number)
    process.join(60)
    return process.exitcode


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_whenever_an_evaluation_is_stopped_its_results_are_whole_or_the_earlier_ones(
    options: Options, trained_run: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    arguments = options(tmp_path / "scored", "--checkpoint", str(trained_run), "--run.threads", "1")
    assert commands.evaluate(arguments) == 0
    earlier = load_file(tmp_path / "scored" / "losses.safetensors")
    generator = random.Random(KILLS)
    for _ in range(KILLS):
        ended = _interrupt(_evaluate, arguments, number, generator.uniform(0.5, 6.0))
        assert ended in (0, code, -number, *([1] if number == signal.SIGINT else []))  # the last two before it has begun
        json.loads((tmp_path / "scored" / "metrics.json").read_text())
        now = load_file(tmp_path / "scored" / "losses.safetensors")
        assert all(np.array_equal(earlier[name], values) for name, values in now.items())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_whenever_a_memory_build_is_stopped_the_same_command_goes_on(
    options: Options, trained_run: Path, tmp_path: Path, number: signal.Signals
) -> None:
    def arguments(folder: Path) -> list[str]:
        return ["build", *options(tmp_path / "run", "--checkpoint", str(trained_run), "--output", str(folder))]

    assert memory_commands.memory(arguments(tmp_path / "whole")) == 0
    generator = random.Random(KILLS)
    for _ in range(KILLS):
        _interrupt(_remember, arguments(tmp_path / "broken"), number, generator.uniform(0.2, 4.0))
    assert memory_commands.memory(arguments(tmp_path / "broken")) == 0
    whole, broken = (Datastore.open(tmp_path / name) for name in ("whole", "broken"))
    assert broken.damaged() is None
    assert len(whole) == len(broken)
    one, two = (store.entries_between(0, len(store))[0] for store in (whole, broken))
    assert torch.equal(one.keys, two.keys)
    assert torch.equal(one.values, two.values)


def test_a_fault_of_the_package_is_one_line_and_a_traceback_on_demand(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> float:
        return [][1]

    monkeypatch.setattr(TrainingRun, "_step", broken)
    assert commands.train(options(tmp_path / "one")) == 70
    assert re.search(r"^error: IndexError at test_faults\.py:\d+: list index out of range; this is a fault", last_error(capsys))
    assert commands.train(options(tmp_path / "two", "--debug")) == 70
    assert "Traceback (most recent call last)" in capsys.readouterr().err
