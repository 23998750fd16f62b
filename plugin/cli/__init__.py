"""The command line `ebi`: each command is a module here; what only one of them needs, as gRPC, is loaded when it runs.

A module has `add(subparsers)`, which describes its command, and the function that the command runs: it takes the
parsed arguments and the settings, and returns the exit status.
"""

import resource
import signal
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from typing import Any

from plugin import logs
from plugin.cli import apply, delete, doctor, get, image, serve, volume
from plugin.errors import EbiError, of_system
from plugin.settings import Settings

_EPILOG = """\
exit status: 0 done; 1 failed; 2 bad input; 3 not found; 4 exists as another; 5 not in a state for that; 6 busy;
7 no room; 8 size out of range; 9 not now; 10 unsupported; 11 cancelled. `ebi apply` exits 1 whatever the reason.

Every setting can be given by a flag or by an environment variable; a flag wins.
Volumes need root; images need no more than a data directory of one's own."""


class _Parser(ArgumentParser):
    """A parser whose own commands take the flags of all commands too: wherever such a flag stands, it is understood."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        Settings.add_arguments(self.add_argument_group("of every command"), "data_dir", "log_level", "log_format")


def parser() -> ArgumentParser:
    """The whole grammar of the command line."""
    top = _Parser(
        prog="ebi",
        description="Encrypted backing images: golden disk images kept as LUKS2, and volumes that start from them.",
        epilog=_EPILOG,
        formatter_class=RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND", title="commands")
    for module in (apply, get, delete, image, doctor, serve, volume):
        module.add(commands)
    return top


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status; failures go to standard error with their hint."""
    arguments = parser().parse_args(argv)
    # A core dump would hold passphrases; the children inherit this.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # where it is ignored, which is inherited, every program succeeds
    try:
        settings = Settings.load(arguments)
        logs.configure(settings.log_level, settings.log_format)
        return int(arguments.run(arguments, settings))
    except EbiError as error:
        complain(error)
        return error.kind.value
    except BrokenPipeError:  # the reader of our output has gone, as `head` does
        sys.stderr.close()
        return 1
    except OSError as error:
        failure = of_system(error)
        complain(failure)
        return failure.kind.value
    except KeyboardInterrupt:
        return 130


def complain(error: EbiError) -> None:
    """Print what went wrong, and below it what to do."""
    print(f"ebi: {error.message}", file=sys.stderr)
    if error.hint:
        print(f"  hint: {error.hint}", file=sys.stderr)
