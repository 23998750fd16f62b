"""The manifests: what one of them says, the others and the driver itself mean too."""

import re
from argparse import Namespace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

from csi.sockets import path as socket_path
from plugin.settings import Settings
from plugin.volumes import ephemeral, parameters

DEPLOY = Path(__file__).parents[2] / "deploy"
MANIFESTS = DEPLOY / "kubernetes"
NAMESPACE = "ebi-system"
DRIVER = Settings().driver_name


def objects(kind: str) -> list[dict[str, Any]]:
    """All objects of a kind."""
    found = [one for path in sorted(MANIFESTS.glob("*.yaml")) for one in yaml.safe_load_all(path.read_text())]
    return [one for one in found if one["kind"] == kind]


def the(kind: str) -> dict[str, Any]:
    """The only object of a kind."""
    (one,) = objects(kind)
    return one


POD = the("DaemonSet")["spec"]["template"]["spec"]
CONTAINERS = {one["name"]: one for one in POD["containers"]}
EVERY = [*POD["initContainers"], *POD["containers"]]
OURS = CONTAINERS["ebi"]
SIDECARS = [one for name, one in CONTAINERS.items() if name != "ebi"]
VOLUMES = {one["name"]: one["hostPath"]["path"] for one in POD["volumes"]}
# What the downward API gives for the container's environment; it looks like this on a node.
FROM_THE_POD = {"spec.nodeName": "node-1"}


