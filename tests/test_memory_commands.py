"""mbpa-memory as a user types it, and evaluations on what it made."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from mbpa_lm import commands
from mbpa_lm.checkpoints.checkpoint import find_checkpoint, load_checkpoint
from mbpa_lm.memory.datastore.store import Datastore
from mbpa_lm.memory_commands import memory
from mbpa_lm.options import make_parser, parse
from mbpa_lm.remembering.datastores import open_one
from mbpa_lm.system.durable import take_lock

Options = Callable[..., list[str]]


@pytest.fixture(scope="module")
def trained_run(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the trained run: the training text is remembered in a checkpoint's folder."""
    return Path(shutil.copytree(trained_run, tmp_path_factory.mktemp("runs") / "trained"))


@pytest.fixture(scope="module")
def build(options: Options, trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Builds a memory of some lines."""

    def make(name: str, lines: int, *more: str) -> Path:
        folder = tmp_path_factory.mktemp("memories")
        text, output = folder / f"{name}.txt", folder / name
        text.write_text("".join(f"name{index % 60} word{index % 7} word1\n" for index in range(lines)))
        checkpoint = ("--checkpoint", str(trained_run), "--text", str(text), "--output", str(output))
        assert memory(["build", *options(folder / "run", *more), *checkpoint]) == 0
        return output

    return make


def test_build_add_verify_merge_and_export(
    build: Callable[..., Path], options: Options, trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = build("first", 50), build("second", 20)
    assert len(Datastore.open(first)) == 199
    text, checkpoint = first.parent / "more.txt", ("--checkpoint", str(trained_run))
    text.write_text("word1 name5\n" * 10)
    for _ in range(2):  # the second time there is nothing to do
        assert memory(["add", *options(tmp_path / "run"), *checkpoint, "--text", str(text), "--output", str(first)]) == 0
    assert len(Datastore.open(first)) == 199 + 29
    assert memory(["verify", str(first)]) == 0
    assert "228 entries" in capsys.readouterr().out.splitlines()[-1]
    merged, file = tmp_path / "merged", tmp_path / "entries.safetensors"
    assert memory(["merge", str(first), str(second), "--output", str(merged)]) == 0
    assert memory(["index", str(merged), "--kind", "ivf_flat", "--resident_gib", "1"]) == 0
    assert memory(["compact", str(merged)]) == 0
    assert memory(["export", str(merged), "--output", str(file)]) == 0
    written = file.read_bytes()
    assert memory(["export", str(merged), "--output", str(file)]) == 7  # it might be somebody's text
    assert file.read_bytes() == written
    tensors, store = load_file(file), Datastore.open(merged)
    assert len(store) == 228 + 79
    assert [source.name for source in store.manifest.sources] == ["first.txt", "more.txt", "second.txt"]
    assert store.manifest.documents == 3
    assert tensors["values"].tolist() == store.entries_between(0, len(store))[0].values.tolist()
    assert tensors["keys"].equal(store.entries_between(0, len(store))[0].keys)
    assert tensors["documents"].tolist() == [0] * 199 + [1] * 29 + [2] * 79
    capsys.readouterr()
    assert memory(["info", str(merged)]) == 0
    shown = capsys.readouterr().out
    for part in (
        "307 in 3 documents",
        "the first 307 are in the index alone",
        "16 numbers of float16",
        "ivf_flat over 307 entries",
        "more.txt: 29 of 29",
    ):
        assert part in shown


@pytest.mark.parametrize("memories", ["[training]", "[FOLDER]", "[training, FOLDER]"])
def test_an_evaluation_on_memories(
    build: Callable[..., Path], options: Options, trained_run: Path, tmp_path: Path, memories: str
) -> None:
    folder = build("known", 50)
    run, experts = tmp_path / "run", ("--experts", "base,mbpa,knn")
    named = ("--memory.datastores", memories.replace("FOLDER", str(folder)))
    assert commands.evaluate(options(run, "--checkpoint", str(trained_run), *named, *experts)) == 0
    with_memories = json.loads((run / "metrics.json").read_text())["experts"]
    assert commands.evaluate(options(run, "--checkpoint", str(trained_run), *experts)) == 0
    without = json.loads((run / "metrics.json").read_text())["experts"]
    assert with_memories["base"]["perplexity"] == without["base"]["perplexity"]
    assert with_memories["mbpa"]["perplexity"] != without["mbpa"]["perplexity"]
    assert (with_memories["knn"]["perplexity"] != without["knn"]["perplexity"]) == ("FOLDER" in memories)


def test_the_training_text_is_remembered_once(options: Options, trained_run: Path, tmp_path: Path) -> None:
    evaluate = [*options(tmp_path / "run"), "--checkpoint", str(trained_run), "--experts", "base,knn"]
    assert commands.evaluate(evaluate) == 0
    (manifest,) = trained_run.glob("checkpoints/*/datastore/manifest.json")
    written = manifest.stat().st_mtime_ns
    assert commands.evaluate(evaluate) == 0
    assert manifest.stat().st_mtime_ns == written
    assert commands.evaluate([*evaluate, "--knn.entries", "100"]) == 0
    assert len(Datastore.open(manifest.parent)) == 100


def test_a_training_memory_with_more_than_is_needed_is_good_enough(options: Options, trained_run: Path, tmp_path: Path) -> None:
    evaluate = [*options(tmp_path / "run"), "--checkpoint", str(trained_run), "--experts", "base,mbpa,knn"]
    assert commands.evaluate([*evaluate, "--memory.datastores", "[training]"]) == 0
    (manifest,) = trained_run.glob("checkpoints/*/datastore/manifest.json")
    written = manifest.read_text()
    assert commands.evaluate(evaluate) == 0
    assert manifest.read_text() == written


def test_a_second_process_waits_for_the_training_memory(
    options: Options, trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkpoint,) = trained_run.glob("checkpoints/*")
    held = take_lock(checkpoint / ".datastore.lock")
    assert held is not None
    evaluate = [*options(tmp_path / "run"), "--checkpoint", str(trained_run), "--experts", "base,knn", "--knn.entries", "77"]
    try:
        assert commands.evaluate(evaluate) != 0
    finally:
        os.close(held)
    assert "datastore is being written by another process; wait until it is done" in capsys.readouterr().err


def test_a_memory_that_is_named_twice_is_refused(
    build: Callable[..., Path], options: Options, trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = build("twice", 20)
    again = f"{folder.parent}/../{folder.parent.name}/twice"
    named = ["--checkpoint", str(trained_run), "--memory.datastores", f"[{folder}, {again}]"]
    assert commands.evaluate([*options(tmp_path / "run"), *named]) != 0
    assert "more than once; name it once" in capsys.readouterr().err
    assert memory(["merge", str(folder), str(folder), "--output", str(tmp_path / "m")]) != 0
    assert "more than once; name it once" in capsys.readouterr().err
    for output in (folder / "keys.bin", folder, tmp_path / "no" / "x"):
        assert memory(["export", str(folder), "--output", str(output)]) != 0
        assert capsys.readouterr().err.count("\n") == 1
    assert memory(["verify", str(folder)]) == 0


def test_a_memory_that_has_read_the_text_is_named(
    build: Callable[..., Path], options: Options, trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = build("read", 30)
    score = [*options(tmp_path / "run"), "--checkpoint", str(trained_run), "--memory.datastores", f"[{folder}]"]
    for text, known in ((folder.parent / "read.txt", [str(folder)]), (tmp_path / "other.txt", [])):
        (tmp_path / "other.txt").write_text("word1 name5\n" * 10)
        assert commands.evaluate([*score, "--experts", "base,mbpa", "--evaluation.text", str(text)]) == 0
        assert ("has read" in capsys.readouterr().out) == bool(known)
        assert json.loads((tmp_path / "run" / "metrics.json").read_text())["read_before_by"] == known


MISTAKES = [
    (["buld"], "mbpa-memory buld does not exist; did you mean build?"),
    (["info"], "the following arguments are required: folder; --help lists the options"),
    (["info", "/nowhere"], "/nowhere holds no memory; make one with mbpa-memory build --output /nowhere"),
    (["build"], "--checkpoint is missing; mbpa-memory build --help says what it is"),
    (["build", "--checkpoint", "x", "--output", "y", "--memry.size", "3"], "did you mean memory.size?"),
    (["index", "x", "--kind", "hnws"], "--kind is 'hnws'; did you mean hnsw?"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_mistakes_are_answered_in_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert memory(arguments) != 0
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_what_does_not_belong_together_is_refused(
    build: Callable[..., Path], options: Options, trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, other = build("first", 50), build("other", 20, "--memory.likely_words", "3")
    assert memory(["merge", str(first), str(other), "--output", str(tmp_path / "merged")]) != 0
    assert "cannot be one memory: likely_words is" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()
    evaluate = [*options(tmp_path / "run"), "--checkpoint", str(trained_run), "--memory.datastores", f"[{other}]"]
    assert commands.evaluate(evaluate) != 0
    assert "keeps 3 likely words an entry, memory.likely_words asks for" in capsys.readouterr().err
    rest = ["--checkpoint", str(trained_run), "--output", str(first), "--text", str(other.parent / "other.txt")]
    assert memory(["build", *options(tmp_path / "run"), *rest]) != 0
    assert "holds first.txt already; use mbpa-memory add for more text" in capsys.readouterr().err


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert memory([]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in ("build", "add", "index", "info", "verify", "merge", "export"))


def test_a_stream_is_remembered_in_a_database(
    options: Options, trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("milvus_lite", reason="milvus-lite is not installed")
    evaluate = [*options(tmp_path / "run"), "--checkpoint", str(trained_run), "--experts", "base,mbpa"]
    assert commands.evaluate([*evaluate, "--memory.size", "100000"]) == 0
    window = json.loads((tmp_path / "run" / "metrics.json").read_text())["experts"]["mbpa"]["perplexity"]
    remote = [*evaluate, "--remote.address", str(tmp_path / "memory.db"), "--memory.key_type", "float32"]
    perplexities, before = [], []
    for _ in range(2):
        assert commands.evaluate(remote) == 0
        metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
        perplexities.append(metrics["experts"]["mbpa"]["perplexity"])
        before.append(metrics["remembered_before"])
    assert perplexities[0] == pytest.approx(window, rel=1e-5)
    assert before == [0, metrics["stream"]["scored"]]
    assert perplexities[1] < perplexities[0]  # it has read this text before, and says so
    assert f"holds {before[1]:,} entries: they count as read before the stream" in capsys.readouterr().out


def test_a_memory_that_is_open_is_not_opened_again_until_it_changes(
    build: Callable[..., Path], options: Options, trained_run: Path, tmp_path: Path
) -> None:
    folder = build("shared", 20)
    config, _ = parse(make_parser("test", ""), options(tmp_path / "run"))
    checkpoint = load_checkpoint(find_checkpoint(trained_run))
    store = open_one(config, checkpoint, folder)
    assert open_one(config, checkpoint, folder) is store
    with Datastore.open(folder, writable=True) as writer:
        writer.add(*store.entries_between(0, 5))
    assert len(open_one(config, checkpoint, folder)) == len(store) + 5


def test_a_memory_of_the_training_text_is_that_of_knn(options: Options, trained_run: Path, tmp_path: Path) -> None:
    evaluate = [*options(tmp_path / "run"), "--checkpoint", str(trained_run), "--experts", "base,knn"]
    assert commands.evaluate(evaluate) == 0
    expected = json.loads((tmp_path / "run" / "metrics.json").read_text())["experts"]["knn"]["nats_per_token"]
    for kept in trained_run.glob("checkpoints/*/datastore"):
        shutil.rmtree(kept)
    output = tmp_path / "memory"
    assert memory(["build", *options(tmp_path / "run"), "--checkpoint", str(trained_run), "--output", str(output)]) == 0
    assert commands.evaluate([*evaluate, "--memory.datastores", f"[{output}]"]) == 0
    found = json.loads((tmp_path / "run" / "metrics.json").read_text())["experts"]["knn"]["nats_per_token"]
    assert found == pytest.approx(expected, abs=1e-6)
    assert not list(trained_run.glob("checkpoints/*/datastore"))
