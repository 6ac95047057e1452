"""Parameters that have a meaning of their own; the others of a request go to the model."""

import re
from typing import Any

from msgspec import Struct

from fairlead.core.errors import InvalidRequest, Unsupported
from fairlead.core.request import Request

SEQUENCE = frozenset({"sequence_id", "sequence_start", "sequence_end"})
FILE = re.compile(r"file:([0-9]+(?:/[^/\\\0]+)+)")


class Wishes(Struct):
    """What parameters say about the form of the answer rather than to the model."""

    binary_data_output: bool = False
    empty_final_response: bool = False


NO_WISHES = Wishes()


def take_parameters(request: Request, parameters: dict[str, Any]) -> Wishes:
    """Move known parameters into the request's fields, the rest into `request.parameters`.

    Raises InvalidRequest or Unsupported, naming the parameter.
    """
    wishes = Wishes()
    for name, value in parameters.items():
        if name == "priority":
            request.priority = _unsigned(name, value)
        elif name == "timeout":
            request.timeout = _unsigned(name, value) / 1e6
        elif name == "binary_data_output":
            wishes.binary_data_output = _boolean(name, value)
        elif name == "triton_enable_empty_final_response":
            wishes.empty_final_response = _boolean(name, value)
        elif name in SEQUENCE:
            raise Unsupported(f"parameter '{name}' is not supported: this server does not batch sequences")
        elif name == "headers" or name.startswith("triton_"):
            raise InvalidRequest(f"parameter '{name}' is reserved")
        elif isinstance(value, (bool, int, float, str)):
            request.parameters[name] = value
        else:
            raise InvalidRequest(f"parameter '{name}' must be a string, a number or a boolean")
    return wishes


def file_path(parameter: str) -> str:
    """VERSION/NAME of a load parameter `file:VERSION/NAME`."""
    match = FILE.fullmatch(parameter)
    if match is None:
        raise InvalidRequest(f"unrecognized load parameter '{parameter}', expecting 'config' or 'file:VERSION/NAME'")
    if not {".", ".."}.isdisjoint(match[1].split("/")):
        raise InvalidRequest(f"load parameter '{parameter}' must name a file inside a version's folder")
    return match[1]


def _unsigned(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise InvalidRequest(f"parameter '{name}' must be an unsigned integer")
    return value


def _boolean(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise InvalidRequest(f"parameter '{name}' must be a boolean")
    return value
