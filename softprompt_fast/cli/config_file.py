"""A YAML config file as command-line arguments, so that both are checked by the same parser."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ..utils.console import closest
from ..utils.errors import OptionError
from ..utils.files import read_utf8

PATH_OPTIONS = (
    *("context_file", "train_file", "eval_file", "output_dir", "prompt_dir", "query_file"),
    *("resume_from_checkpoint", "teacher_cache"),
)
YAML = "tag:yaml.org,2002:"
KINDS = ("str", "int", "float", "bool", "null", "timestamp", "seq", "map")


def config_arguments(path: str, names: Sequence[str]) -> list[str]:
    """``["--name=value", ...]`` from a YAML mapping of option names to values.

    A value stays the text that was written: ``no`` is a save_strategy, and not False. Relative
    paths start at the file's own directory; ``model`` does too if it begins with a dot or a
    directory is found there, and is a Hub id otherwise. A null leaves the default.

    Raises OptionError naming ``file:line:column`` and the key; OSError if the file cannot be read.
    """
    arguments: list[str] = []
    seen = set()
    for node, value_node in _mapping(path).value:
        key = _key(path, node)
        if key not in names:
            raise OptionError(f"{path}: unknown key {key!r}{closest(key, names)}")
        if key in seen:
            raise _bad(path, node, f"key {key!r} twice")
        seen.add(key)
        try:
            arguments += _flag(path, key, value_node)
        except RecursionError as error:
            raise _bad(path, node, f"{key!r} is nested too deeply") from error
    return arguments


def _flag(path: str, key: str, node: yaml.Node) -> list[str]:
    """The arguments for one option; a mapping becomes the JSON that its flag takes."""
    value = _value(path, node)
    if value is None:
        return []
    if isinstance(node, yaml.SequenceNode):
        return [f"--{key}", *(str(item.value) for item in node.value)]
    text = node.value if isinstance(node, yaml.ScalarNode) else json.dumps(value)
    base = Path(path).parent
    names_directory = key == "model" and (text.startswith(".") or (base / text).is_dir())
    if key in PATH_OPTIONS or names_directory:
        text = os.path.normpath(base / os.path.expanduser(text))
    return [f"--{key}={text}"]


def _value(path: str, node: yaml.Node) -> Any:
    """A node as JSON: what is written without quotes is a number or a boolean if JSON has it so."""
    if node.tag not in [YAML + kind for kind in KINDS]:
        raise _bad(path, node, f"no tag is allowed here: got {node.tag!r}")
    if isinstance(node, yaml.MappingNode):
        return {_key(path, key): _value(path, value) for key, value in node.value}
    if isinstance(node, yaml.SequenceNode):
        return [_value(path, item) for item in node.value]
    if node.tag == YAML + "null":
        return None
    is_quoted = isinstance(node, yaml.ScalarNode) and node.style
    try:
        return node.value if is_quoted else json.loads(node.value)
    except ValueError:
        return node.value


def _key(path: str, node: yaml.Node) -> str:
    if not isinstance(node, yaml.ScalarNode):
        raise _bad(path, node, "a key must be a name")
    return node.value


def _mapping(path: str) -> yaml.MappingNode:
    """The file's nodes. They are never made into objects, of whatever class a tag may name."""
    try:
        node = yaml.compose(read_utf8(path), Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise OptionError(f"{path}{place}: bad YAML: {error.problem}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise OptionError(f"{path}: bad YAML: {error}") from error
    except ValueError as error:
        raise OptionError(str(error)) from error
    if not isinstance(node, yaml.MappingNode):
        raise OptionError(f'{path}: a config file holds lines of "name: value"')
    return node


def _bad(path: str, node: yaml.Node, problem: str) -> OptionError:
    mark = node.start_mark
    return OptionError(f"{path}:{mark.line + 1}:{mark.column + 1}: bad YAML: {problem}")
