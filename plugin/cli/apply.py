"""`ebi apply`: make the world as the manifests say, and wait until it is."""

from argparse import Namespace
from typing import Any

from plugin import cli
from plugin.cli import documents
from plugin.cli.progress import Bar
from plugin.errors import EbiError
from plugin.host.files import private_directory
from plugin.images.secrets import DocumentSecrets
from plugin.images.store import Images
from plugin.settings import Settings
from plugin.volumes import Volumes, parameters


def add(commands: Any) -> None:
    """Describe the command."""
    command = commands.add_parser(
        "apply",
        help="create backing images from manifests and wait until they are ready",
        description="Apply BackingImage, Secret and StorageClass documents. Images are made and waited for. Secrets are"
        " used for this run and not stored. A StorageClass is checked; give it to `ebi volume create`."
        " Applying the same again changes nothing.",
    )
    command.add_argument(
        "-f", "--file", action="append", required=True, dest="files", metavar="FILE", help="a YAML file; - for stdin"
    )
    Settings.add_arguments(
        command,
        "workers",
        "allow_loopback",
        "allow_files",
        "download_retries",
        "download_retry_seconds",
        "download_idle_seconds",
    )
    command.set_defaults(run=run)


def run(arguments: Namespace, settings: Settings) -> int:
    """Apply every document; go on after a failure, and return 1 if there was one."""
    failed = False
    try:
        found = documents.load(arguments.files)
        images = Images(private_directory(settings.data_dir) / "images", settings)
        volumes = Volumes(settings.data_dir / "volumes", images, settings)
        secrets = DocumentSecrets(found.secrets)
    except EbiError as error:
        cli.complain(error)
        return 1
    for document in found.classes:
        failed |= not _attempt(f"storageclass/{documents.name_of(document)}", lambda d=document: _check_class(d))
    for document in found.images:
        failed |= not _attempt(
            f"backingimage/{documents.name_of(document)}", lambda d=document: _apply_image(images, volumes, d, secrets)
        )
    return 1 if failed else 0


def _attempt(what: str, action: Any) -> bool:
    try:
        print(f"{what} {action()}", flush=True)
    except EbiError as error:
        cli.complain(error)
        return False
    return True


def _apply_image(images: Images, volumes: Volumes, document: documents.Document, secrets: DocumentSecrets) -> str:
    with Bar(documents.name_of(document)) as bar:
        image = images.apply(document, secrets, bar, volumes=volumes.disks)
    return "ready, encrypted" if image.encrypted else "ready"


def _check_class(document: documents.Document) -> str:
    parsed = parameters.parse(document.get("parameters") or {})
    return f"valid (no effect here: {', '.join(parsed.ignored)})" if parsed.ignored else "valid"
