"""Volumes: what is kept of each, the devices it is made of, staging, publishing, growing, and how it is.

`Volumes` is the way in. The truth about what is staged is the kernel's; a record holds only what was asked for.
"""

from plugin.volumes.capability import AccessMode, Capability
from plugin.volumes.record import Volume
from plugin.volumes.service import Volumes
from plugin.volumes.stats import Condition, Stats
from plugin.volumes.usage import published

__all__ = ["AccessMode", "Capability", "Condition", "Stats", "Volume", "Volumes", "published"]
