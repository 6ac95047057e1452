"""Protobuf messages in a descriptor pool of our own, so that tritonclient's can live in the same process.

`protos/descriptors.binpb` is compiled from the .proto files beside it:

    cd protos && python -m grpc_tools.protoc -I . --include_imports --descriptor_set_out=descriptors.binpb *.proto
"""

from importlib.resources import files
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.json_format import ParseDict, ParseError
from google.protobuf.message import DecodeError, Message

from fairlead.core.errors import InvalidRequest

_descriptors = descriptor_pb2.FileDescriptorSet.FromString(files(__package__).joinpath("protos/descriptors.binpb").read_bytes())
POOL = descriptor_pool.DescriptorPool()
for _file in _descriptors.file:
    POOL.Add(_file)


def message_class(name: str) -> Any:
    """The class of a message by its full name, e.g. `inference.ModelReadyRequest`."""
    return message_factory.GetMessageClass(POOL.FindMessageTypeByName(name))


def parse(kind: Any, data: bytes | memoryview) -> Any:
    """Raises InvalidRequest."""
    try:
        return kind.FromString(bytes(data))
    except DecodeError:
        raise InvalidRequest(f"the request is not a valid {kind.DESCRIPTOR.full_name} message") from None


def from_dict(kind: Any, value: dict[str, Any]) -> Message:
    """A message from its protobuf-JSON form with original field names. What the schema lacks is a bug of ours."""
    try:
        message: Message = ParseDict(value, kind())
    except ParseError as error:
        raise AssertionError(f"{kind.DESCRIPTOR.full_name}: {error}") from error
    return message
