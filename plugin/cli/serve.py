"""`ebi serve`: the CSI server of this node."""

import threading
from argparse import Namespace
from typing import Any

from plugin.host import budget
from plugin.host.files import private_directory
from plugin.images import integrity
from plugin.images.store import Images
from plugin.settings import Settings
from plugin.volumes import Volumes


def add(commands: Any) -> None:
    """Describe the command."""
    command = commands.add_parser(
        "serve",
        help="serve CSI on a unix socket",
        description="Serve CSI's Identity, Controller and Node services. SIGTERM finishes what runs and exits 0.",
    )
    Settings.add_arguments(
        command,
        "endpoint",
        "node_id",
        "driver_name",
        "metrics_address",
        "health_address",
        "registration_dir",
        "kubelet_endpoint",
        "grace_seconds",
        "workers",
        "device_template",
        "controller_expand",
        "target_root",
        "unlock_memory",
        "allow_loopback",
        "allow_files",
        "download_retries",
        "download_retry_seconds",
        "download_idle_seconds",
    )
    command.set_defaults(run=run)


def run(arguments: Namespace, settings: Settings) -> int:
    """Serve until SIGTERM."""
    from csi import server

    if settings.unlock_memory:
        budget.shared().limit = settings.unlock_memory << 20
    images = Images(private_directory(settings.data_dir) / "images", settings)
    volumes = Volumes(settings.data_dir / "volumes", images, settings)
    stop = threading.Event()
    filler = threading.Thread(target=integrity.fill_checksums, args=(images, stop), name="checksums", daemon=True)
    filler.start()
    try:
        server.serve(volumes, images, settings)
    finally:
        stop.set()
        filler.join()
    return 0