def mounts(container: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """A container's mounts by their volume."""
    return {one["name"]: one for one in container["volumeMounts"]}


def flags(name: str) -> dict[str, str]:
    """The arguments of a sidecar; one without a value is true."""
    parts = (argument.removeprefix("--").partition("=") for argument in CONTAINERS[name]["args"])
    return {flag: value if equals else "true" for flag, equals, value in parts}


@pytest.fixture
def settings() -> Settings:
    """What `ebi serve` makes of the environment that it gets."""
    environ = {
        one["name"]: one["value"] if "value" in one else FROM_THE_POD[one["valueFrom"]["fieldRef"]["fieldPath"]]
        for one in OURS["env"]
    }
    return Settings.load(Namespace(), environ)


def test_all_files_are_applied() -> None:
    listed = set(the("Kustomization")["resources"])
    assert listed == {path.name for path in MANIFESTS.glob("*.yaml")} - {"kustomization.yaml"}


def test_everything_that_has_a_namespace_is_in_ours() -> None:
    assert the("Namespace")["metadata"]["name"] == NAMESPACE
    for kind in ("DaemonSet", "ServiceAccount", "Role", "RoleBinding"):
        assert the(kind)["metadata"]["namespace"] == NAMESPACE


class TestDriver:
    def test_has_one_name(self, settings: Settings) -> None:
        assert settings.driver_name == DRIVER
        assert the("CSIDriver")["metadata"]["name"] == DRIVER
        assert the("StorageClass")["provisioner"] == DRIVER

    def test_is_described_as_it_is(self) -> None:
        assert the("CSIDriver")["spec"] == {
            "attachRequired": False,
            "podInfoOnMount": True,
            "fsGroupPolicy": "File",
            "storageCapacity": True,
            "seLinuxMount": True,
            "volumeLifecycleModes": ["Persistent", "Ephemeral"],
        }

    def test_the_inline_volume_of_the_examples_is_one_that_it_understands(self) -> None:
        pod = yaml.safe_load((DEPLOY / "examples/inline-volume.yaml").read_text())
        (volume,) = pod["spec"]["volumes"]
        assert volume["csi"]["driver"] == DRIVER
        size, given = ephemeral.request(volume["csi"]["volumeAttributes"])
        assert (size, parameters.parse(given).image) == (1 << 30, "parrot-cloned-encrypted")

    def test_the_class_has_parameters_that_it_understands(self) -> None:
        storage_class = the("StorageClass")
        assert storage_class["volumeBindingMode"] == "WaitForFirstConsumer"
        found = parameters.parse(storage_class["parameters"])
        assert (found.encrypted, found.image) == (True, "parrot-cloned-encrypted")


class TestEnvironment:
    def test_names_settings_that_there_are(self, settings: Settings) -> None:
        for one in OURS["env"]:
            name = "endpoint" if one["name"] == "CSI_ENDPOINT" else one["name"].removeprefix("EBI_").lower()
            assert hasattr(settings, name), one["name"]

    def test_names_paths_that_are_mounted(self, settings: Settings) -> None:
        ours = mounts(OURS)
        assert str(settings.data_dir) == ours["data"]["mountPath"]
        assert settings.target_root == ours["kubelet"]["mountPath"]
        assert str(socket_path(settings.endpoint).parent) == ours["socket"]["mountPath"]

    def test_a_download_reaches_neither_the_node_nor_its_files(self, settings: Settings) -> None:
        assert not settings.allow_loopback
        assert not settings.allow_files

    def test_the_node_has_its_own_name(self, settings: Settings) -> None:
        assert settings.node_id == "node-1"

    def test_calls_may_end_before_the_pod_does(self, settings: Settings) -> None:
        assert POD["terminationGracePeriodSeconds"] > settings.grace_seconds


class TestSocket:
    def test_is_the_same_for_all(self, settings: Settings) -> None:
        for sidecar in SIDECARS:
            assert flags(sidecar["name"])["csi-address"] == str(socket_path(settings.endpoint))
            assert mounts(sidecar)["socket"]["mountPath"] == mounts(OURS)["socket"]["mountPath"]

    def test_kubelet_finds_it_on_the_host(self, settings: Settings) -> None:
        on_host = f"{VOLUMES['socket']}/{socket_path(settings.endpoint).name}"
        assert flags("node-driver-registrar")["kubelet-registration-path"] == on_host
        assert VOLUMES["socket"] == f"{settings.target_root}/plugins/{DRIVER}"
        assert mounts(CONTAINERS["node-driver-registrar"])["registration"]["mountPath"] == "/registration"


class TestPod:
    def test_mounts_what_there_is_and_nothing_is_in_vain(self) -> None:
        used = {name for container in EVERY for name in mounts(container)}
        assert used == set(VOLUMES)

    @pytest.mark.parametrize("name", ["dev", "sys", "udev", "kubelet", "data", "modules"])
    def test_the_host_s_paths_keep_their_names(self, name: str) -> None:
        assert mounts(OURS)[name]["mountPath"] == VOLUMES[name]

    def test_only_the_driver_is_privileged(self) -> None:
        assert OURS["securityContext"] == {"privileged": True}
        for sidecar in SIDECARS:
            assert sidecar["securityContext"]["capabilities"] == {"drop": ["ALL"]}

    def test_mounts_reach_other_pods_and_uevents_reach_it(self) -> None:
        assert mounts(OURS)["kubelet"]["mountPropagation"] == "Bidirectional"
        assert POD["hostNetwork"]
        assert POD["hostIPC"], "libdevmapper would wait for a semaphore that the host's udevd can't see"

    def test_an_inline_volume_is_staged_also_for_the_next_pod(self) -> None:
        # Else its publish alone would be left, which looks like a stage that nobody uses.
        assert mounts(OURS)["data"]["mountPropagation"] == "Bidirectional"

    def test_the_data_directory_is_made_private(self, settings: Settings) -> None:
        (first,) = POD["initContainers"]
        assert first["command"] == ["chmod", "0700", str(settings.data_dir)]
        assert mounts(first)["data"]["mountPath"] == str(settings.data_dir)

    def test_is_asked_how_it_is_where_the_probe_listens(self) -> None:
        for probe in (OURS["startupProbe"], OURS["livenessProbe"]):
            asked = probe["httpGet"]
            assert flags("liveness-probe")["http-endpoint"] == f"{asked['host']}:{asked['port']}"

    def test_runs_this_version_and_pinned_sidecars(self) -> None:
        for container in (OURS, *POD["initContainers"]):
            assert container["image"] == f"ebi:{version('ebi')}"
        for sidecar in SIDECARS:
            assert re.fullmatch(r"sig-storage/[a-z-]+:v\d+\.\d+\.\d+", sidecar["image"])

    def test_each_node_provisions_its_own_volumes(self) -> None:
        given = flags("csi-provisioner")
        for flag in ("node-deployment", "strict-topology", "enable-capacity"):
            assert given[flag] == "true"
        assert given["immediate-topology"] == "false"
        assert {one["name"] for one in CONTAINERS["csi-provisioner"]["env"]} == {"NODE_NAME", "POD_NAME", "NAMESPACE"}

    def test_one_resizer_works_at_a_time_and_calls_no_controller(self, settings: Settings) -> None:
        assert flags("csi-resizer")["leader-election"] == "true"
        assert not settings.controller_expand


class TestSelfRegistered:
    """The variant without two of the sidecars: a patch, of which kustomize is not here to make a whole."""

    PATCH = yaml.safe_load((DEPLOY / "self-registered/daemonset-patch.yaml").read_text())
    SPEC = PATCH["spec"]["template"]["spec"]

    def test_patches_what_there_is(self) -> None:
        kustomization = yaml.safe_load((DEPLOY / "self-registered/kustomization.yaml").read_text())
        assert kustomization["resources"] == ["../kubernetes"]  # it refuses a base that it lies in
        assert kustomization["patches"] == [{"path": "daemonset-patch.yaml"}]
        assert self.PATCH["metadata"].items() <= the("DaemonSet")["metadata"].items()
        gone = [one["name"] for one in self.SPEC["containers"] if one.get("$patch") == "delete"]
        assert gone == ["node-driver-registrar", "liveness-probe"]
        assert set(gone) <= set(CONTAINERS)
        used = {name for one in EVERY if one["name"] not in gone for name in mounts(one)}
        assert {one["name"] for one in self.SPEC["volumes"]} == set(VOLUMES) - used

    def test_the_driver_takes_their_place(self, settings: Settings) -> None:
        (ours,) = (one for one in self.SPEC["containers"] if one["name"] == "ebi")
        given = Settings.load(Namespace(), {one["name"]: one["value"] for one in ours["env"]})
        assert given.registration_dir == VOLUMES["registration"]
        assert given.registration_dir.startswith(mounts(OURS)["kubelet"]["mountPath"])
        assert str(socket_path(given.kubelet_endpoint)) == flags("node-driver-registrar")["kubelet-registration-path"]
        for name in ("startupProbe", "livenessProbe"):
            assert ours[name]["httpGet"] is None
            assert given.health_address.rpartition(":")[2] == str(ours[name]["grpc"]["port"])
            assert OURS[name]["httpGet"]["port"] == ours[name]["grpc"]["port"]


class TestRights:
    @pytest.mark.parametrize("scope", ["Cluster", ""])
    def test_are_those_of_the_pod(self, scope: str) -> None:
        binding = the(f"{scope}RoleBinding")
        assert binding["roleRef"]["kind"] == f"{scope}Role"
        assert binding["roleRef"]["name"] == the(f"{scope}Role")["metadata"]["name"]
        (subject,) = binding["subjects"]
        account = the("ServiceAccount")["metadata"]
        assert (subject["name"], subject["namespace"]) == (account["name"], account["namespace"])
        assert POD["serviceAccountName"] == account["name"]

    def test_no_secret_but_those_that_are_named(self) -> None:
        rules = [rule for kind in ("ClusterRole", "Role") for rule in the(kind)["rules"]]
        for rule in rules:
            assert "*" not in rule["resources"] + rule["verbs"] + rule["apiGroups"]
            if "secrets" in rule["resources"]:
                assert rule["verbs"] == ["get"]
                assert rule["resourceNames"]


def test_prometheus_scrapes_the_pods(settings: Settings) -> None:
    (port,) = OURS["ports"]
    assert settings.metrics_address.rpartition(":")[2] == str(port["containerPort"])
    (job,) = yaml.safe_load((DEPLOY / "monitoring/prometheus.yaml").read_text())["scrape_configs"]
    assert job["job_name"] == "ebi"  # as in the alerts
    assert job["kubernetes_sd_configs"][0]["namespaces"]["names"] == [NAMESPACE]
    assert job["relabel_configs"][0]["regex"] == port["name"]
