"""Every setting, once: its name, default, environment variable and help. The command line is made from this table."""

import os
import socket
from argparse import SUPPRESS, Namespace, _ActionsContainer
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from plugin.errors import invalid


def _setting(default: Any, text: str, *, env: str = "") -> Any:
    return field(default=default, metadata={"help": text, "env": env})


@dataclass(frozen=True)
class Settings:
    """The settings of one process. A flag wins over its `EBI_…` variable, and that over the default."""

    data_dir: Path = _setting(Path("/var/lib/ebi"), "where images and volumes are kept (root's, mode 0700)")
    endpoint: str = _setting("unix:///run/ebi/csi.sock", "the CSI socket", env="CSI_ENDPOINT")
    node_id: str = _setting(socket.gethostname(), "this node's name in CSI")
    driver_name: str = _setting("driver.longhorn.io", "the CSI driver's name")
    metrics_address: str = _setting("", "serve Prometheus metrics at this HOST:PORT; empty: not at all")
    health_address: str = _setting("", "answer gRPC health checks at this HOST:PORT too; empty: on the CSI socket only")
    registration_dir: str = _setting(
        "",
        "kubelet's directory for plugins, /var/lib/kubelet/plugins_registry, to register there; empty: a sidecar does",
        env="EBI_KUBELET_REGISTRATION",
    )
    kubelet_endpoint: str = _setting("", "the CSI socket by the path at which kubelet sees it; empty: the same path")
    grace_seconds: float = _setting(30.0, "how long running calls may take to finish after SIGTERM, in seconds")
    log_level: str = _setting("info", "debug, info, warning or error")
    log_format: str = _setting("text", "log lines as text or as json")
    workers: int = _setting(0, "worker processes that encrypt and copy; 0: one a core, and one more")
    allow_loopback: bool = _setting(True, "let a download's URL name a loopback host")
    download_retries: int = _setting(5, "how often a download that fails is tried again before it has failed")
    download_retry_seconds: float = _setting(0.5, "how long to wait before that, in seconds; each time twice as long")
    download_idle_seconds: float = _setting(60.0, "how long a download may stand still, in seconds")
    allow_files: bool = _setting(True, "let a download's URL be a file:// of this machine")
    device_template: str = _setting(
        "/dev/longhorn/{volume}", "the path at which another system attaches the device of a volume"
    )
    controller_expand: bool = _setting(
        True,
        "offer ControllerExpandVolume; false where one resizer serves several nodes: NodeExpandVolume then grows alone",
    )
    target_root: str = _setting("", "stage and publish only below this directory; empty: anywhere")
    unlock_memory: int = _setting(
        0, "MiB that key derivations may take together; 0: half of what this process may have"
    )

    @classmethod
    def add_arguments(cls, parser: _ActionsContainer, *names: str) -> None:
        """Give `parser` a flag for each of the settings `names`."""
        for item in fields(cls):
            if item.name in names:
                env = _environment_name(item.name, item.metadata)
                parser.add_argument(
                    f"--{item.name.replace('_', '-')}",
                    default=SUPPRESS,  # what a command was not given shall not hide what stands before it
                    metavar=item.name.upper().replace("_", "-"),
                    help=f"{item.metadata['help']} ({env}; default: {_shown(item.default)})",
                )

    @classmethod
    def load(cls, arguments: Namespace, environ: Mapping[str, str] = os.environ) -> "Settings":
        """The settings from parsed flags and the environment. Raises INVALID naming a bad one."""
        values: dict[str, Any] = {}
        for item in fields(cls):
            env = _environment_name(item.name, item.metadata)
            text = getattr(arguments, item.name, None)
            if text is None:
                text = environ.get(env)
            if text is not None:
                values[item.name] = _parse(item.name, env, str(text), item.default)
        return cls(**values)


def _shown(default: Any) -> str:
    if isinstance(default, bool):
        return str(default).lower()
    return "none" if default == "" else str(default)


def _environment_name(name: str, metadata: Mapping[str, str]) -> str:
    return metadata["env"] or f"EBI_{name.upper()}"


def _parse(name: str, env: str, text: str, default: Any) -> Any:
    try:
        if isinstance(default, bool):
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[text.lower()]
        return type(default)(text) if not isinstance(default, Path) else Path(text)
    except (ValueError, KeyError) as error:
        raise invalid(
            f"invalid value {text!r} for the setting {name}", f"set --{name.replace('_', '-')} or {env}"
        ) from error
