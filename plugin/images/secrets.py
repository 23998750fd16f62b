"""Where secrets come from: a protocol, and the one implementation for a machine alone."""

import base64
import binascii
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from plugin.errors import invalid, not_found


class SecretSource(Protocol):
    """Hands out the data of Kubernetes Secrets."""

    def get(self, name: str, namespace: str) -> Mapping[str, bytes]:
        """The data of one Secret, values as bytes. Raises NOT_FOUND."""


class DocumentSecrets:
    """The Secrets of some manifests, held in memory for as long as this object lives.

    Raises INVALID for a document that is no Secret; no message quotes a value.
    """

    def __init__(self, documents: Iterable[Mapping[str, Any]] = ()) -> None:
        self._data = dict(_parse(document) for document in documents)

    def get(self, name: str, namespace: str) -> Mapping[str, bytes]:
        """As the protocol says."""
        try:
            return self._data[namespace, name]
        except KeyError:
            raise not_found(
                f"failed to get the secret {name} in the namespace {namespace}", "give its Secret document along"
            ) from None

    def __repr__(self) -> str:
        return f"DocumentSecrets({', '.join(f'{namespace}/{name}' for namespace, name in self._data)})"


def _parse(document: Mapping[str, Any]) -> tuple[tuple[str, str], dict[str, bytes]]:
    metadata = document.get("metadata")
    name = metadata.get("name") if isinstance(metadata, Mapping) else None
    if document.get("kind") != "Secret" or not isinstance(metadata, Mapping) or not isinstance(name, str):
        raise invalid("a Secret document has no metadata.name", "see deploy/examples/secret.yaml")
    coded, plain = document.get("data") or {}, document.get("stringData") or {}
    if not isinstance(coded, Mapping) or not isinstance(plain, Mapping):
        raise invalid(f"data or stringData of the secret {name} is not a map", "see deploy/examples/secret.yaml")
    data: dict[str, bytes] = {}
    for key, value in coded.items():
        try:
            data[str(key)] = base64.b64decode(str(value or ""), validate=True)
        except (binascii.Error, ValueError):
            raise invalid(f"data.{key} of the secret {name} is not base64", "plain text goes to stringData") from None
    for key, value in plain.items():  # it wins over data, as in Kubernetes
        if not isinstance(value, str):
            raise invalid(f"stringData.{key} of the secret {name} is not a string", "quote it")
        data[str(key)] = value.encode()
    return (str(metadata.get("namespace") or "default"), name), data
