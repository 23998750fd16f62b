"""`ebi doctor`: what is wrong on this node, and its repair."""

from argparse import Namespace
from typing import Any

from plugin import findings
from plugin.cli import output
from plugin.cli.output import Column
from plugin.findings import Finding
from plugin.host import requirements
from plugin.host.files import private_directory
from plugin.images import health
from plugin.images.store import Images
from plugin.settings import Settings
from plugin.volumes import Volumes

_COLUMNS = (
    Column("SUBJECT", "subject"),
    Column("KIND", "kind"),
    Column("STATE", "state"),
    Column("MESSAGE", "message"),
    Column("WHAT TO DO", "hint"),
)
_EPILOG = "exit status: 0 nothing is wrong (any more); 1 something is; others as of every command."


def add(commands: Any) -> None:
    """Describe the command."""
    command = commands.add_parser(
        "doctor",
        help="tell what is wrong with this node's volumes, devices and images, and repair it",
        description="Look at devices, mounts and the data directory. Nothing that is in use is touched.",
        epilog=_EPILOG,
    )
    command.add_argument("--fix", action="store_true", help="repair what can be repaired")
    command.add_argument(
        "--unstage", action="store_true", help="with --fix: also unstage volumes that are published nowhere"
    )
    command.add_argument("-o", "--output", choices=output.FORMATS, default="table", help="default: table")
    Settings.add_arguments(command, "device_template")
    command.set_defaults(run=run)


def run(arguments: Namespace, settings: Settings) -> int:
    """Print what was found, and what has become of it."""
    images = Images(private_directory(settings.data_dir) / "images", settings)
    volumes = Volumes(settings.data_dir / "volumes", images, settings)
    found = _examine(volumes, images)
    left = found
    if arguments.fix:
        findings.repair(finding for finding in found if finding.wrong or arguments.unstage)
        left = _examine(volumes, images)
    still = {_identity(finding) for finding in left}
    shown = [{**item.to_object(), "state": _state(item, still)} for item in [*found, *_new(left, found)]]
    if shown or arguments.output != "table":
        output.show(shown, _COLUMNS, arguments.output)
    else:
        print("nothing is wrong")
    return int(any(finding.wrong for finding in left))


def _examine(volumes: Volumes, images: Images) -> list[Finding]:
    return [*volumes.examine(), *health.examine(images), *requirements.examine()]


def _identity(finding: Finding) -> tuple[str, str]:
    return finding.kind, finding.subject


def _new(left: list[Finding], found: list[Finding]) -> list[Finding]:
    """What a repair has brought to light."""
    before = {_identity(finding) for finding in found}
    return [finding for finding in left if _identity(finding) not in before]


def _state(finding: Finding, still: set[tuple[str, str]]) -> str:
    if _identity(finding) not in still:
        return "repaired"
    return "wrong" if finding.wrong else "note"
