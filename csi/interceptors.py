"""Around every call: its log line, its time, its errors in gRPC's words, and the door while the server starts."""

import itertools
import logging
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from csi import limits
from csi.redact import redacted, without_secrets
from plugin import events, logs
from plugin.errors import EbiError, Kind, of_system, unavailable

log = logging.getLogger(__name__)

CODES = {
    Kind.INTERNAL: grpc.StatusCode.INTERNAL,
    Kind.INVALID: grpc.StatusCode.INVALID_ARGUMENT,
    Kind.NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    Kind.EXISTS: grpc.StatusCode.ALREADY_EXISTS,
    Kind.PRECONDITION: grpc.StatusCode.FAILED_PRECONDITION,
    Kind.BUSY: grpc.StatusCode.ABORTED,
    Kind.EXHAUSTED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Kind.OUT_OF_RANGE: grpc.StatusCode.OUT_OF_RANGE,
    Kind.UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    Kind.UNSUPPORTED: grpc.StatusCode.UNIMPLEMENTED,
    Kind.CANCELLED: grpc.StatusCode.CANCELLED,
}
# A status travels as a header, and clients take no more than some KiB of those. Characters.
_LONGEST = 2000
# Asked every few seconds by those who watch over us: their lines are for debugging only.
_ASKING = ("Get", "Probe", "Check", "List", "NodeGet", "ControllerGet")
# Answered before the driver is ready: they are asked whether it is.
_ALWAYS = ("Identity", "Health")


class Calls(grpc.ServerInterceptor):
    """Wraps every method; until `ready` is set only Identity and Health answer. `running` counts calls under way."""

    def __init__(self, ready: threading.Event) -> None:
        self._ready = ready
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self.running = 0

    def intercept_service(self, continuation: Callable[..., Any], details: grpc.HandlerCallDetails) -> Any:
        """The method's handler, wrapped."""
        handler = continuation(details)
        if handler is None or handler.unary_unary is None:
            return handler
        method = details.method

        def call(request: Any, context: grpc.ServicerContext) -> Any:
            number = next(self._numbers)
            volume = getattr(request, "volume_id", "") or getattr(request, "name", "")
            with self._counted(), logs.context(request_id=str(number), method=method.rpartition("/")[2], volume=volume):
                return self._call(number, handler.unary_unary, method, request, context)

        return grpc.unary_unary_rpc_method_handler(
            call, request_deserializer=handler.request_deserializer, response_serializer=handler.response_serializer
        )

    @contextmanager
    def _counted(self) -> Iterator[None]:
        with self._lock:
            self.running += 1
        try:
            yield
        finally:
            with self._lock:
                self.running -= 1

    def _call(
        self, number: int, behaviour: Callable[..., Any], method: str, request: Any, context: grpc.ServicerContext
    ) -> Any:
        service, _, name = method.rpartition("/")
        level = logging.DEBUG if name.startswith(_ASKING) else logging.INFO
        log.log(level, "call %d: %s %s", number, name, redacted(request))
        start = time.monotonic()
        code = grpc.StatusCode.OK
        try:
            if not self._ready.is_set() and not service.endswith(_ALWAYS):
                raise unavailable("the driver is starting", "try again in a moment")
            limits.check(request)
            response = behaviour(request, context)
            log.debug("call %d: answer %s", number, redacted(response))
            return response
        except EbiError as error:
            code, failure = CODES[error.kind], str(error)
            log.log(logging.ERROR if error.kind is Kind.INTERNAL else logging.WARNING, "call %d: %s", number, failure)
        except NotImplementedError:  # what the generated base class does with the rest of the specification
            code, failure = grpc.StatusCode.UNIMPLEMENTED, f"{name} is not offered; see the capabilities"
        except Exception as error:
            # Whoever raised this did not mean it for reading, so it may quote what it stumbled over.
            log.error("call %d failed: %s", number, without_secrets(traceback.format_exc(), request))
            code, failure = grpc.StatusCode.INTERNAL, f"internal error in call {number}; the driver's log has it"
            if isinstance(error, OSError):  # what the kernel says is
                found = of_system(error)
                code, failure = CODES[found.kind], without_secrets(str(found), request)
        finally:
            seconds = time.monotonic() - start
            log.log(level, "call %d: %s %s in %.3f s", number, name, code.name, seconds)
            events.publish(events.Call(name, code.name, seconds))
        context.abort(code, failure if len(failure) <= _LONGEST else f"{failure[:_LONGEST]}…")
        raise AssertionError  # abort never returns
