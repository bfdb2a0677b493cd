from __future__ import annotations

import io
import struct
import zipfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memopt import archive
from memopt.archive import PAGE, Entry, read_archive, write_archive
from memopt.errors import InputRefused, IntegrityError

ENTRIES = (Entry("mimetype", b"application/x"), Entry("a/b.bin", bytes(range(256)), PAGE), Entry("c.txt", b"hello"))


def written(entries: tuple[Entry, ...] = ENTRIES) -> bytes:
    buffer = io.BytesIO()
    write_archive(buffer, entries)
    return buffer.getvalue()


def contents(data: bytes) -> dict[str, bytes]:
    spans = read_archive(memoryview(data))
    return {name: data[span.offset : span.offset + span.size_bytes] for name, span in spans.items()}


names = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,8}(/[a-z0-9]{1,5}){0,3}", fullmatch=True)


@given(st.dictionaries(names, st.binary(max_size=300), max_size=6), st.sampled_from([64, 128, 4096]))
def test_what_was_written_is_read(files: dict[str, bytes], align: int) -> None:
    folded = {name.lower(): data for name, data in files.items()}
    data = written(tuple(Entry(name, content, align) for name, content in folded.items()))
    assert contents(data) == folded
    assert all(span.offset % align == 0 for span in read_archive(memoryview(data)).values())


def test_any_zip_program_reads_it() -> None:
    with zipfile.ZipFile(io.BytesIO(written())) as archive:
        assert archive.testzip() is None
        assert {name: archive.read(name) for name in archive.namelist()} == {e.name: e.data for e in ENTRIES}


def test_equal_entries_give_equal_bytes() -> None:
    assert written() == written()


def test_every_truncation_is_refused() -> None:
    data = written()
    for length in range(len(data)):
        with pytest.raises(IntegrityError):
            read_archive(memoryview(data[:length]))


def test_every_flipped_bit_outside_the_data_is_refused_or_moves_nothing(flipped) -> None:
    data = written()
    spans = read_archive(memoryview(data))
    inside = {i for span in spans.values() for i in range(span.offset, span.offset + span.size_bytes)}
    for position in set(range(len(data))) - inside:
        for bit in range(8):
            with pytest.raises(IntegrityError):
                read_archive(memoryview(flipped(data, position, bit)))


@pytest.mark.parametrize("extra", [b"x", b"PK\x05\x06" + bytes(18), written()])
def test_bytes_before_or_after_are_refused(extra: bytes) -> None:
    for data in (extra + written(), written() + extra):
        with pytest.raises(IntegrityError):
            read_archive(memoryview(data))


