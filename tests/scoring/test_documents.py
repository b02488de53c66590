"""Documents as streams of their own: what is scored of each, and by how many processes."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from mbpa_lm import commands
from mbpa_lm.system.processes import Processes

Options = Callable[..., list[str]]
ROOT = Path(__file__).parents[2]
PATTERN = ["--data.document_pattern", " = Document .*"]
INDEPENDENT = [*PATTERN, "--evaluation.independent", "true", "--run.device", "cpu"]


@pytest.fixture(scope="module")
def titled_run(options: Options, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "titled"
    assert commands.train(options(run, *PATTERN)) == 0
    return run


def scored(run: Path) -> tuple[dict, dict[str, np.ndarray]]:
    return json.loads((run / "metrics.json").read_text()), load_file(run / "losses.safetensors")


def test_each_document_is_scored_as_if_it_were_the_only_text_and_processes_share_them(
    options: Options, titled_run: Path, corpus: Path, tmp_path: Path
) -> None:
    arguments = ["--checkpoint", str(titled_run), *INDEPENDENT, "--run.threads", "1", "--verify", "4"]
    assert commands.evaluate(options(tmp_path / "one", *arguments)) == 0
    metrics, losses = scored(tmp_path / "one")
    assert metrics["verified_positions"][-1] > metrics["stream"]["scored"] // 8  # beyond the first document
    documents = (corpus / "test.txt").read_text().split(" = Document ")[1:]
    assert metrics["independent_documents"] == len(documents) == 8
    assert metrics["stream"]["scored"] == metrics["stream"]["tokens"] - 8

    begin = 0
    for number, document in enumerate(documents[:2]):
        path = tmp_path / f"{number}.txt"
        path.write_text(f" = Document {document}")
        alone = ["--checkpoint", str(titled_run), *PATTERN, "--evaluation.text", str(path), "--run.threads", "1"]
        assert commands.evaluate(options(tmp_path / str(number), *alone)) == 0
        metrics_alone, losses_alone = scored(tmp_path / str(number))
        end = begin + metrics_alone["stream"]["scored"]
        for name, values in losses_alone.items():
            np.testing.assert_array_equal(losses[name][begin:end], values)
        begin = end

    launched = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "evaluate.py",
         *options(tmp_path / "two", *arguments)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert launched.returncode == 0, launched.stderr
    assert launched.stdout.count("written to") == 1
    shared, shared_losses = scored(tmp_path / "two")
    assert shared["processes"] == 2
    assert shared["verified_positions"] == metrics["verified_positions"]
    for name, values in losses.items():
        np.testing.assert_array_equal(shared_losses[name], values)
    timed = {"seconds", "tokens_per_second"}
    for name, values in metrics["experts"].items():
        assert {key: value for key, value in values.items() if key not in timed} == {
            key: value for key, value in shared["experts"][name].items() if key not in timed
        }
    assert shared["gate"] == metrics["gate"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "2 processes cannot share one stream; add --evaluation.independent true, or start one process"),
        ([*INDEPENDENT, "--evaluation.max_tokens", "5"], "2 processes cannot share 1 documents; start fewer"),
        ([*INDEPENDENT, "--tune"], "--tune is for one process; tune first, then evaluate with several"),
    ],
)
def test_what_processes_cannot_share_is_refused(
    options: Options,
    titled_run: Path,
    tmp_path: Path,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(Processes, "count", 2, raising=False)
    monkeypatch.setattr(Processes, "__init__", lambda self, device: self.__dict__.update(rank=0, device="cpu"))
    assert commands.evaluate(options(tmp_path, "--checkpoint", str(titled_run), *PATTERN, *arguments)) == 2
    assert f"error: {message}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (INDEPENDENT, "evaluation.independent begins each document with an empty memory"),
        (["--verify"], "--verify begins again with an empty memory, and a database remembers; leave remote.address out"),
    ],
)
def test_a_remote_memory_does_not_begin_anew(
    options: Options,
    titled_run: Path,
    tmp_path: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [*PATTERN, *arguments, "--remote.address", str(tmp_path / "memory.db")]
    assert commands.evaluate(options(tmp_path, "--checkpoint", str(titled_run), *arguments)) == 2
    assert message in capsys.readouterr().err
