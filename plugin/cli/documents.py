"""Manifests as they come in files: YAML documents, sorted by kind."""

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from plugin.errors import invalid
from plugin.images.secrets import DocumentSecrets

Document = dict[str, Any]


@dataclass(frozen=True)
class Documents:
    """The documents of some files, by kind; `images` with the sources of clones before their clones."""

    images: list[Document] = field(default_factory=list)
    secrets: list[Document] = field(default_factory=list, repr=False)
    classes: list[Document] = field(default_factory=list)


def load(files: Iterable[str]) -> Documents:
    """Read `files` (`-`: standard input). Raises INVALID naming the file and what is wrong in it."""
    found = Documents()
    kinds = {"BackingImage": found.images, "Secret": found.secrets, "StorageClass": found.classes}
    for file in files:
        for document in _parse(file):
            kind = document.get("kind")
            if kind == "List":
                raise invalid(f"{file}: a List is not read", "give its items as documents of their own")
            if kind not in kinds:
                raise invalid(
                    f"{file}: documents of kind {kind!r} are not known here", f"known are {', '.join(sorted(kinds))}"
                )
            kinds[kind].append(document)
    return Documents(_sources_first(found.images), found.secrets, found.classes)


def name_of(document: Document) -> str:
    """The object's `metadata.name`, or a placeholder that says that it is missing."""
    metadata = document.get("metadata")
    return str(metadata.get("name", "(no name)")) if isinstance(metadata, dict) else "(no name)"


def secret(file: str) -> tuple[tuple[str, str], Mapping[str, bytes]]:
    """(namespace, name) and data of the one Secret in `file`. Raises INVALID."""
    found = load([file]).secrets
    if len(found) != 1:
        raise invalid(f"{file} holds {len(found)} Secret documents", "give a file with one")
    name, metadata = name_of(found[0]), found[0].get("metadata")
    namespace = str((metadata or {}).get("namespace") or "default")
    return (namespace, name), DocumentSecrets(found).get(name, namespace)


def _parse(file: str) -> list[Document]:
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text()
        documents = [document for document in yaml.safe_load_all(text) if document is not None]
    except OSError as error:
        raise invalid(f"{file}: {error.strerror}", "name a file that can be read, or - for standard input") from error
    except UnicodeDecodeError as error:
        raise invalid(f"{file}: not UTF-8 text", "a manifest is YAML text") from error
    except yaml.YAMLError as error:
        # The parser's own message quotes the text around the fault, which may be a passphrase.
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise invalid(f"{file}: not valid YAML{where}", "check the indentation and the quotes there") from None
    for document in documents:
        if not isinstance(document, dict):
            raise invalid(f"{file}: a document is not an object", "start it with apiVersion and kind")
    return documents


def _sources_first(images: list[Document]) -> list[Document]:
    by_name = {name_of(image): image for image in images}
    ordered: dict[str, Document] = {}

    def visit(image: Document, under: frozenset[str]) -> None:
        name = name_of(image)
        if name in ordered or name in under:
            return
        spec = image.get("spec")
        parameters = spec.get("sourceParameters") if isinstance(spec, dict) else None
        source = parameters.get("backing-image") if isinstance(parameters, dict) else None
        if source in by_name:
            visit(by_name[str(source)], under | {name})
        ordered[name] = image

    for image in by_name.values():
        visit(image, frozenset())
    return list(ordered.values())
