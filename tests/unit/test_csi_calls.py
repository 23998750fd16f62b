"""Around every call: what is logged of it, what is counted, and how failures look from outside."""

import errno
import io
import json
import logging
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from csi.interceptors import CODES, Calls
from csi.redact import redacted
from csi.stubs import csi_pb2, csi_pb2_grpc
from plugin import events, logs
from plugin.errors import EbiError, Kind
from tests.unit.csi_node import connected, mount, refused, running

SECRET = "correct horse\nbattery"
STAGE = csi_pb2.NodeStageVolumeRequest(
    volume_id="pvc-1",
    staging_target_path="/ebi-test/staging",
    volume_capability=mount(fs_type="ext4", mount_flags=["noatime", f"password={SECRET}"]),
    secrets={"CRYPTO_KEY_VALUE": SECRET, "other": "256"},
    volume_context={"encrypted": "true"},
)


@contextmanager
def serving(behaviour: Callable[[Any, Any], Any], *, ready: bool = True) -> Iterator[csi_pb2_grpc.NodeStub]:
    """A server whose NodeStageVolume is `behaviour`, behind the interceptor."""
    door = threading.Event()
    if ready:
        door.set()
    handler = grpc.unary_unary_rpc_method_handler(
        behaviour,
        request_deserializer=csi_pb2.NodeStageVolumeRequest.FromString,
        response_serializer=csi_pb2.NodeStageVolumeResponse.SerializeToString,
    )
    methods = grpc.method_handlers_generic_handler("csi.v1.Node", {"NodeStageVolume": handler})
    with ThreadPoolExecutor(2) as pool, tempfile.TemporaryDirectory() as home:
        server = grpc.server(pool, interceptors=[Calls(door)])
        server.add_generic_rpc_handlers([methods])
        server.add_insecure_port(f"unix:{home}/socket")
        server.start()
        try:
            with connected(Path(home) / "socket") as channel:
                yield csi_pb2_grpc.NodeStub(channel)
        finally:
            server.stop(None).wait()


def raising(error: BaseException) -> Callable[[Any, Any], Any]:
    def behaviour(request: Any, context: Any) -> Any:
        raise error

    return behaviour


def test_secrets_and_mount_flags_are_struck_out_of_the_log_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with running() as node:
        node.create("pvc-1", secrets={"key": SECRET})
        refused(lambda: node.node.NodeStageVolume(STAGE))
    logged = caplog.text
    assert "/ebi-test/staging" in logged
    assert "ext4" in logged
    assert '"encrypted": "true"' in logged
    assert logged.count("***stripped***") >= 3
    for hidden in (SECRET, "correct horse", "battery", "noatime", "CRYPTO_KEY_VALUE"):
        assert hidden not in logged


def test_secrets_are_found_by_their_mark_however_deep_they_are() -> None:
    message = _nested()
    message.inner.text = "hidden-1"
    message.list.add().text = "hidden-2"
    message.map["key"].text = "hidden-3"
    message.number = 4711
    message.open = "shown"
    logged = redacted(message)
    assert "hidden" not in logged
    assert "4711" not in logged
    assert json.loads(logged)["open"] == "shown"
    assert list(json.loads(logged)["map"]) == ["key"]


def _nested() -> Any:
    """A message with marked fields in a message, in a list and in a map, and a marked number."""
    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="nested.proto", package="nested", syntax="proto3")
    file.dependency.append("csi.proto")
    inner = file.message_type.add(name="Inner")
    inner.field.add(name="text", number=1, type=field.TYPE_STRING, label=field.LABEL_OPTIONAL)
    outer = file.message_type.add(name="Outer")
    entry = outer.nested_type.add(name="MapEntry", options=descriptor_pb2.MessageOptions(map_entry=True))
    entry.field.add(name="key", number=1, type=field.TYPE_STRING, label=field.LABEL_OPTIONAL)
    for owner, name, number, many, kind in (
        (entry, "value", 2, False, ".nested.Inner"),
        (outer, "inner", 1, False, ".nested.Inner"),
        (outer, "list", 2, True, ".nested.Inner"),
        (outer, "map", 3, True, ".nested.Outer.MapEntry"),
    ):
        label = field.LABEL_REPEATED if many else field.LABEL_OPTIONAL
        owner.field.add(name=name, number=number, type=field.TYPE_MESSAGE, label=label, type_name=kind)
    outer.field.add(name="number", number=4, type=field.TYPE_INT32, label=field.LABEL_OPTIONAL)
    outer.field.add(name="open", number=5, type=field.TYPE_STRING, label=field.LABEL_OPTIONAL)
    for marked in (inner.field[0], outer.field[3]):
        marked.options.Extensions[csi_pb2.csi_secret] = True
    pool = descriptor_pool.Default()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("nested.Outer"))()


