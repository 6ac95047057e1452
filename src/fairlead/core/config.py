"""Typed YAML: unknown keys and wrong types are errors that name the line."""

import re
from typing import TypeVar

import msgspec
import yaml

from fairlead.core.errors import ConfigError

T = TypeVar("T")
_Loader: type = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_yaml(text: str, type_: type[T], source: str) -> T:
    """Parse YAML into a msgspec type. Raises ConfigError as `source:line: what is wrong`."""
    try:
        node = yaml.compose(text, Loader=_Loader)
        value = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = min(error.problem_mark.line, text.count("\n")) + 1 if error.problem_mark else 1
        raise ConfigError(f"{source}:{line}: not YAML: {error.problem or error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}:1: not YAML: {error}") from None
    try:
        return msgspec.convert({} if value is None else value, type_)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at ")
        unknown = re.search(r"unknown field `(.+?)`", message)
        if unknown:
            message = f"unknown key `{unknown[1]}`"
        line = _line_of(node, path.strip("`"), unknown[1] if unknown else None)
        place = path.strip("`").removeprefix("$").removeprefix(".")
        raise ConfigError(f"{source}:{line}: {message}{f' (at {place})' if place else ''}") from None


def _line_of(node: yaml.Node | None, path: str, key: str | None) -> int:
    """The line of a msgspec error path such as `$.inputs[0].shape` in the composed document."""
    for name, index in re.findall(r"\.([^.\[\]]+)|\[(\d+)\]", path):
        child = _child(node, name) if name else (node.value[int(index)] if isinstance(node, yaml.SequenceNode) else None)
        if child is None:
            break
        node = child
    if key is not None and isinstance(node, yaml.MappingNode):
        for key_node, _ in node.value:
            if key_node.value == key:
                return int(key_node.start_mark.line) + 1
    return int(node.start_mark.line) + 1 if node is not None else 1


def _child(node: yaml.Node | None, name: str) -> yaml.Node | None:
    if isinstance(node, yaml.MappingNode):
        children: list[tuple[yaml.Node, yaml.Node]] = node.value
        return next((value for key, value in children if key.value == name), None)
    return None
