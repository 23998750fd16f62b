"""The metrics endpoint, scraped over HTTP."""

import socket
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from plugin import events, metrics
from plugin.errors import EbiError, Kind
from plugin.images.secrets import DocumentSecrets
from plugin.images.store import Images
from plugin.settings import Settings


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return Settings(data_dir=tmp_path, metrics_address=f"127.0.0.1:{port}")


@pytest.fixture
def images(settings: Settings) -> Images:
    return Images(settings.data_dir / "images", settings)


@pytest.fixture
def served(settings: Settings, images: Images) -> Iterator[Settings]:
    with metrics.exported(settings, images):
        yield settings


def scrape(settings: Settings) -> dict[str, Metric]:
    with urllib.request.urlopen(f"http://{settings.metrics_address}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    return {family.name: family for family in text_string_to_metric_families(text)}


def value(families: dict[str, Metric], sample: str, **labels: str) -> float:
    (found,) = [
        one.value
        for family in families.values()
        for one in family.samples
        if one.name == sample and one.labels == labels
    ]
    return float(found)


def test_calls_and_steps_are_histograms_by_name_and_outcome(served: Settings) -> None:
    events.publish(events.Call("NodeStageVolume", "OK", 0.7))
    events.publish(events.Call("NodeStageVolume", "OK", 0.02))
    events.publish(events.Call("NodeStageVolume", "INVALID_ARGUMENT", 0.001))
    with pytest.raises(ValueError, match="wrong"), events.step("unlock_image"):
        raise ValueError("wrong")
    with events.step("mount"):
        pass
    found = scrape(served)
    stage = {"method": "NodeStageVolume", "code": "OK"}
    assert value(found, "ebi_csi_call_duration_seconds_count", **stage) == 2
    assert value(found, "ebi_csi_call_duration_seconds_sum", **stage) == pytest.approx(0.72)
    assert value(found, "ebi_csi_call_duration_seconds_bucket", le="0.025", **stage) == 1
    bad = {"method": "NodeStageVolume", "code": "INVALID_ARGUMENT"}
    assert value(found, "ebi_csi_call_duration_seconds_count", **bad) == 1
    assert value(found, "ebi_step_duration_seconds_count", step="unlock_image", result="failed") == 1
    assert value(found, "ebi_step_duration_seconds_count", step="mount", result="ok") == 1


def test_image_operations_tell_their_time_and_their_bytes(served: Settings) -> None:
    events.publish(events.ImageOperation("encrypt", 1 << 30, 4.0, ok=True))
    events.publish(events.ImageOperation("encrypt", 1 << 20, 2.0, ok=False))
    found = scrape(served)
    assert value(found, "ebi_image_operation_seconds_sum", operation="encrypt", result="ok") == 4
    assert value(found, "ebi_image_operation_bytes_total", operation="encrypt", result="ok") == 1 << 30
    assert value(found, "ebi_image_operation_bytes_total", operation="encrypt", result="failed") == 1 << 20


def test_a_mapping_that_vanishes_is_counted(served: Settings) -> None:
    assert value(scrape(served), "ebi_mappings_lost_total") == 0
    events.publish(events.DeviceEvent("remove", "ebi-vol-pvc-1", lost=True))
    events.publish(events.DeviceEvent("remove", "ebi-vol-pvc-2"))
    found = scrape(served)
    assert value(found, "ebi_mappings_lost_total") == 1
    assert value(found, "ebi_udev_events_total", action="remove") == 2


def test_gauges_tell_what_there_is_now(served: Settings, images: Images, tmp_path: Path) -> None:
    assert value(scrape(served), "ebi_images", state="ready") == 0
    source = tmp_path / "golden.raw"
    source.write_bytes(bytes(1 << 20))
    manifest = {
        "apiVersion": "longhorn.io/v1beta2",
        "kind": "BackingImage",
        "metadata": {"name": "golden", "namespace": "longhorn-system"},
        "spec": {"sourceType": "download", "sourceParameters": {"url": source.as_uri()}},
    }
    images.apply(manifest, DocumentSecrets([]))
    found = scrape(served)
    assert value(found, "ebi_images", state="ready") == 1
    assert {one.labels["state"] for one in found["ebi_images"].samples} >= {"pending", "in-progress", "failed"}
    assert {one.labels["kind"] for one in found["ebi_mapped_devices"].samples} == {"img", "base", "cow", "vol"}
    assert 0 < value(found, "ebi_store_bytes", kind="free") <= value(found, "ebi_store_bytes", kind="size")
    assert value(found, "process_resident_memory_bytes") > 0


def test_no_label_holds_a_name_that_a_user_chose(served: Settings) -> None:
    events.publish(events.DeviceEvent("add", "ebi-vol-a-user-s-volume"))
    events.publish(events.DeviceEvent("remove", "ebi-vol-a-user-s-volume", lost=True))
    families = scrape(served).values()
    labels = {name for family in families for one in family.samples for name in one.labels}
    assert labels <= {"action", "code", "kind", "le", "method", "operation", "result", "state", "step"}
    assert not [text for family in families for one in family.samples for text in one.labels.values() if "user" in text]


def test_nothing_listens_and_nothing_counts_when_it_is_over(settings: Settings, images: Images) -> None:
    with metrics.exported(settings, images) as counters:
        pass
    events.publish(events.Call("Probe", "OK", 0.1))
    assert counters.registry.get_sample_value("ebi_csi_call_duration_seconds_count", {"method": "Probe"}) is None
    with pytest.raises(OSError, match="refused"):
        scrape(settings)


@pytest.mark.parametrize("address", ["9808", "localhost", "localhost:", "localhost:http", "localhost:99999"])
def test_an_address_that_is_none_is_refused(images: Images, tmp_path: Path, address: str) -> None:
    settings = Settings(data_dir=tmp_path, metrics_address=address)
    with pytest.raises(EbiError) as caught, metrics.exported(settings, images):
        pass
    assert caught.value.kind is Kind.INVALID


def test_a_taken_port_is_named(served: Settings, images: Images) -> None:
    with pytest.raises(EbiError, match=served.metrics_address) as caught, metrics.exported(served, images):
        pass
    assert caught.value.kind is Kind.UNAVAILABLE
