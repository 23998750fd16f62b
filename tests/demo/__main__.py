"""`make demo`: a golden image is encrypted and a volume starts from it, each step printed with its time."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import yaml

from tests.demo import golden
from tests.demo.node import Kubelet, Node

EXAMPLES = Path(__file__).parents[2] / "deploy" / "examples"
MIB = 1 << 20
WRITTEN = b"a file that a workload wrote into its volume " * 40_000


@contextmanager
def step(title: str) -> Iterator[None]:
    """Print the title, and below it how long the block took."""
    print(f"\n== {title}", flush=True)
    start = time.monotonic()
    yield
    print(f"   {time.monotonic() - start:.1f} s", flush=True)


def example(template: str, work: Path, name: str = "", checksum: str = "", **parameters: str) -> Path:
    """A manifest of deploy/examples, with its name, checksum or some of its sourceParameters (`_` for `-`) changed."""
    document = yaml.safe_load((EXAMPLES / template).read_text())
    document["metadata"]["name"] = name or document["metadata"]["name"]
    if checksum:
        document["spec"]["checksum"] = checksum
    document["spec"]["sourceParameters"] |= {key.replace("_", "-"): value for key, value in parameters.items()}
    path = work / f"{document['metadata']['name']}.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


def images(node: Node, work: Path, web: Path) -> None:
    """Download, clone, encrypt and decrypt, by the seed's manifests."""
    secret = EXAMPLES / "secret.yaml"
    raw, qcow2 = web / "parrot.raw", web / "parrot.qcow2"
    with golden.web_server(web) as url:
        with step("download with its SHA-512, from the seed's manifest"):
            node.ebi(
                "apply", "-f", example("1-download.yaml", work, url=f"{url}/parrot.raw", checksum=golden.sha512(raw))
            )
        with step("download the compressed qcow2"):
            changes = {"name": "parrot-qcow2", "url": f"{url}/parrot.qcow2", "checksum": golden.sha512(qcow2)}
            node.ebi("apply", "-f", example("1-download.yaml", work, **changes))
    with step("clone, encryption: ignore"):
        node.ebi("apply", "-f", EXAMPLES / "2-clone.yaml")
    with step("clone, encryption: encrypt, with the seed's Secret"):
        node.ebi("apply", "-f", secret, "-f", EXAMPLES / "3-encrypt.yaml")
    with step("clone, encryption: decrypt"):
        node.ebi("apply", "-f", secret, "-f", EXAMPLES / "4-decrypt.yaml")
    with step("qcow2: encrypt straight from the compressed file, then decrypt"):
        node.ebi(
            "apply", "-f", secret,
            "-f", example("3-encrypt.yaml", work, name="qcow2-encrypted", backing_image="parrot-qcow2"),
            "-f", example("4-decrypt.yaml", work, name="qcow2-decrypted", backing_image="qcow2-encrypted"),
        )  # fmt: skip
    with step("encrypt once more, dense"):
        node.ebi("apply", "-f", secret, "-f", example("3-encrypt.yaml", work, name="dense-encrypted", sparse="false"))
    with step("the decrypted images' SHA-512 equal the original's"):
        original = golden.sha512(raw)
        for name in ("parrot", "parrot-cloned", "parrot-cloned-decrypt", "qcow2-decrypted"):
            assert golden.sha512(Path(node.image(name)["status"]["path"])) == original, name
        print(f"    {original[:32]}… four times")
    with step("sizes: what each takes"):
        names = {"raw": "parrot", "sparse, encrypted": "parrot-cloned-encrypted", "dense, encrypted": "dense-encrypted"}
        for title, name in names.items():
            status = Path(node.image(name)["status"]["path"]).stat()
            print(f"    {title:18} {status.st_size / MIB:9.1f} MiB long, {status.st_blocks / 2048:9.1f} MiB on disk")
    with step("the images as `ebi get` shows them; applying again changes nothing"):
        node.ebi("apply", "-f", secret, "-f", EXAMPLES / "3-encrypt.yaml", "-f", EXAMPLES / "5-storageclass.yaml")
        node.ebi("get", "backingimages")


