"""Sizes as people write them."""

import re

_UNITS = {"": 1}
for _power, _letter in enumerate("KMGTPE", start=1):
    _UNITS[f"{_letter}i"] = 1024**_power
    _UNITS[_letter] = 1000**_power
_UNITS["k"] = 1000


def parse(text: str) -> int:
    """Bytes from a Kubernetes quantity: 10Gi, 500M, 1.5Gi, 1048576. Raises ValueError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGTPE]i?|k)?", text.strip())
    if not match:
        raise ValueError(f"{text!r} is not a size such as 10Gi, 500M or 1048576")
    return int(float(match[1]) * _UNITS[match[2] or ""]) if "." in match[1] else int(match[1]) * _UNITS[match[2] or ""]
