"""`ebi get`: show backing images and volumes."""

from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from plugin.cli import output
from plugin.cli.output import Column
from plugin.images.store import Images
from plugin.settings import Settings
from plugin.volumes import Volumes

_IMAGE_COLUMNS = (
    Column("NAME", "metadata.name"),
    Column("UUID", "status.uuid"),
    Column("SOURCETYPE", "spec.sourceType"),
    Column("STATE", "status.state"),
    Column("PROGRESS", "status.progress", output.percent),
    Column("ENCRYPTED", "status.encrypted"),
    Column("SIZE", "status.size", output.size),
    Column("VIRTUALSIZE", "status.virtualSize", output.size),
    Column("REALSIZE", "status.realSize", output.size),
    Column("AGE", "metadata.creationTimestamp", output.age),
    Column("MESSAGE", "status.message"),
)
_VOLUME_COLUMNS = (
    Column("NAME", "metadata.name"),
    Column("CAPACITY", "spec.capacity", output.size),
    Column("BACKINGIMAGE", "spec.backingImage"),
    Column("ENCRYPTED", "spec.encrypted"),
    Column("STATE", "status.state"),
    Column("REALSIZE", "status.realSize", output.size),
    Column("AGE", "metadata.creationTimestamp", output.age),
)
IMAGES = ("backingimages", "backingimage", "lhbi")
VOLUMES = ("volumes", "volume")


def add(commands: Any) -> None:
    """Describe the command."""
    text = "show backing images or volumes"
    command = commands.add_parser("get", help=text, description=f"{text.capitalize()}.")
    command.add_argument("kind", choices=IMAGES + VOLUMES, metavar="KIND", help="backingimages (lhbi) or volumes")
    command.add_argument("name", nargs="?", metavar="NAME", help="one by name; all without it")
    command.add_argument("-o", "--output", choices=output.FORMATS, default="table", help="default: table")
    command.set_defaults(run=run)


def run(arguments: Namespace, settings: Settings) -> int:
    """Print the object named, or all of its kind."""
    images = Images(settings.data_dir / "images", settings)
    store: Images | Volumes = images
    columns: Sequence[Column] = _IMAGE_COLUMNS
    if arguments.kind in VOLUMES:
        store = Volumes(settings.data_dir / "volumes", images, settings)
        columns = _VOLUME_COLUMNS
    if arguments.name:
        output.show(store.get(arguments.name).to_object(), columns, arguments.output)
    else:
        output.show([item.to_object() for item in store.list()], columns, arguments.output)
    return 0
