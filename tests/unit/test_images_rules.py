"""Manifests: which are taken, which are refused, and in what words."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from plugin.errors import EbiError, Kind
from plugin.images.export import export
from plugin.images.secrets import DocumentSecrets
from plugin.settings import Settings
from tests.unit.conftest import MIB, NAMESPACE, Store, clone, make_raw, manifest, secret

URL = "http://example.org/parrot.raw"


def changed(document: dict[str, Any], **metadata: Any) -> dict[str, Any]:
    return {**document, "metadata": {**document["metadata"], **metadata}}


def with_spec(document: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {**document, "spec": {**document["spec"], **fields}}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (
            with_spec(manifest("x", "download", url=URL), checkSum="0"),
            "unknown field checkSum in the spec of backing image x",
        ),
        (changed(manifest("x", "download", url=URL), name="Not_a_name"), "invalid name Not_a_name"),
        (changed(manifest("x", "download", url=URL), name="../x"), r"invalid name \.\./x"),
        (changed(manifest("x", "download", url=URL), name=None), "invalid name None"),
        (manifest("x", "download", "abc", url=URL), "invalid checksum abc"),
        (manifest("x", "download"), "download URL is not provided"),
        (manifest("x", "download", url="http://"), "invalid parameter url"),
        (manifest("x", "download", url="http://[x/"), "invalid parameter url"),
        (manifest("x", "download", url="ftp://example.org/x"), "invalid parameter url"),
        (manifest("x", "download", url="http://me:pass@example.org/x"), "invalid parameter url"),
        (manifest("x", "download", url=URL, urll=URL), "invalid parameter urll"),
        (manifest("x", "restore"), "source type 'restore'"),
        (manifest("x", "clone"), "invalid parameter backing-image for source type clone"),
        (clone("x", "golden", "reverse"), "encryption reverse is not supported"),
        (clone("x", "golden", "encrypt", secret=""), "secret is not provided for encryption or decryption"),
        (clone("x", "golden", "decrypt", secret_namespace=" "), "secret is not provided for encryption or decryption"),
        (clone("x", "golden", sparse="yes"), "invalid parameter sparse"),
        ({"kind": "Pod"}, "is expected"),
        ({**manifest("x", "download", url=URL), "spec": None}, "no metadata or no spec"),
    ],
)
def test_what_a_manifest_may_not_say(store: Store, document: dict[str, Any], message: str) -> None:
    with pytest.raises(EbiError, match=message):
        store.apply(document)
    assert store.images.list() == []


def test_a_password_in_a_url_is_not_repeated(store: Store) -> None:
    with pytest.raises(EbiError) as caught:
        store.apply(manifest("x", "download", url="http://me:hunter2@example.org/x"))
    assert "hunter2" not in str(caught.value)


@pytest.fixture(scope="module")
def first(first_store: Store) -> Store:
    first_store.download(make_raw(first_store.work / "raw", MIB, [(0, MIB)]))
    first_store.apply(clone("locked", "golden", "encrypt"))
    return first_store


@pytest.fixture
def golden(first: Store, tmp_path: Path) -> Store:
    return first.copied(tmp_path)


@pytest.mark.parametrize(
    ("document", "message", "kind"),
    [
        (clone("x", "nobody"), "invalid parameter backing-image nobody for source type clone", Kind.INVALID),
        (clone("x", "x"), "invalid parameter backing-image x for source type clone", Kind.INVALID),
        (
            clone("x", "locked", "encrypt"),
            "cannot re-encrypt the backing image, locked is already encrypted",
            Kind.INVALID,
        ),
        (
            clone("x", "golden", "decrypt"),
            "cannot re-decrypt the backing image, golden is already decrypted",
            Kind.INVALID,
        ),
        *[
            (
                with_spec(manifest("x", kind, **more), secret="gone", secretNamespace=namespace),
                f"failed to get the secret gone in the namespace {namespace or NAMESPACE} for the backing image x",
                Kind.NOT_FOUND,
            )
            for kind, more, namespace in (
                ("download", {"url": URL}, "there"),
                ("download", {"url": URL}, ""),
                ("upload", {}, ""),
            )
        ],
        (
            clone("x", "golden", "encrypt", secret="gone"),
            f"failed to get the secret gone in the namespace {NAMESPACE}",
            Kind.NOT_FOUND,
        ),
    ],
)
def test_what_the_other_objects_rule_out(golden: Store, document: dict[str, Any], message: str, kind: Kind) -> None:
    with pytest.raises(EbiError, match=message) as caught:
        golden.apply(document)
    assert caught.value.kind is kind
    assert [image.name for image in golden.images.list()] == ["golden", "locked"]
    assert not (golden.work / "data" / "images" / "x").exists()


def test_a_source_must_be_ready(store: Store) -> None:
    with pytest.raises(EbiError):
        store.apply(manifest("golden", "download", url=(store.work / "nothing").as_uri()))
    with pytest.raises(EbiError, match="cannot clone backing image golden as x: it is failed") as caught:
        store.apply(clone("x", "golden"))
    assert caught.value.kind is Kind.PRECONDITION


def test_a_source_must_have_its_file(golden: Store) -> None:
    image = golden.images.get("locked")
    image.path.unlink()
    for use in (
        lambda: golden.apply(clone("x", "locked")),
        lambda: export(golden.images, Settings(), "locked", golden.work / "x"),
    ):
        with pytest.raises(EbiError, match="the file of backing image locked is missing") as caught:
            use()
        assert caught.value.kind is Kind.PRECONDITION
    assert not (golden.work / "data" / "images" / "x").exists()


@pytest.mark.parametrize("cipher", ["serpent-xts-plain64", "aes-xts-plain", "nonsense"])
def test_a_cipher_that_nothing_can_do_is_refused_by_name(golden: Store, cipher: str) -> None:
    golden.secrets = DocumentSecrets([secret(KEY_CIPHER=cipher)])
    with pytest.raises(EbiError, match=cipher) as caught:
        golden.apply(clone("x", "golden", "encrypt"))
    assert caught.value.kind is Kind.UNSUPPORTED and "aes-cbc-essiv:sha256" in caught.value.hint
    assert not (golden.work / "data" / "images" / "x").exists()


def test_a_clone_that_ignores_encryption_inherits_the_secret(golden: Store) -> None:
    image = golden.apply(clone("copy", "locked"))
    assert (image.spec.secret, image.spec.secret_namespace) == ("key", NAMESPACE)
    assert image.encrypted and image.path.read_bytes() == golden.images.get("locked").path.read_bytes()
    assert golden.apply(clone("plain", "copy", "decrypt")).spec.secret == ""


def test_ignore_is_the_default(golden: Store) -> None:
    image = golden.apply(manifest("copy", "clone", backing_image=" golden "))
    assert (image.spec.encryption, image.spec.parameters["encryption"]) == ("ignore", "ignore")


@pytest.mark.parametrize(
    ("document", "message", "kind"),
    [
        (clone("locked", "golden", "encrypt", secret="other"), "changing secret for BackingImage locked", Kind.INVALID),
        (
            clone("locked", "golden", "encrypt", secret_namespace="other"),
            "changing secret namespace for BackingImage locked",
            Kind.INVALID,
        ),
        (clone("locked", "golden"), "differs in sourceParameters", Kind.EXISTS),
        (manifest("golden", "download", url=URL), "differs in sourceParameters", Kind.EXISTS),
        (clone("golden", "locked"), "differs in sourceType, sourceParameters", Kind.EXISTS),
    ],
)
def test_a_ready_image_is_not_changed_into_another(
    golden: Store, document: dict[str, Any], message: str, kind: Kind
) -> None:
    with pytest.raises(EbiError, match=message) as caught:
        golden.apply(document)
    assert caught.value.kind is kind
    assert all(image.ready for image in golden.images.list())


def test_fields_without_effect_may_change(golden: Store) -> None:
    document = clone("locked", "golden", "encrypt")
    document["spec"]["minNumberOfCopies"] = 3
    before = golden.images.get("locked").path.stat()
    assert golden.apply(document).to_object()["spec"]["minNumberOfCopies"] == 3
    assert golden.images.get("locked").path.stat().st_mtime_ns == before.st_mtime_ns


BAD_SECRETS: list[tuple[Callable[[], dict[str, Any]], str]] = [
    (lambda: {"kind": "Secret", "metadata": {}}, "no metadata.name"),
    (lambda: {**secret(), "stringData": ["s3cret"]}, "is not a map"),
    (lambda: {**secret(), "stringData": {"CRYPTO_KEY_VALUE": 12345}}, "is not a string"),
    (lambda: {**secret(), "data": {"CRYPTO_KEY_VALUE": "s3cret!"}}, "is not base64"),
]


@pytest.mark.parametrize(("make", "message"), BAD_SECRETS)
def test_bad_secret_documents_are_refused_and_not_quoted(make: Callable[[], dict[str, Any]], message: str) -> None:
    with pytest.raises(EbiError, match=message) as caught:
        DocumentSecrets([make()])
    assert "s3cret" not in str(caught.value) and "12345" not in str(caught.value)


def test_string_data_wins_over_data() -> None:
    document = {**secret(), "data": {"CRYPTO_KEY_VALUE": "b2xk", "other": "bmV3"}}
    found = DocumentSecrets([document]).get("key", NAMESPACE)
    assert found["other"] == b"new" and found["CRYPTO_KEY_VALUE"] != b"old"
