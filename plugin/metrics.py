"""Prometheus metrics: how long calls, steps and image operations take, and what there is.

Fed by `plugin.events`; gauges are read from the disk and the kernel when somebody asks. Every label has a fixed set
of values, and none holds a name that a user chose.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, start_http_server
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from plugin import events
from plugin.errors import invalid, unavailable
from plugin.host import dm
from plugin.images.store import Images
from plugin.settings import Settings

# Seconds. A mount takes milliseconds, a key derivation seconds, a large image minutes.
_QUICK = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_LONG = (0.1, 0.5, 1, 5, 15, 60, 300, 900, 3600)
_KINDS = ("img", "base", "cow", "vol")
_STATES = (
    "pending",
    "starting",
    "ready-for-transfer",
    "in-progress",
    "ready",
    "failed",
    "failed-and-cleanup",
    "unknown",
)


class Metrics:
    """The counters and histograms, in a registry of their own."""

    def __init__(self, settings: Settings, images: Images) -> None:
        self.registry = CollectorRegistry()
        self._calls = Histogram(
            "ebi_csi_call_duration_seconds",
            "Time of a CSI call",
            ("method", "code"),
            buckets=_QUICK,
            registry=self.registry,
        )
        self._steps = Histogram(
            "ebi_step_duration_seconds",
            "Time of a step inside a call, such as unlock_image",
            ("step", "result"),
            buckets=_QUICK,
            registry=self.registry,
        )
        self._operations = Histogram(
            "ebi_image_operation_seconds",
            "Time of an operation on a backing image",
            ("operation", "result"),
            buckets=_LONG,
            registry=self.registry,
        )
        self._bytes = Counter(
            "ebi_image_operation_bytes",
            "Bytes of data that operations on backing images moved",
            ("operation", "result"),
            registry=self.registry,
        )
        self._uevents = Counter(
            "ebi_udev_events", "Uevents of our device-mapper devices", ("action",), registry=self.registry
        )
        self._lost = Counter("ebi_mappings_lost", "Mappers that vanished without our doing", registry=self.registry)
        self.registry.register(_Gauges(settings, images))
        ProcessCollector(registry=self.registry)  # memory, open files, CPU time

    def record(self, event: events.Event) -> None:
        """Count one event."""
        match event:
            case events.Call(method, code, seconds):
                self._calls.labels(method, code).observe(seconds)
            case events.Step(name, seconds, ok):
                self._steps.labels(name, _result(ok)).observe(seconds)
            case events.ImageOperation(name, size, seconds, ok):
                self._operations.labels(name, _result(ok)).observe(seconds)
                self._bytes.labels(name, _result(ok)).inc(size)
            case events.DeviceEvent(action, _, lost):
                self._uevents.labels(action).inc()
                if lost:
                    self._lost.inc()


class _Gauges(Collector):
    """What there is now."""

    def __init__(self, settings: Settings, images: Images) -> None:
        self._settings = settings
        self._images = images

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Images by state, mapped devices by kind, the store's size and free space."""
        states = GaugeMetricFamily("ebi_images", "Backing images", labels=("state",))
        found = [str(image.status.state) for image in self._images.list()]
        for state in _STATES:
            states.add_metric((state,), found.count(state))
        yield states
        devices = GaugeMetricFamily("ebi_mapped_devices", "Device-mapper devices of ours", labels=("kind",))
        for kind in _KINDS:
            devices.add_metric((kind,), sum(1 for _ in dm.every(f"ebi-{kind}-")))
        yield devices
        store = GaugeMetricFamily("ebi_store_bytes", "The data directory's filesystem", labels=("kind",))
        space = os.statvfs(self._settings.data_dir)
        store.add_metric(("size",), space.f_blocks * space.f_frsize)
        store.add_metric(("free",), space.f_bavail * space.f_frsize)
        yield store


def _result(ok: bool) -> str:
    return "ok" if ok else "failed"


@contextmanager
def exported(settings: Settings, images: Images) -> Iterator[Metrics]:
    """Count events, and serve them at `settings.metrics_address` if there is one, for as long as the block runs.

    Raises INVALID for an address that is none, UNAVAILABLE for one that can't be had.
    """
    metrics = Metrics(settings, images)
    unsubscribe = events.subscribe(metrics.record)
    server = None
    try:
        if settings.metrics_address:
            host, port = _address(settings.metrics_address)
            try:
                server, _ = start_http_server(port, host, metrics.registry)
            except OSError as error:
                raise unavailable(
                    f"cannot serve metrics at {settings.metrics_address}: {error.strerror}", "is the port taken?"
                ) from error
        yield metrics
    finally:
        unsubscribe()
        if server is not None:
            server.shutdown()
            server.server_close()


def _address(text: str) -> tuple[str, int]:
    match = re.fullmatch(r"(\[[^\]]*\]|[^:]*):([0-9]{1,5})", text)
    if match is None or int(match[2]) > 65535:
        raise invalid(f"invalid metrics address {text!r}", "give HOST:PORT, or :PORT for every address of this machine")
    return match[1].strip("[]") or "0.0.0.0", int(match[2])  # noqa: S104
