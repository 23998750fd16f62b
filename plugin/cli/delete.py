"""`ebi delete`: remove a backing image or a volume."""

from argparse import Namespace
from typing import Any

from plugin.cli.get import IMAGES, VOLUMES
from plugin.images.store import Images
from plugin.settings import Settings
from plugin.volumes import Volumes


def add(commands: Any) -> None:
    """Describe the command."""
    command = commands.add_parser(
        "delete",
        help="delete a backing image or a volume",
        description="Delete a backing image that no volume uses, or a volume that is not staged.",
    )
    command.add_argument("kind", choices=IMAGES + VOLUMES, metavar="KIND", help="backingimage or volume")
    command.add_argument("name", metavar="NAME", help="its name, or the volume's id")
    command.set_defaults(run=run)


def run(arguments: Namespace, settings: Settings) -> int:
    """Delete the object named; NOT_FOUND where there is none."""
    images = Images(settings.data_dir / "images", settings)
    volumes = Volumes(settings.data_dir / "volumes", images, settings)
    if arguments.kind in VOLUMES:
        volumes.get(arguments.name)  # CSI's delete takes an absent volume for done; a person made a typing error
        volumes.delete(arguments.name)
        print(f"volume/{arguments.name} deleted")
    else:
        images.delete(arguments.name)
        print(f"backingimage/{arguments.name} deleted")
    return 0
