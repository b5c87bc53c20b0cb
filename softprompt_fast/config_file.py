"""A YAML config file as command-line arguments, so that both are checked by the same parser."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from .data import read_utf8

PATH_OPTIONS = ("context_file", "train_file", "eval_file", "output_dir", "prompt_dir")


class UsageError(ValueError):
    """The command line or its config file is wrong; exit code 2."""


def config_arguments(path: str, names: Sequence[str]) -> list[str]:
    """``["--name=value", ...]`` from a YAML mapping of option names to values.

    Relative paths start at the file's own directory; ``model`` does too if it begins with a dot or
    a directory is found there, and is a Hub id otherwise. A null leaves the default.

    Raises UsageError naming ``file:line:column`` or the key; OSError if the file cannot be read.
    """
    arguments = []
    for key, value in _mapping(path).items():
        if key not in names:
            close = difflib.get_close_matches(str(key), names, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise UsageError(f"{path}: unknown key {key!r}{hint}")
        if value is None:
            continue
        if isinstance(value, list):
            arguments += [f"--{key}", *map(str, value)]
        else:
            arguments.append(f"--{key}={_text(key, value, Path(path).parent)}")
    return arguments


def _text(key: str, value: Any, base: Path) -> str:
    if isinstance(value, dict):
        return json.dumps(value)
    text = str(value)
    names_directory = key == "model" and (text.startswith(".") or (base / text).is_dir())
    if key in PATH_OPTIONS or names_directory:
        return os.path.normpath(base / Path(text).expanduser())
    return text


def _mapping(path: str) -> dict[Any, Any]:
    try:
        value = yaml.load(read_utf8(path), Loader=_UniqueKeys)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise UsageError(f"{path}{place}: bad YAML: {error.problem}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise UsageError(f"{path}: bad YAML: {error}") from error
    except ValueError as error:
        raise UsageError(str(error)) from error
    if not isinstance(value, dict):
        raise UsageError(f'{path}: a config file holds lines of "name: value"')
    return value


class _UniqueKeys(yaml.SafeLoader):
    """yaml.safe_load's loader (no object of any class is made); a repeated key is an error."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(None, None, f"key {key.value!r} twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)