def volume(node: Node, kubelet: Kubelet, work: Path, wanted: dict[str, str]) -> None:
    """One volume's life over CSI, with the seed's StorageClass and Secret."""
    storage_class = yaml.safe_load((EXAMPLES / "5-storageclass.yaml").read_text())
    parameters = {k: v for k, v in storage_class["parameters"].items() if not k.startswith("csi.storage.k8s.io/")}
    secrets = yaml.safe_load((EXAMPLES / "secret.yaml").read_text())["stringData"]
    image = Path(node.image("parrot-cloned-encrypted")["status"]["path"])
    image_before = golden.sha512(image)
    staging, target = node.staging / "pvc-demo", work / "kubelet" / "pod" / "mount"

    with step("CreateVolume"):
        name = kubelet.create("pvc-demo", 640 * MIB, parameters)
    with step("NodeStageVolume with a wrong passphrase is refused"):
        try:
            kubelet.stage(name, staging, {**secrets, "CRYPTO_KEY_VALUE": "not the passphrase"})
            raise AssertionError("a wrong passphrase was taken")
        except grpc.RpcError as error:
            print(f"    {error.code().name}: {error.details()}")
        assert not mapped(), mapped()
    with step("NodeStageVolume"):
        kubelet.stage(name, staging, secrets)
    with step("NodePublishVolume"):
        kubelet.publish(name, staging, target)
        print("    " + "\n    ".join(mapped()))
    with step("every file of the golden image reads back with its hash"):
        found = golden.hashes(target)
        assert {key: found.get(key) for key in wanted} == wanted
        usable = os.statvfs(target)
        print(f"    {len(wanted)} files; the filesystem has {usable.f_blocks * usable.f_frsize / MIB:.0f} MiB")
    with step("write more, unpublish, unstage, stage again: it is there, and the image is as it was"):
        (target / "written").write_bytes(WRITTEN)
        kubelet.unpublish(name, target)
        kubelet.unstage(name, staging)
        assert not mapped(), mapped()
        kubelet.stage(name, staging, secrets)
        kubelet.publish(name, staging, target)
        assert (target / "written").read_bytes() == WRITTEN
        kubelet.unpublish(name, target)
        kubelet.unstage(name, staging)
        assert golden.sha512(image) == image_before
    with step("no ciphertext on disk holds the known plaintext"):
        stored = [image, *(file for file in (node.data_dir / "volumes").rglob("*") if file.is_file())]
        for file in stored:
            for plaintext in (golden.CANARY[:64], WRITTEN[:64], secrets["CRYPTO_KEY_VALUE"].encode()):
                assert not golden.holds(file, plaintext), file
        assert golden.holds(Path(node.image("parrot")["status"]["path"]), golden.CANARY[:64]), "the search is blind"
        print(f"    {len(stored)} files searched; the plain image does hold it")
    with step("timings, as the metrics endpoint reports them"):
        for metric, labels, count, seconds in sorted(node.timings()):
            print(f"    {metric:36} {labels:34} {count:3} x {seconds / count:8.3f} s")
    with step("delete the volume and the images"):
        kubelet.delete(name)
        for one in ("parrot", "parrot-qcow2", "parrot-cloned", "parrot-cloned-encrypted", "parrot-cloned-decrypt"):
            node.ebi("delete", "backingimage", one)
        for one in ("qcow2-encrypted", "qcow2-decrypted", "dense-encrypted"):
            node.ebi("delete", "backingimage", one)


def mapped() -> list[str]:
    """The device-mapper devices of ours."""
    listed = subprocess.run(["dmsetup", "ls"], check=True, capture_output=True, text=True).stdout
    return sorted(line.split()[0] for line in listed.splitlines() if line.startswith("ebi-"))


def leftovers(work: Path) -> list[str]:
    """Mappers, loop devices, mounts and files that should be gone."""
    loops = [
        backing.read_text().strip()
        for backing in Path("/sys/block").glob("loop*/loop/backing_file")
        if str(work) in backing.read_text()
    ]
    mounts = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if "ebi-" in line]
    files = [str(file) for file in (work / "ebi").rglob("*") if not file.is_dir()]
    return [*mapped(), *loops, *mounts, *files]


def main() -> int:
    """Run every step; a failed one ends the demonstration."""
    start = time.monotonic()
    work = Path(tempfile.mkdtemp(prefix="ebi-demo.", dir=os.environ.get("EBI_TEST_DIR")))
    node, web, tree = Node(work), work / "web", work / "tree"
    web.mkdir()
    tree.mkdir()
    try:
        with step("make a golden image of real files: raw with holes, and compressed qcow2"):
            copied = golden.fill_tree(Path("/usr/bin"), tree, limit=128 * MIB)
            wanted = golden.hashes(tree)
            golden.make_raw(tree, web / "parrot.raw", 384 * MIB)
            golden.make_qcow2(web / "parrot.raw", web / "parrot.qcow2")
            print(f"    {len(wanted)} files, {copied / MIB:.0f} MiB, in a disk of 384 MiB")
        images(node, work, web)
        with step("ebi serve"):
            pass
        with node.server() as kubelet:
            volume(node, kubelet, work, wanted)
        with step("nothing is left"):
            left = leftovers(work)
            assert not left, left
            print("    no mapper, no loop device, no mount, no file")
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(f"\nDone in {time.monotonic() - start:.0f} s.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
