"""The arithmetic of dm-snapshot's store, and the tables."""

from hypothesis import given
from hypothesis import strategies as st

from plugin.host.files import Extent
from plugin.volumes import tables

MIB = 1 << 20
chunks = st.sampled_from([4 << 10, 16 << 10, 64 << 10, 256 << 10])


def last_chunk(exceptions: int, chunk: int) -> int:
    """The highest chunk that dm-snap-persistent.c touches when `exceptions` chunks have been written.

    Chunk 0 is the header, chunk 1 the first area's metadata; allocation skips the chunks of metadata; when an area is
    full, the next one's metadata is cleared at once.
    """
    per_area = chunk // 16
    stride = per_area + 1
    free, highest = 2, 1
    for number in range(1, exceptions + 1):
        highest = max(highest, free)
        free += 1
        if free % stride == 1:
            free += 1
        if number % per_area == 0:
            highest = max(highest, 1 + (number // per_area) * stride)
    return highest


class TestStoreSize:
    @given(st.integers(1, 20_000), st.sampled_from([4 << 10, 16 << 10]))
    def test_holds_every_chunk_of_the_volume(self, count: int, chunk: int) -> None:
        size = tables.store_size(count * chunk, chunk)
        assert last_chunk(count, chunk) < size // chunk

    @given(st.integers(1, 1 << 45), chunks)
    def test_is_whole_chunks_and_little_more_than_the_volume(self, capacity: int, chunk: int) -> None:
        size = tables.store_size(capacity, chunk)
        assert size % chunk == 0
        assert capacity < size <= capacity * (1 + 16 / chunk) + 4 * chunk


def read(table: str) -> list[tuple[int, int, str]]:
    """(start, length, what) of each segment, in bytes; what is `zero` or the place in the image."""
    found = []
    for line in table.splitlines():
        start, length, kind, *rest = line.split()
        found.append((int(start) * 512, int(length) * 512, rest[1] if kind == "linear" else kind))
    return found


class TestBase:
    @given(
        st.lists(st.tuples(st.integers(0, 200), st.integers(1, 50)), max_size=30),
        st.integers(1, 20_000),
        st.integers(0, 5000),
    )
    def test_maps_every_byte_once_data_to_itself_and_the_rest_to_zeros(
        self, runs: list[tuple[int, int]], sectors: int, more: int
    ) -> None:
        size, capacity = sectors * 512, (sectors + more) * 512
        extents, end = [], 0
        for gap, length in runs:
            start = end + gap * 512
            end = min(start + length * 512, size)
            if end <= start:
                break
            extents.append(Extent(start, end - start))
        segments = read(tables.base(extents, size, capacity, "253:7"))
        position, data = 0, []
        for start, length, what in segments:
            assert start == position
            assert length > 0
            position += length
            if what != "zero":
                assert int(what) * 512 == start
                data.append(Extent(start, length))
        assert position == capacity
        covered = {sector for extent in data for sector in range(extent.start // 512, extent.end // 512)}
        wanted = {sector for extent in extents for sector in range(extent.start // 512, extent.end // 512)}
        assert covered == wanted

    def test_neighbours_become_one_segment(self) -> None:
        extents = [Extent(0, 4096), Extent(4096, 8192), Extent(16384, 512)]
        assert tables.base(extents, MIB, MIB, "253:0").splitlines() == [
            "0 24 linear 253:0 0",
            "24 8 zero",
            "32 1 linear 253:0 32",
            "33 2015 zero",
        ]

    def test_all_holes_is_all_zeros(self) -> None:
        assert tables.base([], MIB, 2 * MIB, "253:0") == "0 4096 zero\n"


def test_snapshot_and_linear() -> None:
    assert tables.snapshot("253:1", "253:2", MIB, MIB, 64 << 10) == "0 2048 snapshot 253:1 253:2 P 128\n"
    with_rest = tables.snapshot("253:1", "253:2", MIB, 3 * MIB, 64 << 10)
    assert with_rest == f"0 2048 snapshot 253:1 253:2 P 128\n2048 4096 linear 253:2 {(1 + 1 + 16) * 128}\n"
    assert tables.linear("7:0", MIB) == "0 2048 linear 7:0 0\n"
