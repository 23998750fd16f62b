"""The stubs are what proto/ says, and proto/ says what the specification does."""

import hashlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet

from csi import generate
from csi.stubs import csi_pb2, csi_pb2_grpc, health_pb2, health_pb2_grpc, registration_pb2, registration_pb2_grpc

# Of `wire_facts`, for csi.proto of github.com/container-storage-interface/spec v1.12.0, compiled by protoc.
SPECIFICATION = "61d8effbbdc205da2acc2df9980a8471ab2a2bfe60d7df760523c7041f0c8073"


def wire_facts(file: FileDescriptorProto) -> list[str]:
    """A line for each name, number, type and option of the file, without what only its source text decides."""

    def messages(message: Any, scope: str) -> Iterator[str]:
        name = f"{scope}.{message.name}"
        yield f"{name} {own(message.options)}"
        for field in message.field:
            oneof = message.oneof_decl[field.oneof_index].name if field.HasField("oneof_index") else ""
            kind = f"{field.number} {field.type} {field.label} {field.type_name}"
            yield f"{name}.{field.name} {kind} {oneof} {own(field.options)}"
        for one in message.enum_type:
            yield from enums(one, name)
        for one in message.nested_type:
            yield from messages(one, name)

    def enums(enum: Any, scope: str) -> Iterator[str]:
        yield from (f"{scope}.{enum.name}.{value.name} {value.number} {own(value.options)}" for value in enum.value)

    def own(options: Any) -> str:
        return str(options.SerializeToString(deterministic=True).hex())

    def every() -> Iterator[str]:
        for message in file.message_type:
            yield from messages(message, file.package)
        for enum in file.enum_type:
            yield from enums(enum, file.package)
        for option in file.extension:
            yield f"{option.name} {option.number} {option.type} {option.extendee}"
        for service in file.service:
            yield f"{service.name} {own(service.options)}"
            for method in service.method:
                ends = f"{method.input_type} {method.output_type} {method.client_streaming} {method.server_streaming}"
                yield f"{service.name}.{method.name} {ends} {own(method.options)}"

    return sorted(every())


def compiled(stub: Any) -> list[str]:
    return wire_facts(FileDescriptorProto.FromString(stub.DESCRIPTOR.serialized_pb))


def test_every_fact_on_the_wire_is_the_specification_s() -> None:
    assert hashlib.sha256("\n".join(compiled(csi_pb2)).encode()).hexdigest() == SPECIFICATION


@pytest.mark.parametrize(
    ("name", "stub"), [("csi", csi_pb2), ("health", health_pb2), ("registration", registration_pb2)]
)
def test_the_stubs_are_those_of_the_proto_files(name: str, stub: Any, tmp_path: Path) -> None:
    proto = Path(generate.__file__).parents[1] / "proto"
    out = tmp_path / "set"
    protoc = [sys.executable, "-m", "grpc_tools.protoc", f"-I{proto}", f"--descriptor_set_out={out}", f"{name}.proto"]
    subprocess.run(protoc, check=True)
    (file,) = FileDescriptorSet.FromString(out.read_bytes()).file
    assert wire_facts(file) == compiled(stub)


def test_generating_them_again_gives_the_same_files_up_to_the_generator_s_version(tmp_path: Path) -> None:
    generate.generate(tmp_path)
    fresh = {file.name: _plain(file) for file in tmp_path.iterdir()}
    kept = {file.name: _plain(file) for file in generate.STUBS.iterdir() if file.is_file()}
    assert fresh.keys() == kept.keys()
    # What a method is called and how its messages are read; the rest of a line is the generator's taste.
    for name in ("csi_pb2_grpc.py", "health_pb2_grpc.py", "registration_pb2_grpc.py"):
        assert fresh[name] == kept[name]


def _plain(file: Path) -> list[str]:
    lines = [line.strip() for line in file.read_text().splitlines()]
    return [line for line in lines if line.startswith(("from csi", "'/", "def ", "class ", "request_", "response_"))]


@pytest.mark.parametrize("stub", [csi_pb2_grpc, health_pb2_grpc, registration_pb2_grpc])
def test_services_import_their_messages_from_this_package(stub: Any) -> None:
    text = Path(stub.__file__).read_text()
    assert "\nfrom csi.stubs import " in text
    assert "\nimport csi_pb2" not in text
    assert "\nimport registration_pb2" not in text
    assert "\nimport health_pb2" not in text
