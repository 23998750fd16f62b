"""`ebi image`: what can be done with one backing image beyond applying and deleting it."""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from plugin.cli import documents, output
from plugin.cli.progress import Bar
from plugin.errors import invalid
from plugin.host.files import private_directory
from plugin.images import export, headers, http, integrity, manifest
from plugin.images.formats import Format
from plugin.images.store import Images
from plugin.settings import Settings
from plugin.volumes import Volumes

_KEYSLOT_TITLES = ("KEYSLOT", "CIPHER", "KEYSIZE", "PBKDF", "ITERATIONS", "MEMORY", "PARALLEL")
_Action = Callable[[Namespace, Settings, Images], None]


def add(commands: Any) -> None:
    """Describe the command and its own commands."""
    image = commands.add_parser("image", help="change the key of a backing image, back up its header, and more")
    actions = image.add_subparsers(required=True, metavar="ACTION", title="actions")

    rekey = _action(actions, "rekey", _rekey, "change the passphrase of an encrypted image")
    rekey.add_argument("-f", "--old", required=True, metavar="FILE", help="a file with the Secret that opens it now")
    rekey.add_argument("--new", required=True, metavar="FILE", help="a file with the Secret that shall open it")
    rekey.add_argument("--keep-old", action="store_true", help="let the old passphrase open it too, for its volumes")

    upload = _action(actions, "upload", _upload, "make a backing image from a file or from standard input")
    upload.add_argument("file", metavar="FILE", help="raw, qcow2 or LUKS2, or such in .gz, .xz, .zst; - for stdin")
    upload.add_argument("--checksum", default="", help="the SHA-512 that FILE must have, 128 hex digits")

    export_ = _action(actions, "export", _export, "write a backing image to a file")
    export_.add_argument("file", type=Path, metavar="FILE", help="made; nothing is overwritten")
    export_.add_argument("--format", choices=("raw", "qcow2"), help="default: as it is; raw for a decrypted one")
    export_.add_argument("--dense", action="store_true", help="no holes; an encrypted one needs -f for that")
    export_.add_argument("--decrypt", action="store_true", help="the plain disk of an encrypted image; needs -f")
    export_.add_argument("-f", "--secret", metavar="FILE", help="a file with the Secret that opens the image")

    _action(actions, "verify", _verify, "read an image again and compare it with the checksums kept at writing")

    header = actions.add_parser("header", help="show, back up or restore the LUKS2 header of an encrypted image")
    parts = header.add_subparsers(required=True, metavar="ACTION", title="actions")
    show = _action(parts, "show", _show, "tell cipher, keyslots and the state of the header")
    show.add_argument("-o", "--output", choices=output.FORMATS, default="table", help="default: table")
    backup = _action(parts, "backup", _backup, "write the header to a file, which is as secret as the image")
    backup.add_argument("file", type=Path, metavar="FILE", help="made, or replaced")
    restore = _action(parts, "restore", _restore, "put a header back; with it come the passphrases it had")
    restore.add_argument("file", type=Path, nargs="?", metavar="FILE", help="default: the backup beside the image")


def _action(actions: Any, name: str, run: _Action, text: str) -> Any:
    command = actions.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    command.add_argument("name", metavar="NAME", help="the backing image")

    def call(arguments: Namespace, settings: Settings) -> int:
        images = Images(private_directory(settings.data_dir) / "images", settings)
        Volumes(settings.data_dir / "volumes", images, settings)  # so that the images know who uses them
        run(arguments, settings, images)
        return 0

    command.set_defaults(run=call)
    return command


def _rekey(arguments: Namespace, settings: Settings, images: Images) -> None:
    volumes = Volumes(settings.data_dir / "volumes", images, settings)
    _, old = documents.secret(arguments.old)
    secret, new = documents.secret(arguments.new)
    users = [] if arguments.keep_old else volumes.locked_out(arguments.name, new)
    headers.rekey(images, arguments.name, old, new, secret, keep_old=arguments.keep_old, users=users)
    print(f"backingimage/{arguments.name} rekeyed")


def _upload(arguments: Namespace, _: Settings, images: Images) -> None:
    document = {
        "apiVersion": manifest.API_VERSION,
        "kind": manifest.KIND,
        "metadata": {"name": arguments.name},
        "spec": {"sourceType": "upload", "checksum": arguments.checksum},
    }
    try:
        name = 0 if arguments.file == "-" else arguments.file
        with open(name, "rb", buffering=0, closefd=name != 0) as file:
            found = http.from_file(file)
            with Bar(arguments.name) as bar:
                image = images.upload(document, found, bar)
    except OSError as error:
        raise invalid(f"{arguments.file}: {error.strerror}", "name a file that can be read") from error
    print(f"backingimage/{arguments.name} ready{', encrypted' if image.encrypted else ''}")


def _export(arguments: Namespace, settings: Settings, images: Images) -> None:
    secret = documents.secret(arguments.secret)[1] if arguments.secret else None
    with Bar(arguments.name) as bar:
        made = export.export(
            images,
            settings,
            arguments.name,
            arguments.file,
            form=Format(arguments.format) if arguments.format else None,
            dense=arguments.dense,
            decrypt=arguments.decrypt,
            secret=secret,
            progress=bar,
        )
    print(f"backingimage/{arguments.name} exported to {arguments.file} as {made.format}")


def _verify(arguments: Namespace, settings: Settings, images: Images) -> None:
    with Bar(arguments.name) as bar:
        integrity.verify(images, settings, arguments.name, bar)
    print(f"backingimage/{arguments.name} is as it was written")


def _backup(arguments: Namespace, _: Settings, images: Images) -> None:
    headers.save_backup(images, arguments.name, arguments.file)
    print(f"backingimage/{arguments.name} header saved to {arguments.file}")


def _restore(arguments: Namespace, _: Settings, images: Images) -> None:
    headers.restore(images, arguments.name, arguments.file)
    print(f"backingimage/{arguments.name} header restored")


def _show(arguments: Namespace, _: Settings, images: Images) -> None:
    facts = headers.show(images, arguments.name)
    if arguments.output != "table":
        output.show(facts, (), arguments.output)
        return
    state = f"damaged: {', '.join(facts['damaged'])} copy; `ebi image header restore`" if facts["damaged"] else "whole"
    output.table(
        ("UUID", "CIPHER", "KEYSIZE", "SECTORSIZE", "HEADER"),
        [(facts["uuid"], facts["cipher"], str(facts["keySize"]), str(facts["sectorSize"]), state)],
    )
    print()
    output.table(_KEYSLOT_TITLES, [[str(value) for value in slot.values()] for slot in facts["keyslots"]])
