from __future__ import annotations

import io
import zipfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
