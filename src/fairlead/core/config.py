"""Typed YAML: unknown keys and wrong types are errors that name the line."""

import re
from typing import Any, TypeVar

import msgspec
import yaml

from fairlead.core.errors import ConfigError

T = TypeVar("T")
MAX_DEPTH = 64
_BOOL = "tag:yaml.org,2002:bool"


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """With the truth of YAML 1.2: `off`, `no` and their like are words, as our own settings have them."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOL or first in "tTfF"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def read_yaml(text: str, type_: type[T], source: str) -> T:
    """Parse YAML into a msgspec type. Raises ConfigError as `source:line: what is wrong`."""
    try:
        _check_depth(text, source)
        node = yaml.compose(text, Loader=_Loader)
        _check_keys(node, source)
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
        place = path.strip("`").removeprefix("$")
        steps = _steps(place, value, type_, str(error))
        line = _line_of(node, steps, unknown[1] if unknown else None)
        place = _written(steps)
        raise ConfigError(f"{source}:{line}: {message}{f' (at {place})' if place else ''}") from None


def _check_depth(text: str, source: str) -> None:
    """Raises ConfigError: what is nested too deeply ends the process inside the composer."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                line = event.start_mark.line + 1 if event.start_mark else 1
                raise ConfigError(f"{source}:{line}: nested more than {MAX_DEPTH} deep")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def _check_keys(node: yaml.Node | None, source: str) -> None:
    """Raises ConfigError for a key that stands twice: YAML would drop the first with all that is below it."""
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check_keys(item, source)
    elif isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            if key.value in seen and isinstance(key, yaml.ScalarNode):
                raise ConfigError(f"{source}:{key.start_mark.line + 1}: key `{key.value}` stands twice")
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
            _check_keys(value, source)


Step = str | int
"""A key, or the number of an item."""


def _steps(path: str, value: Any, type_: Any, error: str) -> list[Step]:
    """A msgspec error path such as `.inputs[0].shape`. Of a mapping it tells `[...]` and not the key, which is found by leaving out the others."""
    steps: list[Step] = []
    at = value
    for name, index in re.findall(r"\.([^.\[\]]+)|\[(\d+|\.\.\.)\]", path):
        step: Step = name or index
        if index == "...":
            found = next((key for key in at if _fails_alone(key, at, value, type_, error)), None) if isinstance(at, dict) else None
            if found is None:
                break
            step = found
        elif index:
            step = int(index)
        steps.append(step)
        try:
            at = at[step]
        except (KeyError, IndexError, TypeError):
            at = None
    return steps


def _fails_alone(key: Any, mapping: dict[Any, Any], value: Any, type_: Any, error: str) -> bool:
    all_of_it = dict(mapping)
    mapping.clear()
    mapping[key] = all_of_it[key]
    try:
        msgspec.convert(value, type_)
    except msgspec.ValidationError as other:
        return str(other) == error
    finally:
        mapping.clear()
        mapping.update(all_of_it)
    return False


def _written(steps: list[Step]) -> str:
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps).removeprefix(".")


def _line_of(node: yaml.Node | None, steps: list[Step], key: str | None) -> int:
    """The line of a place in the composed document."""
    for step in steps:
        if isinstance(node, yaml.SequenceNode):
            child = node.value[step] if isinstance(step, int) and step < len(node.value) else None
        else:
            child = _child(node, str(step))
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
