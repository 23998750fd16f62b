"""Re-encrypting: one LUKS2 image into another, under another secret, in one pass."""

from pathlib import Path
from typing import Any

import pytest

from plugin.errors import EbiError, Kind
from plugin.host.files import Extent
from plugin.images.secrets import DocumentSecrets
from plugin.luks import header
from tests.unit.conftest import KIB, MIB, NAMESPACE, PASSPHRASE, Store, clone, make_raw, secret, sha512

OTHER = b"another one"


@pytest.fixture(scope="module")
def first(first_store: Store) -> Store:
    first_store.secrets = DocumentSecrets([secret(), secret("other", OTHER, KEY_SIZE="512")])
    first_store.download(make_raw(first_store.work / "raw", 8 * MIB, [(0, 64 * KIB), (6 * MIB, MIB)]))
    first_store.apply(clone("e", "golden", "encrypt"))
    return first_store


@pytest.fixture
def locked(first: Store, tmp_path: Path) -> Store:
    return first.copied(tmp_path)


def reencrypted(name: str = "r", source: str = "e", **parameters: str) -> dict[str, Any]:
    keys = {"secret": "other", "source_secret": "key", "source_secret_namespace": NAMESPACE}
    return clone(name, source, "reencrypt", **{**keys, **parameters})


def test_only_the_new_secret_opens_it_and_the_content_is_the_same(locked: Store) -> None:
    image = locked.apply(reencrypted())
    assert image.encrypted and (image.spec.secret, image.spec.checksum) == ("other", "")
    assert header.read(image.path).key_size == 512
    assert header.volume_key(image.path, OTHER, "it") != header.volume_key(
        locked.images.get("e").path, PASSPHRASE, "it"
    )
    with pytest.raises(EbiError, match="does not open"):
        header.test_passphrase(image.path, PASSPHRASE, "it")
    locked.apply(clone("back", "r", "decrypt", secret="other"))
    assert sha512(locked.images.get("back").path) == sha512(locked.work / "raw")


def test_holes_stay_holes_unless_a_dense_one_is_asked_for(locked: Store) -> None:
    assert locked.apply(reencrypted()).extents() == [Extent(0, 64 * KIB), Extent(6 * MIB, MIB)]
    assert locked.apply(reencrypted("dense", sparse="false")).extents() == [Extent(0, 8 * MIB)]


def test_applying_it_again_changes_nothing(locked: Store) -> None:
    first = locked.apply(reencrypted())
    assert locked.apply(reencrypted()) == first


@pytest.mark.parametrize(
    ("document", "message", "kind"),
    [
        (reencrypted(source="golden"), "cannot re-encrypt the backing image, golden is not encrypted", Kind.INVALID),
        (reencrypted(source_secret=""), "the secret of the source is not provided", Kind.INVALID),
        (reencrypted(secret=""), "secret is not provided", Kind.INVALID),
        (reencrypted(source_secret="gone"), "failed to get the secret gone", Kind.NOT_FOUND),
        (reencrypted(source_secret="other"), "the passphrase does not open backing image e", Kind.INVALID),
        (
            clone("x", "golden", "encrypt", source_secret="key"),
            "invalid parameter source-secret for source type clone",
            Kind.INVALID,
        ),
    ],
)
def test_what_it_may_not_be(locked: Store, document: dict[str, Any], message: str, kind: Kind) -> None:
    with pytest.raises(EbiError, match=message) as caught:
        locked.apply(document)
    assert caught.value.kind is kind
