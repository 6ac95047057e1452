"""Our messages are Triton's, in a pool of their own."""

from importlib.resources import files

import tritonclient.grpc.model_config_pb2 as config_pb2
from google.protobuf import descriptor_pb2
from tritonclient.grpc import service_pb2 as pb

from fairlead.api.grpc.messages import POOL, message_class


def described(descriptor) -> descriptor_pb2.DescriptorProto:
    proto = descriptor_pb2.DescriptorProto()
    descriptor.CopyToProto(proto)
    return without_json_names(proto)


def without_json_names(proto: descriptor_pb2.DescriptorProto) -> descriptor_pb2.DescriptorProto:
    """Some compilers write them out, others leave them to be derived."""
    for field in proto.field:
        field.ClearField("json_name")
    for nested in proto.nested_type:
        without_json_names(nested)
    return proto


def test_every_message_of_triton_is_the_same_here():
    ours = 0
    for module in (pb, config_pb2):
        for name, theirs in module.DESCRIPTOR.message_types_by_name.items():
            mine = described(POOL.FindMessageTypeByName(f"inference.{name}"))
            if name == "ModelMetadataResponse":  # the Open Inference Protocol adds to it
                assert mine.field.pop().name == "properties"
                mine.nested_type.pop()
            assert mine == described(theirs), name
            ours += 1
    assert ours > 60
    assert set(pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods_by_name) == set(
        POOL.FindServiceByName("inference.GRPCInferenceService").methods_by_name
    )


def test_they_are_not_the_classes_of_tritonclient():
    mine = message_class("inference.ModelReadyRequest")(name="m", version="1")
    assert type(mine) is not pb.ModelReadyRequest
    assert pb.ModelReadyRequest.FromString(mine.SerializeToString()) == pb.ModelReadyRequest(name="m", version="1")


def test_the_compiled_descriptors_are_those_of_the_sources():
    folder = files("fairlead.api.grpc") / "protos"
    compiled = descriptor_pb2.FileDescriptorSet.FromString((folder / "descriptors.binpb").read_bytes())
    for file in compiled.file:
        source = (folder / file.name).read_text()
        for message in file.message_type:
            assert f"message {message.name} " in source
            for field in message.field:
                assert f" {field.name} = {field.number}" in source
        for service in file.service:
            for method in service.method:
                assert f"rpc {method.name}(" in source