@pytest.mark.parametrize("kind", Kind)
def test_every_kind_of_error_has_its_code_and_brings_its_hint(kind: Kind) -> None:
    with serving(raising(EbiError("volume v is odd", kind=kind, hint="make it even"))) as node:
        error = refused(lambda: node.NodeStageVolume(STAGE))
    assert error.code() is CODES[kind]
    assert error.details() == "volume v is odd (make it even)"


def test_an_unexpected_failure_is_internal_and_quotes_no_secret_anywhere(caplog: pytest.LogCaptureFixture) -> None:
    with serving(raising(ValueError(f"can't parse {SECRET!r} or {SECRET}"))) as node:
        error = refused(lambda: node.NodeStageVolume(STAGE))
    assert error.code() is grpc.StatusCode.INTERNAL
    assert "ValueError" in caplog.text, "the log has no traceback"
    assert "can't parse" in caplog.text
    for text in (caplog.text, error.details()):
        assert SECRET not in text
        assert repr(SECRET)[1:-1] not in text
    number = re.search(r"call (\d+)", error.details())
    assert number is not None
    assert f"call {number[1]} failed" in caplog.text


@pytest.mark.parametrize(
    ("number", "code"),
    [(errno.ENOSPC, "RESOURCE_EXHAUSTED"), (errno.EROFS, "FAILED_PRECONDITION"), (errno.EIO, "INTERNAL")],
)
def test_what_the_kernel_says_reaches_the_caller_without_secrets(number: int, code: str) -> None:
    with serving(raising(OSError(number, os.strerror(number), f"/data/{SECRET}"))) as node:
        error = refused(lambda: node.NodeStageVolume(STAGE))
    assert error.code().name == code
    assert f": {os.strerror(number)} (" in error.details()
    assert SECRET not in error.details()


def test_a_message_that_no_header_could_hold_is_cut() -> None:
    with serving(raising(EbiError("x" * 100_000))) as node:
        error = refused(lambda: node.NodeStageVolume(STAGE))
    assert error.code() is grpc.StatusCode.INTERNAL
    assert 1000 < len(error.details()) < 4000


def test_while_it_starts_it_says_so() -> None:
    with serving(raising(AssertionError("called")), ready=False) as node:
        error = refused(lambda: node.NodeStageVolume(STAGE))
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert "starting" in error.details()


def test_every_call_is_counted_with_its_code_and_its_time() -> None:
    seen: list[events.Event] = []
    end = events.subscribe(seen.append)
    try:
        with running() as node:
            node.create("pvc-1")
            refused(lambda: node.node.NodeStageVolume(csi_pb2.NodeStageVolumeRequest()))
    finally:
        end()
    calls = [event for event in seen if isinstance(event, events.Call)]
    assert [(call.method, call.code) for call in calls] == [
        ("CreateVolume", "OK"),
        ("NodeStageVolume", "INVALID_ARGUMENT"),
    ]
    assert all(0 < call.seconds < 60 for call in calls)


def logged(form: str, behaviour: Callable[[Any, Any], Any]) -> list[str]:
    """The lines that one NodeStageVolume logs."""
    before, out = logging.root.handlers[:], io.StringIO()
    with redirect_stderr(out):
        logs.configure("info", form)
    try:
        with serving(behaviour) as node:
            node.NodeStageVolume(STAGE)
    finally:
        logging.root.handlers[:] = before
    return out.getvalue().splitlines()


def test_lines_of_the_driver_itself_tell_the_call_and_the_volume_they_belong_to() -> None:
    def behaviour(request: Any, context: Any) -> Any:
        logging.getLogger("plugin.test").warning("something")
        return csi_pb2.NodeStageVolumeResponse()

    (line,) = [line for text in logged("json", behaviour) if (line := json.loads(text))["logger"] == "plugin.test"]
    assert (line["request_id"], line["method"], line["volume"]) == ("1", "NodeStageVolume", "pvc-1")


class TestLongSteps:
    """What takes long is told of while it does."""

    @staticmethod
    def stage(request: Any, context: Any) -> Any:
        with events.step("quick"):
            pass
        with events.step("fsck"):
            time.sleep(0.9)
        time.sleep(0.5)
        return csi_pb2.NodeStageVolumeResponse()

    @pytest.fixture(autouse=True)
    def soon(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(events, "_TELL_AFTER", 0.2)

    def test_with_the_call_and_volume_and_ever_more_seldom(self) -> None:
        lines = [json.loads(text) for text in logged("json", self.stage)]
        told = [line for line in lines if line["logger"] == "plugin.events"]
        assert len(told) == 2, "after 0.2 s and 0.6 s, and not once it had ended"
        for line in told:
            assert re.match(r"still at the step fsck after \d s", line["message"])
            assert (line["request_id"], line["method"], line["volume"]) == ("1", "NodeStageVolume", "pvc-1")

    def test_also_where_the_log_is_text(self) -> None:
        told = [line for line in logged("text", self.stage) if "still at the step fsck" in line]
        assert len(told) == 2
        assert all(line.endswith("(request_id '1', method 'NodeStageVolume', volume 'pvc-1')") for line in told)
