"""`ebi volume`: plays the orchestrator against the CSI socket, for a machine without Kubernetes."""

import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from plugin import volumes
from plugin.cli import documents
from plugin.errors import EbiError, Kind, invalid
from plugin.host import sizes
from plugin.host.files import private_directory
from plugin.images.store import Images
from plugin.settings import Settings
from plugin.volumes import parameters

_REKEY = "change the passphrase of an encrypted volume, staged or not; works on the data directory"
_ID = "the volume's id, as create prints it"
_FS_TYPE = "ext4, xfs or btrfs; default: the StorageClass's, else what is there, else ext4"
_FSTYPE = "csi.storage.k8s.io/fstype"


def add(commands: Any) -> None:
    """Describe the command and its own commands."""
    volume = commands.add_parser("volume", help="create, attach, detach and delete volumes through a CSI socket")
    actions = volume.add_subparsers(required=True, metavar="ACTION", title="actions")

    create = _action(actions, "create", _create, "make a volume of a StorageClass; prints its id")
    create.add_argument("name", metavar="NAME", help="its name; the same again finds the same volume")
    create.add_argument("-f", "--storage-class", required=True, metavar="FILE", help="a file with one StorageClass")
    create.add_argument("-s", "--size", required=True, type=sizes.parse, help="usable size: 10Gi, 500M, bytes")

    attach = _action(
        actions, "attach", _attach, "stage a volume and publish it at a directory (or a file, for --block)"
    )
    attach.add_argument("volume", metavar="ID", help=_ID)
    attach.add_argument("target", type=Path, metavar="TARGET", help="made if absent, and removed on detach")
    attach.add_argument("-f", "--secret", metavar="FILE", help="a file with one Secret; none for a plain volume")
    attach.add_argument("--block", action="store_true", help="publish the raw device instead of a filesystem")
    attach.add_argument("--fs-type", default="", help=_FS_TYPE)
    attach.add_argument("--read-only", action="store_true", help="publish read-only")

    detach = _action(actions, "detach", _detach, "unpublish a volume everywhere and unstage it")
    detach.add_argument("volume", metavar="ID", help=_ID)
    detach.add_argument("target", nargs="*", type=Path, metavar="TARGET", help="block targets; mounts are found")

    delete = _action(actions, "delete", _delete, "destroy a volume and its key")
    delete.add_argument("volume", metavar="ID", help=_ID)

    rekey = actions.add_parser("rekey", help=_REKEY, description=f"{_REKEY[0].upper()}{_REKEY[1:]}.")
    rekey.add_argument("volume", metavar="ID", help=_ID)
    rekey.add_argument("-f", "--secret", required=True, metavar="FILE", help="a file with the Secret that opens it now")
    rekey.add_argument("--new-secret", required=True, metavar="FILE", help="a file with the Secret that shall open it")
    rekey.add_argument("--keep-old", action="store_true", help="let the old passphrase open it too")
    rekey.set_defaults(run=_rekey)


def _action(actions: Any, name: str, run: Callable[["_Client", Namespace], None], text: str) -> Any:
    command = actions.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    Settings.add_arguments(command, "endpoint")

    def call(arguments: Namespace, settings: Settings) -> int:
        client = _Client(settings.endpoint)
        try:
            run(client, arguments)
        finally:
            client.close()
        return 0

    command.set_defaults(run=call)
    return command


class _Client:
    """The two services that an orchestrator calls, with gRPC's errors as ours."""

    def __init__(self, endpoint: str) -> None:
        import grpc

        from csi.stubs import csi_pb2, csi_pb2_grpc

        self._endpoint = endpoint
        self._channel = grpc.insecure_channel(endpoint)
        self.messages = csi_pb2
        self.controller = csi_pb2_grpc.ControllerStub(self._channel)
        self.node = csi_pb2_grpc.NodeStub(self._channel)
        self._failure: Any = grpc.RpcError
        self._kinds = {
            grpc.StatusCode.INVALID_ARGUMENT: Kind.INVALID,
            grpc.StatusCode.NOT_FOUND: Kind.NOT_FOUND,
            grpc.StatusCode.ALREADY_EXISTS: Kind.EXISTS,
            grpc.StatusCode.FAILED_PRECONDITION: Kind.PRECONDITION,
            grpc.StatusCode.ABORTED: Kind.BUSY,
            grpc.StatusCode.RESOURCE_EXHAUSTED: Kind.EXHAUSTED,
            grpc.StatusCode.OUT_OF_RANGE: Kind.OUT_OF_RANGE,
            grpc.StatusCode.UNAVAILABLE: Kind.UNAVAILABLE,
            grpc.StatusCode.UNIMPLEMENTED: Kind.UNSUPPORTED,
        }

    def call(self, method: Any, request: Any) -> Any:
        """Make one call. Raises an `EbiError` with the server's words."""
        try:
            return method(request)
        except self._failure as error:
            kind = self._kinds.get(error.code(), Kind.INTERNAL)
            words, hint = error.details(), ""  # an answer of the server's has its hint in it
            if kind is Kind.UNAVAILABLE and "connect" in words:
                denied = "Permission denied" in words
                hint = "run this as root" if denied else f"is `ebi serve` running at {self._endpoint}?"
            raise EbiError(words, kind=kind, hint=hint) from None

    def staging(self, volume: str) -> Path:
        """Where this client has `volume` staged: beside the socket, so that it is the same for every caller."""
        return Path(self._endpoint.removeprefix("unix://").removeprefix("unix:")).parent / "staging" / volume

    def close(self) -> None:
        """Let the connection go."""
        self._channel.close()


