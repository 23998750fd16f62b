"""The part `disk` of the suite `node`: fio on staged volumes of several chunk sizes, and on plain dm-crypt beside them.

All lie on the same disk in preallocated files, through loop devices with direct I/O. "First" is the first time that
something is written there since the volume was made; for plain dm-crypt that is the first write to what the
filesystem has only reserved. "Behind" is where the volume is longer than its image.
"""

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from plugin.host import dm, loop
from plugin.luks import header, mapping
from plugin.luks.parameters import SecretParameters
from plugin.volumes import Capability, names, service
from tests.bench import content
from tests.bench.node import Golden, Suite
from tests.bench.ours import secret
from tests.bench.result import MIB, Row, Values, table

CHUNKS = (4, 16, 32, 64, 128, 256)  # KiB
_IMAGE = 128 * MIB
_HALF = _IMAGE // 2
_CAPACITY = _IMAGE + _HALF
_LEAST = 0.9  # of plain dm-crypt's throughput
_PLAIN = "ebi-bench-plain"
_SEQUENTIAL = ["--bs=1m", "--iodepth=4", f"--size={_HALF}"]
_RANDOM = ["--bs=4k", "--iodepth=16", f"--size={_HALF}", "--time_based", "--runtime=2"]
# One block in every 256 KiB, the largest chunk: so with each chunk size every write is the first to its chunk.
_FIRST = ["--bs=4k", "--iodepth=16", "--blockalign=256k", f"--size={_HALF}", f"--io_size={_HALF // 64}"]
# fio's own options of each job, in this order on each new device; and whether the goal is for it.
_JOBS = {
    "sequential read, untouched": (["--rw=read", *_SEQUENTIAL], True),
    "random 4 KiB read, untouched": (["--rw=randread", *_RANDOM], True),
    "sequential write, first": (["--rw=write", *_SEQUENTIAL], True),
    "random 4 KiB write, first": (["--rw=randwrite", *_FIRST, f"--offset={_HALF}"], False),
    "random 4 KiB write, first, behind": (["--rw=randwrite", *_FIRST, f"--offset={_IMAGE}"], False),
    "sequential write, first, behind": (["--rw=write", *_SEQUENTIAL, f"--offset={_IMAGE}"], True),
    "sequential write, after": (["--rw=write", *_SEQUENTIAL], True),
    "random 4 KiB write, after": (["--rw=randwrite", *_RANDOM], True),
    "sequential read, after": (["--rw=read", *_SEQUENTIAL], True),
    "random 4 KiB read, after": (["--rw=randread", *_RANDOM], True),
}


def measure(suite: Suite) -> None:
    """Every chunk size against plain dm-crypt, by turns; the rows are of the default chunk size."""
    found: dict[int, list[dict[str, float]]] = {chunk: [] for chunk in CHUNKS}
    plain: list[dict[str, float]] = []
    with suite.golden("least", content.dense(suite.store.work / "dense.raw", _IMAGE)) as golden:
        for _ in range(suite.clock.rounds):
            with _plain(suite) as device:
                plain.append(_runs(device))
            for chunk in CHUNKS:
                with _volume(suite, golden, chunk) as device:
                    found[chunk].append(_runs(device))
    mine = found[service.CHUNK >> 10]
    for job, (_, asked) in _JOBS.items():
        peer = _values(plain, job)
        limit, target = (peer.median / _LEAST, f"at least {_LEAST} of its throughput") if asked else (None, "")
        suite.results.add(Row(f"{job}, a MiB", "ms", _values(mine, job), "plain dm-crypt", peer, target, limit))
    head = ["throughput, as a share of plain dm-crypt's", *(f"{chunk} KiB" for chunk in CHUNKS)]
    rows = [
        [job, *(f"{_values(plain, job).median / _values(found[chunk], job).median:.2f}" for chunk in CHUNKS)]
        for job in _JOBS
    ]
    suite.results.remark("By chunk size:\n\n" + table(head, rows))


def _values(runs: list[dict[str, float]], job: str) -> Values:
    return Values(tuple(run[job] for run in runs))


def _runs(device: Path) -> dict[str, float]:
    """Milliseconds that a MiB of each job takes."""
    command = ["fio", f"--filename={device}", "--direct=1", "--ioengine=libaio", "--end_fsync=1", "--thread"]
    command += ["--output-format=json"]
    for job, (options, _) in _JOBS.items():
        command += [f"--name={job}", "--stonewall", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    jobs = json.loads(done.stdout[done.stdout.index("{") :])["jobs"]
    return {job["jobname"]: job["job_runtime"] / (_moved(job) / MIB) for job in jobs}


def _moved(job: dict[str, Any]) -> int:
    return int(job["read"]["io_bytes"] + job["write"]["io_bytes"])


@contextmanager
def _volume(suite: Suite, golden: Golden, chunk: int) -> Iterator[Path]:
    """A new volume with chunks of `chunk` KiB, staged as a raw device."""
    volumes, default = suite.records, service.CHUNK
    service.CHUNK = chunk << 10
    volume = volumes.create("disk", _CAPACITY, golden.parameters)
    service.CHUNK = default
    staging = suite.store.work / "disk"
    staging.mkdir(exist_ok=True)
    volumes.stage(volume.id, staging, Capability(block=True), golden.secret, {})
    yield dm.path(names.top(volume.id))
    volumes.unstage(volume.id, staging)
    volumes.delete(volume.id)


@contextmanager
def _plain(suite: Suite) -> Iterator[Path]:
    """A LUKS2 device with the same parameters on a file of the same disk."""
    path = suite.store.work / "plain"
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, header.PAYLOAD_OFFSET + _CAPACITY)
    parameters = SecretParameters.from_data(secret("least"), "the benchmark")
    key = header.new_key(parameters)
    header.create(path, parameters, key, sector_size=4096, owner="the benchmark")
    with loop.attached(path, direct_io=True) as device:
        mapping.open_with_key(device, _PLAIN, key, "the benchmark")
    yield dm.path(_PLAIN)
    mapping.close(_PLAIN)
    path.unlink()
