"""Triton's generate extension: flat JSON in and out, for models whose inputs are few and small.

A key that is an input's name is that input, a single value or a list; `id` is the request's id; `parameters` may
hold parameters, and so may any other key.
"""

import json
import math
from typing import Any

import msgspec
from msgspec import Raw

from fairlead.api.kserve.codec import decode, to_json
from fairlead.api.web import decode_json
from fairlead.core.errors import InvalidRequest
from fairlead.core.request import Request, Response
from fairlead.core.specs import ModelSpec, TensorSpec
from fairlead.core.tensors import datatype_of


def decode_flat(body: bytes, model: str, version: str, spec: ModelSpec) -> Request:
    """Raises InvalidRequest. The flat body is spelled out as an ordinary infer request, whose rules it shares."""
    keys = decode_json(body, dict[str, Raw])
    inputs = []
    for tensor in spec.inputs:
        if tensor.name not in keys:
            continue
        value = bytes(keys.pop(tensor.name))
        if not value.startswith(b"["):
            value = b"[" + value + b"]"
        shape = pad(tensor, len(decode_json(value, list[Raw])))
        inputs.append({"name": tensor.name, "datatype": tensor.datatype, "shape": shape, "data": Raw(value)})
    whole: dict[str, Any] = {"inputs": inputs}
    if "id" in keys:
        whole["id"] = keys.pop("id")
    nested = decode_json(bytes(keys.pop("parameters", b"{}")), dict[str, Raw])
    if not nested.keys().isdisjoint(keys):
        raise InvalidRequest(f"parameter '{next(name for name in nested if name in keys)}' stands in the request and in its 'parameters'")
    if keys or nested:
        whole["parameters"] = {**keys, **nested}
    request, _ = decode(msgspec.json.encode(whole), None, model, version)
    return request


def pad(tensor: TensorSpec, count: int) -> tuple[int, ...]:
    """The input's shape for so many values: the last dimension of variable length takes them, the others are 1.

    Raises InvalidRequest where no shape holds exactly `count`.
    """
    fixed = math.prod(dim for dim in tensor.shape if dim != -1)
    variable, rest = divmod(count, fixed) if fixed else (0, count)
    if rest or (variable != 1 and -1 not in tensor.shape):
        raise InvalidRequest(f"{count} values do not fill the shape {list(tensor.shape)} of input '{tensor.name}'")
    shape = []
    for dim in reversed(tensor.shape):
        if dim == -1:
            dim, variable = variable, 1
        shape.append(dim)
    return tuple(reversed(shape))


def encode_flat(response: Response) -> bytes:
    """One JSON object; outputs of one element are unwrapped, others are flat lists. Raises InvalidRequest for what has no JSON form."""
    flat: dict[str, Any] = {"id": response.id} if response.id else {}
    flat |= {"model_name": response.model, "model_version": response.version, **response.parameters}
    for name, array in response.outputs.items():
        values = to_json(array, name, datatype_of(array))
        flat[name] = values[0] if len(values) == 1 else values
    # NaN and the infinities as bare tokens, as in `infer`
    return json.dumps(flat, ensure_ascii=False, separators=(",", ":")).encode()
