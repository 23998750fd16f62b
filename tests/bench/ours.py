"""Our side: `ebi`, from the start of its process to its end, on a data directory of its own."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

NAMESPACE = "longhorn-system"
PASSPHRASE = "measured and not guessed"
# What a user sets who wants a derivation of a known cost; argon2i at what is cryptsetup's least time cost, 64 MiB.
FORCED = {"CRYPTO_PBKDF_FORCE_ITERATIONS": "4", "CRYPTO_PBKDF_MEMORY": "65536"}
# The least that cryptsetup takes: what is left is all but the derivation.
LEAST = {"CRYPTO_PBKDF": "pbkdf2", "CRYPTO_PBKDF_FORCE_ITERATIONS": "1000"}
_DERIVATIONS: dict[str, dict[str, str]] = {"default": {}, "forced": FORCED, "least": LEAST}
_HEAD = {"apiVersion": "longhorn.io/v1beta2", "kind": "BackingImage"}


class Store:
    """A data directory below `work`, and the manifests for it."""

    def __init__(self, work: Path) -> None:
        self.work, self.data = work, work / "ebi"
        self.data.mkdir(mode=0o700)
        self.secrets = {
            name: self._write(f"secret-{name}", self._secret(f"key-{name}", secret(name))) for name in _DERIVATIONS
        }

    def command(self, *arguments: str | Path) -> list[str | Path]:
        """`ebi` on this data directory."""
        return [sys.executable, "-m", "plugin.cli", "--data-dir", self.data, *arguments]

    def ebi(self, *arguments: str | Path) -> None:
        """Run `ebi` to its end, which must be a good one."""
        run(self.command(*arguments))

    def golden(self, name: str, file: Path) -> Path:
        """Bring `file` in as an image, remove it, and return the image's file."""
        self.ebi("apply", "-f", self.download(name, file))
        file.unlink()
        return self.file(name)

    def file(self, name: str) -> Path:
        """The file of an image."""
        return self.data / "images" / name / "image"

    def delete(self, name: str) -> None:
        """Delete an image."""
        self.ebi("delete", "backingimage", name)

    def download(self, name: str, file: Path, checksum: str = "") -> Path:
        """The manifest of a download of a local file."""
        return self._image(name, {"sourceType": "download", "checksum": checksum}, {"url": file.as_uri()})

    def clone(self, name: str, source: str, encryption: str, secret: str = "") -> list[str | Path]:
        """The arguments that clone `source`."""
        parameters = {"backing-image": source, "encryption": encryption}
        if not secret:
            return ["apply", "-f", self._image(name, {"sourceType": "clone"}, parameters)]
        parameters |= {"secret": f"key-{secret}", "secret-namespace": NAMESPACE}
        manifest = self._image(name, {"sourceType": "clone"}, parameters)
        return ["apply", "-f", self.secrets[secret], "-f", manifest]

    def _image(self, name: str, spec: dict[str, str], parameters: dict[str, str]) -> Path:
        metadata = {"name": name, "namespace": NAMESPACE}
        return self._write(name, {**_HEAD, "metadata": metadata, "spec": {**spec, "sourceParameters": parameters}})

    def _secret(self, name: str, data: dict[str, str]) -> dict[str, Any]:
        return {"kind": "Secret", "metadata": {"name": name, "namespace": NAMESPACE}, "stringData": data}

    def _write(self, name: str, document: dict[str, Any]) -> Path:
        path = self.work / f"{name}.yaml"
        path.write_text(json.dumps(document))  # JSON is YAML
        return path


def secret(derivation: str) -> dict[str, str]:
    """What the Secret of that key derivation holds."""
    return {"CRYPTO_KEY_VALUE": PASSPHRASE, "CRYPTO_KEY_SIZE": "512", **_DERIVATIONS[derivation]}


def run(command: Sequence[str | Path], *, stdin: bytes = b"") -> None:
    """Run a command whose words matter only when it fails."""
    done = subprocess.run(command, input=stdin, capture_output=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}: {done.stderr.decode(errors='replace')}")