def _create(client: _Client, arguments: Namespace) -> None:
    found = documents.load([arguments.storage_class]).classes
    if len(found) != 1:
        raise invalid(f"{arguments.storage_class} holds {len(found)} StorageClass documents", "give a file with one")
    given = {str(key): str(value) for key, value in (found[0].get("parameters") or {}).items()}
    fs_type = given.get(_FSTYPE, given.get("fsType", ""))
    # The keys with this prefix speak to the orchestrator, which keeps them from the driver.
    own = {key: value for key, value in given.items() if not key.startswith("csi.storage.k8s.io/")}
    if fs_type:  # an orchestrator says it at every stage; `attach` knows the StorageClass no more
        own["fsType"] = fs_type
    ignored = parameters.parse(own).ignored
    messages = client.messages
    response = client.call(
        client.controller.CreateVolume,
        messages.CreateVolumeRequest(
            name=arguments.name,
            capacity_range=messages.CapacityRange(required_bytes=arguments.size),
            volume_capabilities=[_capability(client, block=False, fs_type=fs_type)],
            parameters=own,
        ),
    )
    print(response.volume.volume_id)
    if ignored:
        print(f"ebi: no effect here: {', '.join(ignored)}", file=sys.stderr)


def _attach(client: _Client, arguments: Namespace) -> None:
    messages = client.messages
    staging = client.staging(arguments.volume)
    staging.mkdir(mode=0o700, parents=True, exist_ok=True)
    target = arguments.target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    capability = _capability(client, block=arguments.block, fs_type=arguments.fs_type)
    client.call(
        client.node.NodeStageVolume,
        messages.NodeStageVolumeRequest(
            volume_id=arguments.volume,
            staging_target_path=str(staging),
            volume_capability=capability,
            secrets=_secrets(arguments.secret),
        ),
    )
    client.call(
        client.node.NodePublishVolume,
        messages.NodePublishVolumeRequest(
            volume_id=arguments.volume,
            staging_target_path=str(staging),
            target_path=str(target),
            volume_capability=capability,
            readonly=arguments.read_only,
        ),
    )
    print(f"volume/{arguments.volume} attached at {target}")


def _detach(client: _Client, arguments: Namespace) -> None:
    messages = client.messages
    staging = client.staging(arguments.volume)
    targets = {target.absolute() for target in arguments.target} | volumes.published(arguments.volume, staging)
    for target in sorted(targets):
        client.call(
            client.node.NodeUnpublishVolume,
            messages.NodeUnpublishVolumeRequest(volume_id=arguments.volume, target_path=str(target)),
        )
    client.call(
        client.node.NodeUnstageVolume,
        messages.NodeUnstageVolumeRequest(volume_id=arguments.volume, staging_target_path=str(staging)),
    )
    if staging.exists():
        staging.rmdir()
    print(f"volume/{arguments.volume} detached")


def _delete(client: _Client, arguments: Namespace) -> None:
    client.call(client.controller.DeleteVolume, client.messages.DeleteVolumeRequest(volume_id=arguments.volume))
    print(f"volume/{arguments.volume} deleted")


def _rekey(arguments: Namespace, settings: Settings) -> int:
    images = Images(private_directory(settings.data_dir) / "images", settings)
    store = volumes.Volumes(settings.data_dir / "volumes", images, settings)
    old, new = (documents.secret(file)[1] for file in (arguments.secret, arguments.new_secret))
    store.rekey(arguments.volume, old, new, keep_old=arguments.keep_old)
    print(f"volume/{arguments.volume} rekeyed")
    return 0


def _capability(client: _Client, *, block: bool, fs_type: str) -> Any:
    messages = client.messages
    mode = messages.VolumeCapability.AccessMode(mode=messages.VolumeCapability.AccessMode.SINGLE_NODE_WRITER)
    if block:
        return messages.VolumeCapability(access_mode=mode, block=messages.VolumeCapability.BlockVolume())
    return messages.VolumeCapability(access_mode=mode, mount=messages.VolumeCapability.MountVolume(fs_type=fs_type))


def _secrets(file: str | None) -> dict[str, str]:
    if file is None:
        return {}
    _, data = documents.secret(file)
    try:
        return {key: value.decode() for key, value in data.items()}
    except UnicodeDecodeError:
        raise invalid(f"the Secret in {file} is not UTF-8 text", "CSI carries secrets as text") from None
