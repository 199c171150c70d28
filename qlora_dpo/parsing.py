"""Reading a command line: dataclasses' fields, with defaults from a YAML file."""

import argparse
import difflib
import json
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

_HOME = re.compile(r"(?:(?<=^)|(?<==))~(?=/)")
"""A `~` that a shell leaves as it is behind `=`, as YAML does."""
_NUMBER = re.compile(r"[-+]?(\d{1,3}(\.\d*)?|\.\d+)[eE][-+]?\d{1,2}")
"""`1e-6` and `1.5e6`, which YAML leaves as text; not the beginning of a commit, such as 12e4567."""
_EPILOG = "--config FILE.yaml sets defaults that flags override."


def _as_words(parser: HfArgumentParser, options: dict[str, Any]) -> list[str]:
    """Options of a YAML file as command-line words, so that both are converted by the same rules.

    What a command line cannot say (null, an empty list, a list or a truth value for an option that takes text) becomes
    the option's default as it is.

    Raises:
        ValueError: If an option that must be given is null.
    """
    words: list[str] = []
    for name, value in options.items():
        action = parser._option_string_actions[f"--{name}"]
        takes_truth = action.type is string_to_bool
        if value is False and "no" in map(str, action.choices or ()):  # how YAML reads `no`
            value = "no"
        if value is None and action.required:
            raise ValueError(f"`{name}` must be given, got null. Fill it in.")
        if isinstance(value, list) and value and action.nargs == "+":
            words += [f"--{name}", *(str(item) for item in value)]
        elif isinstance(value, dict):
            words.append(f"--{name}={json.dumps(_with_numbers(value))}")
        elif value is None or isinstance(value, list) or (isinstance(value, bool) and not takes_truth):
            parser.set_defaults(**{name: value})
            action.required = False
        else:
            words.append(f"--{name}={value}")
    return words


def _with_numbers(value: Any) -> Any:
    """Numbers for what YAML leaves as text because it has no point (`1e-6`) or no sign (`1.5e6`), in a dict of options.

    >>> _with_numbers({"min_lr": "1e-6", "revision": "12e4567", "of": [{"a": "1.5E3"}]})
    {'min_lr': 1e-06, 'revision': '12e4567', 'of': [{'a': 1500.0}]}
    """
    if isinstance(value, dict):
        return {key: _with_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_numbers(item) for item in value]
    return float(value) if isinstance(value, str) and _NUMBER.fullmatch(value) else value


def _hint(name: str, known: set[str]) -> str:
    """What to do about an option that nothing reads."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"Did you mean `{close[0]}`?" if close else "Remove it."


def _require_used(names: Iterable[str], unused: Collection[str], program: str) -> None:
    """Refuse an option that the command has, by its dataclass, and does not use.

    Raises:
        ValueError: If one is given.
    """
    for name in names:
        if name in unused:
            raise ValueError(
                f"Options of {program} must be ones that it uses, got `{name}`. Remove it; --help lists them."
            )


def _yaml_options(path: str, known: set[str]) -> dict[str, Any]:
    """Options of a YAML file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no mapping, or holds an option that nothing reads.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"`--config` must be a YAML file, got {path}. Check the path.")
    try:
        options = yaml.safe_load(Path(path).read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} must be YAML, got {' '.join(str(error).split())}. Correct it.") from error
    if not isinstance(options, dict):
        raise ValueError(f"{path} must hold `option: value` lines, got {type(options).__name__}. Correct it.")
    for name in options:
        if name not in known:
            raise ValueError(f"Options in {path} must be known, got `{name}`. {_hint(str(name), known)}")
    return options


def parse(
    classes: Sequence[type],
    words: Sequence[str],
    program: str,
    defaults: dict[str, Any] | None = None,
    unused: Collection[str] = (),
) -> Any:
    """Dataclasses from `--config` and flags.

    Args:
        classes: Dataclasses whose fields are the options.
        words: The command line behind the command's name.
        program: How the command is called, for help and errors.
        defaults: Defaults that a file and flags override.
        unused: Fields that the command does not use: not in its help, and refused.

    Raises:
        ValueError: For options that nothing reads, or this command does not use.
    """
    first = argparse.ArgumentParser(prog=program, add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    chosen, rest = first.parse_known_args(list(words))
    parser = HfArgumentParser(classes, prog=program, epilog=_EPILOG, allow_abbrev=False)
    parser.set_defaults(**(defaults or {}))
    for action in parser._actions:
        action.help = argparse.SUPPRESS if action.dest in unused else action.help
    flags = (parser._option_string_actions.get(word.split("=")[0]) for word in rest)
    _require_used((action.dest for action in flags if action is not None), unused, program)
    known = {f.name for cls in classes for f in fields(cls) if f.init}
    if chosen.config is not None:
        options = _yaml_options(chosen.config, known)
        _require_used(options, unused, program)
        rest = _as_words(parser, options) + rest
    rest = [_HOME.sub(str(Path.home()), word) for word in rest]
    parsed = parser.parse_args_into_dataclasses(args=rest, look_for_args_file=False, return_remaining_strings=True)
    if parsed[-1]:
        hint = _hint(parsed[-1][0].removeprefix("--").split("=")[0], known.difference(unused))
        raise ValueError(f"Options of {program} must be known, got {' '.join(parsed[-1])}. {hint}")
    return parsed[:-1]
