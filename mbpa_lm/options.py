"""Command lines and YAML files to a checked Config: which options there are, and what is said of one that is wrong."""

import re
from collections import Counter
from collections.abc import Collection, Hashable, Sequence
from dataclasses import fields
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from mbpa_lm.config import Config
from mbpa_lm.errors import ConfigError, did_you_mean, reason

DEBUG = "--debug"
OPEN_KEYS = ("model.settings", "mixture.weights")
"""Keys under which any name may stand."""

ELSEWHERE = {
    **dict.fromkeys(("checkpoint", "tune", "verify", "experts"), "evaluate.py"),
    **dict.fromkeys(("output", "text"), "mbpa-memory"),
    "resume": "train.py",
}
"""Options of one command only, which are easily given to another."""

PLAIN = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
EXAMPLES = {
    "evaluation.experts": "'[base, mbpa]'",
    "memory.datastores": "'[memories/one, training]'",
    "mixture.weights": "'{base: 0.8, cache-500: 0.2}'",
    "model.settings": "'{n_layer: 2, n_embd: 64}'",
}


def make_parser(program: str, description: str) -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    usage = "%(prog)s --config FILE [--section.name VALUE ...]"
    parser = ArgumentParser(prog=program, description=description, usage=usage, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file of values; what is said on the command line wins.")
    parser.add_argument(DEBUG, action="store_true", help="Where it fails, show where in the code too.")
    for section in fields(Config):
        parser.add_class_arguments(section.type, section.name)
    return parser


def parse(parser: ArgumentParser, arguments: Sequence[str]) -> tuple[Config, dict[str, Any]]:
    """Parse arguments and YAML files into a checked Config and the parser's other options.

    Raises ConfigError naming the key that is wrong, and the nearest valid one where it is misspelt.
    """
    files, others_given = _files_and_others(arguments)
    arguments = [*(f"--config={path}" for path in files), *others_given]  # the parser lets what comes later win
    sections = {section.name for section in fields(Config)}
    valid = _valid_keys()
    others = {action.dest for action in parser._actions if action.dest.split(".")[0] not in sections}
    for option in names_of(arguments):
        name = option[2:].removesuffix("+")
        if name in ELSEWHERE and name not in others:
            raise ConfigError(f"option {option} does not exist for {parser.prog}; {ELSEWHERE[name]} has it")
        if name not in sections:
            _check_key(name, valid | others, "option --")
    for path in files:
        for key in yaml_keys(path):
            _check_key(key, valid, f"{path}: ")
    try:
        namespace = parser.parse_args(arguments)
        made = parser.instantiate(namespace)
    except ArgumentError as error:
        raise ConfigError(explained(reason(error))) from None
    config = Config(**{name: getattr(made, name) for name in sections})
    return config, {name: getattr(made, name) for name in others if hasattr(made, name)}


def given_keys(arguments: Sequence[str]) -> set[str]:
    """Return the keys of the configuration that a command line and its YAML files give values to."""
    of_files = {key for path in _files_and_others(arguments)[0] for key in yaml_keys(path)}
    return of_files | {name[2:].removesuffix("+") for name in names_of(arguments)}


def names_of(arguments: Sequence[str]) -> list[str]:
    """Return the options that are given, without their values."""
    return [argument.split("=", 1)[0] for argument in arguments if argument.startswith("--")]


def explained(text: str) -> str:
    """Return what the parser says of a value, in the words of this package where it is of a wrong type."""
    found = re.match(r'Parser key "([\w.]+)": .*?(?:Got value|Given value): (.*)$', text)
    if found is None:
        return text.replace("unrecognized arguments:", "there is no place for") + "; --help lists the options"
    key, value = found.groups()
    hint = _type_of(key)
    if hint is None:
        return f"--{key} cannot be {value!r}; --help says what it takes"
    return f"{key} is {value!r}; it must be {_wanted(key, hint, value)}"


def _type_of(key: str) -> Any:
    """Return the type of a key of the configuration, None where there is no such key."""
    name, _, inner = key.partition(".")
    section = next((section.type for section in fields(Config) if section.name == name), None)
    return None if section is None else get_type_hints(section).get(inner)


def _wanted(key: str, hint: Any, value: str) -> str:
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return _wanted(key, next(each for each in get_args(hint) if each is not type(None)), value)
    if origin is Literal:
        choices = [str(choice) for choice in get_args(hint)]
        return f"one of {', '.join(choices)}; {did_you_mean(value, choices)}"
    if origin is list:
        numbers = "'[0.1, 0.2]'" if get_args(hint) == (float,) else "'[100, 500]'"
        return f"a list, such as {EXAMPLES.get(key, numbers)}"
    if origin is dict:
        return f"names with values, such as {EXAMPLES[key]}"
    return PLAIN.get(hint, str(hint))


def _valid_keys() -> set[str]:
    return {f"{section.name}.{value.name}" for section in fields(Config) for value in fields(section.type)}  # type: ignore[arg-type]


def _check_key(key: str, valid: Collection[str], where: str) -> None:
    if key in valid or key == "help" or any(key.startswith(f"{name}.") for name in OPEN_KEYS):
        return
    raise ConfigError(f"{where}{key} does not exist; {did_you_mean(key, valid)}")


def _files_and_others(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the YAML files that are named, and the other arguments."""
    files: list[str] = []
    others: list[str] = []
    remaining = iter(arguments)
    for argument in remaining:
        value = next(remaining, None) if argument == "--config" else None
        if value is not None:
            files.append(value)
        elif argument.startswith("--config="):
            files.append(argument.split("=", 1)[1])
        else:
            others.append(argument)
    return files, others


class _OneOfEach(yaml.SafeLoader):
    """Refuses a key that stands twice, of which the first would be lost without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        names = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        twice = [name for name, count in names.items() if count > 1]
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]} stands there twice", node.start_mark)
        return super().construct_mapping(node, deep)


def yaml_keys(path: str) -> list[str]:
    """Return the keys that a YAML file gives values to, as section.name; raises ConfigError where it is no configuration."""
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.load(file, _OneOfEach)  # a SafeLoader: nothing in the file is executed
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} cannot be read: {reason(error)}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"--config {path} is not valid YAML: {reason(error)}") from None
    if not isinstance(content, dict) or not content:
        raise ConfigError(f"--config {path} holds no sections; see configs/ for examples")
    keys = []
    for section, values in content.items():
        if section in {item.name for item in fields(Config)}:
            if not isinstance(values, dict):
                raise ConfigError(f"--config {path}: {section} holds no values; leave it out, or give some by name")
            keys += [f"{section}.{name}" for name in values]
        else:
            keys.append(str(section))
    twice = [key for key, count in Counter(keys).items() if count > 1]
    if twice:
        raise ConfigError(f"--config {path}: {twice[0]} stands there twice")
    return keys
