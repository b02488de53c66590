"""The command line as an interface: help that explains, and mistakes answered in one line before any work."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from mbpa_lm import commands
from mbpa_lm.config import Config
from mbpa_lm.options import make_parser, parse
from tests.conftest import parsed, write_corpus

Options = Callable[..., list[str]]
ROOT = Path(__file__).parents[1]


def test_help_explains_every_value_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        commands.train(["--help"])
    shown = re.sub(r", --\S+\+ \S+", "", " ".join(capsys.readouterr().out.split()))  # lists have a second name, to append
    for section in fields(Config):
        for value in fields(section.type):
            name = f"--{section.name}.{value.name}"
            assert name in shown
            after = shown[shown.index(f"{name} ") + len(name) :]
            after = re.split(r" --\w+\.", after)[0]  # an explanation may name an option of evaluate.py
            assert "default:" in after, name
            assert len(after.split("(")[0]) > 20, f"{name} is not explained"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_configuration_file_is_valid(path: Path) -> None:
    parsed(["--config", str(path)])
    assert path.read_text().startswith("#"), "a configuration says first what it is"


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("model:\n  hidden_size: 64\n  layers: 3\n")
    config = parsed(["--config", str(tmp_path / "c.yaml"), "--model.hidden_size", "650"])
    assert (config.model.hidden_size, config.model.layers) == (650, 3)


TRANSFORMER = ["--model.kind", "transformer", "--training.sequence_length", "256"]
MISTAKES = [
    (["--model.hiden_size", "3"], "option --model.hiden_size does not exist; did you mean model.hidden_size?"),
    (["--hidden_size", "3"], "option --hidden_size does not exist; did you mean model.hidden_size?"),
    (["--zzzzz=1"], "option --zzzzz does not exist; --help lists the valid ones"),
    (["--model.hidden_size", "big"], "model.hidden_size is 'big'; it must be a whole number"),
    (["--model.hidden_size", "2.5"], "model.hidden_size is '2.5'; it must be a whole number"),
    (["--adaptation.alpha", "x"], "adaptation.alpha is 'x'; it must be a number"),
    (["--evaluation.independent", "maybe"], "evaluation.independent is 'maybe'; it must be true or false"),
    (["--cache.windows", "5"], "cache.windows is '5'; it must be a list, such as '[100, 500]'"),
    (["--cache.windows", "[]"], "cache.windows is []; it must be at least one length"),
    (["--evaluation.experts", "mbpa"], "evaluation.experts is 'mbpa'; it must be a list, such as '[base, mbpa]'"),
    (["--mixture.weights", "3"], "mixture.weights is '3'; it must be names with values, such as '{base: 0.8, cache-500: 0.2}'"),
    (["--adaptation.solver", "resticted"], "it must be one of restricted, dual, reference; did you mean restricted?"),
    (["--run.seed", "1" * 23], "it must be at most 1,000,000,000,000"),
    (["--run.threads", "100000000"], "run.threads is 100000000; it must be at most 1,024"),
    (["--model.layers", "1000000"], "model.layers is 1000000; it must be at most 1,000"),
    (["--memory.size", "1" * 23], "it must be at most 1,000,000,000,000"),
    (["--memory.neighbours", "1000000"], "memory.neighbours is 1000000; it must be at most 100,000"),
    (["--persistent.statistics_tokens", "1"], "statistics_tokens is 1; it must be at least persistent.interval (20)"),
    (["--evaluation.text", ""], "evaluation.text is ''; it must be a text file or a folder of files"),
    (["--evaluation.text", "x", "--evaluation.split", "valid"], "it must be left out with evaluation.text"),
    (["--checkpoint", "x"], "option --checkpoint does not exist for train.py; evaluate.py has it"),
    (["words"], "there is no place for words"),
    ([*TRANSFORMER, "--model.settings.vocab_size", "3"], "it must be left out: the tokenizer says how many tokens there are"),
    ([*TRANSFORMER, "--model.settings.n_layer", "-1"], "model.settings.n_layer is -1; it must be 0 or more"),
    (["--model.hidden_size", "0"], "model.hidden_size is 0; it must be greater than 0"),
    (["--model.dropout", "1.5"], "model.dropout is 1.5; it must be at least 0 and less than 1"),
    (["--model.kind", "rnn"], "model.kind"),
    (["--training.optimizer", "adam"], "training.optimizer"),
    (["--training.learning_rate", "-1"], "training.learning_rate is -1.0; it must be greater than 0"),
    (["--memory.neighbours", "0"], "memory.neighbours is 0; it must be greater than 0"),
    (["--adaptation.steps", "1000000000"], "adaptation.steps is 1000000000; it must be at most 10,000"),
    (["--adaptation.optimizer", "rmsprop"], "adaptation.solver is 'restricted'; it must be reference with rmsprop"),
    (["--adaptation.alpha", "2", "--adaptation.beta", "3"], "adaptation.beta is 3.0; it must be at most 1 / adaptation"),
    (["--adaptation.epsilon", "1e-50"], "adaptation.epsilon is 1e-50; it must be at least 1e-12"),
    (["--model.context_overlap", "256"], "model.context_overlap is 256; it must be less than model.context_length (256)"),
    (["--model.kind", "transformer"], "sequence_length is 50; it must be model.context_length (256), the block"),
    (["--data.document_pattern", "["], "data.document_pattern is no regular expression"),
    ([*TRANSFORMER, "--model.architecture", "gtp2"], "'gtp2' is no causal language model of transformers; did you mean gpt2?"),
    ([*TRANSFORMER, "--model.settings.n_embed", "8"], "model.settings.n_embed does not exist for gpt2; did you mean n_embd?"),
    (["--data.corpus", "text"], "data.path is None; it must be a text file or a folder when data.corpus is text"),
    (["--config", "nowhere.yaml"], "--config nowhere.yaml cannot be read: No such file or directory"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[" ".join(arguments) for arguments, _ in MISTAKES])
def test_a_mistake_is_refused_in_one_line_before_any_work(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert commands.train(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("model:\n  hidden_sizes: 3\n", "c.yaml: model.hidden_sizes does not exist; did you mean model.hidden_size?"),
        ("modle:\n  layers: 3\n", "does not exist; did you mean"),
        ("hidden_size: 3\n", "c.yaml: hidden_size does not exist; did you mean model.hidden_size?"),
        ("model: [1\n", "c.yaml is not valid YAML"),
        ("memory:\n", "c.yaml: memory holds no values; leave it out, or give some by name"),
        ("- 1\n", "c.yaml holds no sections; see configs/ for examples"),
        ("", "c.yaml holds no sections; see configs/ for examples"),
        ("memory: {size: 3, size: 4}\n", "c.yaml is not valid YAML: size stands there twice"),
        ("memory: {size: 3}\nmemory.size: 4\n", "c.yaml: memory.size stands there twice"),
        ("adaptation: {tolerance: .inf}\n", "adaptation.tolerance is inf; it must be a finite number"),
        ("model:\n  layers: many\n", "model.layers"),
        ("model: !!python/object/apply:os.system ['touch executed']\n", "c.yaml is not valid YAML"),
    ],
)
def test_a_mistake_in_a_file_names_the_file_and_the_key(
    content: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(content)
    assert commands.train(["--config", "c.yaml"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["c.yaml"]


def damage_corpus(folder: Path, damage: str) -> None:
    if damage == "empty file":
        (folder / "train.txt").write_text("")
    elif damage == "missing split":
        (folder / "valid.txt").unlink()
    elif damage == "not UTF-8":
        (folder / "train.txt").write_bytes("Füße\n".encode("latin1"))
    elif damage == "UTF-16":
        (folder / "train.txt").write_bytes("words\n".encode("utf-16"))
    elif damage == "no text":
        (folder / "train.txt").write_bytes(b"PK\x03\x04\x00\xff\xff")
    elif damage == "pipe":
        (folder / "train.txt").unlink()
        os.mkfifo(folder / "train.txt")
    elif damage == "too short":
        (folder / "train.txt").write_text("a b c\n")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("empty file", "train.txt is empty; there is nothing to read"),
        ("missing split", "has no valid.txt; a corpus folder holds train.txt, valid.txt and test.txt"),
        ("not UTF-8", "train.txt is not UTF-8: byte 0xfc at offset 1; convert it first"),
        ("UTF-16", "is not UTF-8: byte 0xff at offset 0; it begins as UTF-16 does; convert it with iconv -f utf-16 -t utf-8"),
        ("no text", "is not UTF-8: byte 0xff at offset 5; it holds zero bytes, as no text does"),
        ("pipe", "has no train.txt; a corpus folder holds"),
        ("too short", "the text has 4 tokens, but training.batch_size 4 and training.sequence_length 10 need at least 51"),
    ],
)
def test_bad_text_is_refused_in_one_line_and_leaves_no_files(
    options: Options, damage: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage_corpus(write_corpus(tmp_path / "text"), damage)
    run, tokens = tmp_path / "run", tmp_path / "tokens"
    arguments = options(run, "--data.path", str(tmp_path / "text"), "--data.token_folder", str(tokens))
    assert commands.train(arguments) == 3
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not run.exists()
    assert not [path for path in tokens.rglob("*") if path.name.startswith(".")] if tokens.exists() else True


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "--checkpoint is missing; name the run folder that train.py wrote"),
        (["--checkpoint", "nowhere"], 4, "nowhere holds no checkpoint; give a run folder"),
        (["--checkpoint", "TRAINED", "--model.layers", "2"], 4, "another model: model.layers is 1 there and 2 in the config"),
        (["--checkpoint", "TRAINED", "--tokenizer.min_count", "3"], 4, "another tokenizer: tokenizer.min_count is 1 there"),
        (["--checkpoint", "TRAINED", "--data.corpus", "builtin"], 4, "was trained on another text"),
        (["--checkpoint", "TRAINED", "--evaluation.text", "nowhere.txt"], 3, "nowhere.txt does not exist"),
        (["--checkpoint", "TRAINED/log.jsonl"], 4, "log.jsonl holds no checkpoint; give a run folder"),
        (["--checkpoint", "n" * 300], 4, "cannot be read: File name too long"),
        (["--checkpoint", "TRAINED", "--evaluation.text", "PIPE"], 3, "PIPE cannot be read: it is no regular file"),
        (["--checkpoint", "TRAINED", "--evaluation.text", "/proc/self/mem"], 3, "self/mem cannot be read: Input/output error"),
        (["--checkpoint", "TRAINED", "--evaluation.text", "EMPTY"], 3, "EMPTY holds no files; give a text file"),
        (["--checkpoint", "TRAINED", "--verify", "0"], 2, "--verify is 0; it must be from 1 to 1,000"),
        (["--checkpoint", "TRAINED", "--verify", "100000000000"], 2, "it must be from 1 to 1,000"),
        (["--checkpoint", "TRAINED", "--experts", "base", "--tune"], 2, "--tune has nothing to tune"),
        (["--checkpoint", "TRAINED", "--experts", "base", "--memory.datastores", "[training]"], 2, "are searched by none of"),
        (["--checkpoint", "TRAINED", "--experts", "base", "--evaluation.experts", "[base]"], 2, "say the same; give"),
        (["--checkpoint", "TRAINED", "--memory.gpus", "shard"], 7, "memory.gpus is shard, but FAISS sees no GPU here"),
        (["--checkpoint", "TRAINED", "--memory.index", "cagra"], 7, "index cagra needs a GPU"),
        (["--resume"], 2, "option --resume does not exist for evaluate.py; train.py has it"),
        (["--checkpoint", "TRAINED", "--adaptation.alpha", "-1"], 2, "adaptation.alpha is -1.0; it must be 0 or more"),
    ],
)  # fmt: skip
def test_an_evaluation_that_cannot_be_is_refused_in_one_line(
    options: Options, trained_run: Path, tmp_path: Path, arguments: list[str], code: int, message: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    os.mkfifo("PIPE")
    Path("EMPTY").mkdir()
    arguments = [argument.replace("TRAINED", str(trained_run)) for argument in arguments]
    assert commands.evaluate(options(tmp_path / "run", *arguments)) == code
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_run_folder_that_is_a_file_is_refused(
    options: Options, trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert commands.evaluate(options(tmp_path / "file", "--checkpoint", str(trained_run))) == 6
    assert "cannot be written" in capsys.readouterr().err
    assert commands.train(options(tmp_path / "file")) == 6
    assert "file is a file; name a folder" in capsys.readouterr().err
    assert commands.train(options(tmp_path / ("n" * 300))) == 6
    assert "cannot be written: File name too long; name another folder" in capsys.readouterr().err


def test_the_command_line_wins_wherever_it_stands(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("memory: {size: 7, neighbours: 3}\n")
    file = ["--config", str(tmp_path / "c.yaml")]
    for arguments in (["--memory.size", "9", *file], [*file, "--memory.size=9"]):
        config, _ = parse(make_parser("train.py", ""), arguments)
        assert (config.memory.size, config.memory.neighbours) == (9, 3)


def test_a_checkpoint_says_itself_what_model_it_is(options: Options, trained_run: Path, tmp_path: Path) -> None:
    own = ("--model.", "--tokenizer.")
    given = options(tmp_path / "run", "--checkpoint", str(trained_run), "--experts", "base", "--evaluation.max_tokens", "50")
    pairs = [given[index : index + 2] for index in range(0, len(given), 2)]
    assert any(name.startswith(own) for name, _ in pairs)
    assert commands.evaluate([word for pair in pairs if not pair[0].startswith(own) for word in pair]) == 0
    config = json.loads((tmp_path / "run" / "metrics.json").read_text())["config"]
    assert config["model"]["hidden_size"] == 16


def test_the_top_level_scripts_are_thin_and_start(tmp_path: Path) -> None:
    for script in ("train.py", "evaluate.py"):
        assert len((ROOT / script).read_text().splitlines()) < 10
        process = subprocess.run(
            [sys.executable, str(ROOT / script), "--model.hiden_size", "3"], cwd=tmp_path, capture_output=True, text=True
        )
        assert process.returncode == 2
        assert process.stderr == "error: option --model.hiden_size does not exist; did you mean model.hidden_size?\n"


def test_printed_configuration_is_the_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        commands.train(["--model.hidden_size", "123", "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["hidden_size"] == 123


def test_experts_are_named_between_commas_and_a_misspelt_one_is_named(
    options: Callable[..., list[str]], trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    some = ["--checkpoint", str(trained_run), "--evaluation.max_tokens", "50", "--experts"]
    assert commands.evaluate(options(tmp_path, *some, "persistent, base")) == 0
    assert list(json.loads((tmp_path / "metrics.json").read_text())["experts"]) == [
        "base",
        "persistent",
        "gate",
        "equal weights",
    ]
    assert commands.evaluate(options(tmp_path, *some, "base,mpba")) == 2
    assert capsys.readouterr().err == "error: evaluation.experts names 'mpba'; did you mean mbpa?\n"
