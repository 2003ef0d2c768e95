"""The tar format (POSIX.1-1988 ustar, POSIX.1-2001 pax, GNU's long names): bytes -> where each sample lies in them.

Walked here instead of by `tarfile`: an index goes on behind names that are not UTF-8 and up to the byte where a file was
cut, in bounded memory; and a training read has three headers per sample.
"""

import tarfile
import zlib
from typing import NamedTuple

_BLOCK = tarfile.BLOCKSIZE
_ZEROS = bytes(_BLOCK)
_MAX_EXTENSION_BYTES = 1 << 20  # of a header that extends the next one; a name has some hundred bytes


class Member(NamedTuple):
    """A member that is a file; all but its name and size are offsets in the scanned bytes. start: of its first header."""

    name: bytes
    start: int
    data: int
    size: int

    @property
    def stop(self) -> int:
        return self.data + _padded(self.size)

    @property
    def sample(self) -> bytes:
        """The name of the sample it belongs to: its path up to the first dot of the last part."""
        folder, slash, file = self.name.rpartition(b"/")
        return folder + slash + file.partition(b".")[0]

    @property
    def suffix(self) -> str:
        """What is behind that dot."""
        return self.name.rpartition(b"/")[2].partition(b".")[2].decode("utf-8", "backslashreplace")


class Group(NamedTuple):
    """Neighbours that make one sample. members: (suffix, start, stop of its data)."""

    name: bytes
    start: int
    stop: int
    members: list[tuple[str, int, int]]


class Scan(NamedTuple):
    """groups: of members that are whole. at: where reading stopped. ended: whether a block of zeros came last.

    partial: the member whose header is whole, but not its data. damaged: at `at` there is no header.
    """

    groups: list[Group]
    at: int
    ended: bool
    partial: Member | None
    damaged: bool
    whole: bool  # the bytes are a tar with its end


def scan_tar(view: memoryview, ended: bool = False) -> Scan:
    """The samples in these bytes of a tar, which begin at a header."""
    groups: list[Group] = []
    at = start = 0
    name, size = None, None  # from a header that extends the next one
    partial, damaged = None, False
    while at + _BLOCK <= len(view):
        header = bytes(view[at : at + _BLOCK])
        if header == _ZEROS:
            at += _BLOCK
            ended, start, name, size = True, at, None, None
            continue
        try:
            kind, own_name, own_size = _read_header(header)
        except ValueError:
            damaged = True
            break
        data = at + _BLOCK
        if kind in b"xgL":
            if data + _padded(own_size) > len(view):
                break
            found = bytes(view[data : data + own_size])
            if kind == b"L":
                name = found.rstrip(b"\0")
            elif kind == b"x":
                name, size = _read_pax(found, name, size)
            at = data + _padded(own_size)
            continue
        member = Member(own_name if name is None else name, start, data, own_size if size is None else size)
        if kind in b"123456":  # links, devices and folders have no data
            member = member._replace(size=0)
        if member.stop > len(view):
            partial = member
            break
        if kind in b"0\x007" and not member.name.endswith(b"/"):
            _join(groups, member)
        at = start = member.stop
        ended, name, size = False, None, None
    rest = view[at:]
    whole = ended and not damaged and partial is None and start == at and bytes(rest).strip(b"\0") == b""
    return Scan(groups, start, ended, partial, damaged, whole)


def _join(groups: list[Group], member: Member) -> None:
    """Adds a member to the last sample if it is of the same name; a suffix that it has already begins another one.

    A member without a name before its first dot (`._0001.jpg` of macOS, `.DS_Store`) is passed over, as webdataset does.
    """
    name, suffix = member.sample, member.suffix
    if not name or name.endswith(b"/"):
        return
    if not groups or groups[-1].name != name or any(suffix == other for other, _, _ in groups[-1].members):
        groups.append(Group(name, member.start, member.stop, []))
    groups[-1].members.append((suffix, member.data, member.data + member.size))
    groups[-1] = groups[-1]._replace(stop=member.stop)


def show_name(name: bytes) -> str:
    """The key of a sample's name; bytes that are not UTF-8 with a backslash."""
    return decode_name(name.decode("utf-8", "backslashreplace"))


def _read_header(header: bytes) -> tuple[bytes, bytes, int]:
    """(type, name, size in bytes). Raises ValueError if its checksum is another, or if no header says such a thing."""
    if sum(header) - sum(header[148:156]) + 8 * 32 != _number(header[148:156]):
        raise ValueError("no header")
    name, prefix = header[:100].partition(b"\0")[0], header[345:500].partition(b"\0")[0]
    if prefix and header[257:263] == b"ustar\0":  # GNU keeps something else there
        name = prefix + b"/" + name
    kind, size = header[156:157], _number(header[124:136])
    if size < 0 or (kind in b"xgL" and size > _MAX_EXTENSION_BYTES):
        raise ValueError("no header")
    return kind, name, size


def _number(field: bytes) -> int:
    if field[0] & 0x80:  # GNU's for sizes from 8 GiB
        return int.from_bytes(field[1:], "big")
    return int(field.partition(b"\0")[0].strip() or b"0", 8)


def _read_pax(records: bytes, name: bytes | None, size: int | None) -> tuple[bytes | None, int | None]:
    """`path` and `size` of an extended header, else what was given."""
    while records:
        length, _, _ = records.partition(b" ")
        if not length.isdigit() or not len(length) < int(length) <= len(records):
            break
        key, _, value = records[len(length) + 1 : int(length) - 1].partition(b"=")
        if key == b"path":
            name = value
        elif key == b"size" and value.isdigit():
            size = int(value)
        records = records[int(length) :]
    return name, size


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def group_checksum(view: memoryview, group: Group) -> int:
    """crc32 of all that a sample's members occupy, headers included."""
    return zlib.crc32(view[group.start : group.stop])


def encode_key(key: str) -> str:
    """The name of a sample: dots and percent signs in the last part of its key are percent-encoded."""
    folder, slash, file = key.rpartition("/")
    return folder + slash + file.replace("%", "%25").replace(".", "%2E")


def decode_name(name: str) -> str:
    """The key of a sample of this name."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.replace("%2E", ".").replace("%25", "%")