@pytest.fixture(params=[1, 200, 300, 10_000], ids="wide from {}".format)
def wide(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Numbers of 64 bits from here on, as if the file were larger than 4 GiB: sizes, offsets, the directory's place.

    1: everything. 200: an entry, offsets, the directory. 300: offsets, the directory. 10 000: the directory's place.
    """
    monkeypatch.setattr(archive, "_WIDE_FROM", request.param)
    return request.param


def test_numbers_of_64_bits_are_written_where_they_are_needed(wide: int) -> None:
    entries = (*ENTRIES, Entry("last.bin", bytes(7000), PAGE))
    data = written(entries)
    assert contents(data) == {entry.name: entry.data for entry in entries}
    spans = read_archive(memoryview(data)).values()
    assert [span.offset % entry.align for span, entry in zip(spans, entries, strict=True)] == [0] * 4
    assert data[-98:-94] == b"PK\x06\x06"
    assert data[-42:-38] == b"PK\x06\x07"
    with zipfile.ZipFile(io.BytesIO(data)) as found:
        assert found.testzip() is None
        assert {name: found.read(name) for name in found.namelist()} == {entry.name: entry.data for entry in entries}
        assert [info.extract_version for info in found.infolist()] == [
            45 if max(len(entry.data), info.header_offset) >= wide else 20
            for entry, info in zip(entries, found.infolist(), strict=True)
        ]


def test_numbers_of_64_bits_are_refused_where_none_are_needed_and_missed_where_they_are(
    wide: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = (*ENTRIES, Entry("last.bin", bytes(7000), PAGE))
    data = written(entries)
    monkeypatch.setattr(archive, "_WIDE_FROM", 2**32 - 1)
    with pytest.raises(IntegrityError):
        read_archive(memoryview(data))
    data = written(entries)
    monkeypatch.setattr(archive, "_WIDE_FROM", wide)
    with pytest.raises(IntegrityError):
        read_archive(memoryview(data))


def test_every_damage_to_an_archive_with_numbers_of_64_bits_is_refused(wide: int, flipped) -> None:
    data = written()
    spans = read_archive(memoryview(data))
    inside = {i for span in spans.values() for i in range(span.offset, span.offset + span.size_bytes)}
    padding = range(150, spans["a/b.bin"].offset - 10)
    for position in set(range(len(data))) - inside - set(padding[::3]) - set(padding[1::3]):
        for bit in range(8):
            with pytest.raises(IntegrityError):
                read_archive(memoryview(flipped(data, position, bit)))
    for length in (*range(0, len(data) - 400, 7), *range(len(data) - 400, len(data))):
        with pytest.raises(IntegrityError):
            read_archive(memoryview(data[:length]))


def test_numbers_beyond_32_bits_are_laid_out_exactly() -> None:
    """Without writing 4 GiB: the headers around an entry of 5 GiB, and what stands behind it."""
    size = 5 * 2**30
    head = archive._Head("w.data", size, 0, PAGE)
    local = head.local(0)
    assert len(local) == PAGE
    assert struct.unpack_from("<2I", local, 18) == (2**32 - 1, 2**32 - 1)
    assert struct.unpack_from("<2H2Q", local, 36) == (1, 16, size, size)
    behind = archive._Head("x", 1, 0, 64)
    assert struct.unpack_from("<2HQ", behind.central(PAGE + size), 47) == (1, 8, PAGE + size)
    end = archive._end(2, PAGE + size + 100, 150)
    assert struct.unpack_from("<Q", end, 48) == (PAGE + size + 100,)
    assert len(archive._end(2, 2**32 - 2, 150)) == 22
    assert len(archive._end(2, 2**32 - 1, 150)) == 22 + 20 + 56


def test_more_files_than_are_read_are_not_written() -> None:
    with pytest.raises(InputRefused, match="would have 4097 files, at most 4096 are read"):
        written(tuple(Entry(f"f{i}", b"") for i in range(4097)))


def hostile(write) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        write(archive)
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    "write",
    [
        lambda z: z.writestr("a", b"x" * 1000, compress_type=zipfile.ZIP_DEFLATED),
        lambda z: z.writestr("../a", b"x"),
        lambda z: z.writestr("/a", b"x"),
        lambda z: [z.writestr("a", b"x"), z.writestr("a", b"y")],
        lambda z: setattr(z, "comment", b"hidden"),
        lambda z: z.writestr("a", b"plain zip, not ours"),
    ],
    ids=["compressed", "climbing", "absolute", "twice", "comment", "foreign"],
)
def test_zip_files_of_others_are_refused(write) -> None:
    with pytest.raises(IntegrityError):
        read_archive(memoryview(hostile(write)))


@pytest.mark.parametrize("name", ["", "/a", "../a", "a/../b", "a\\b", ".hidden", "a//b", "ü", "a" * 201, "C:x", "a/"])
def test_unsafe_names_are_not_written(name: str) -> None:
    with pytest.raises(InputRefused, match="cannot be a name"):
        written((Entry(name, b""),))


def test_names_that_differ_in_case_only_are_refused() -> None:
    with pytest.raises(IntegrityError, match="stands twice"):
        read_archive(memoryview(written((Entry("a", b"1"), Entry("A", b"2")))))
