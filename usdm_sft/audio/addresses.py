"""The address of an utterance's audio, as one string: a file, a member of a zip archive, a segment of either, or several in turn.

    /corpus/data/3/0_0_d3.wav
    zip://DailyTalk/data/3/0_0_d3.wav::/corpus/DailyTalk.zip      as fsspec and datasets spell it
    /calls/fe_03_00001.wav#t=12.5,15.25&channel=1                 seconds (W3C media fragments) and channel, from 0
    first address \\n second address                               one after the other

A file or archive in remote storage (s3://, https://, ...) is an address as well, but is not opened here: `usdm_sft.corpus.remote` makes
it a file. An address can stand wherever a path can: columns, caches and `UnitTokenizer` treat both alike. If a file with exactly the name of
an address exists, the address is that file.
"""

from __future__ import annotations

import io
import lzma
import os
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable, Hashable, Iterable
from typing import NamedTuple, TypeVar

from usdm_sft.utils.once import once_per_key

T = TypeVar("T", bound=Hashable)

MISSING = "does not exist"
END_TOLERANCE = 0.05  # seconds; a segment may end this much after its recording, because time stamps are rounded
MAX_MEMBER_BYTES = 1 << 30  # 90 minutes of stereo at 48 kHz; a larger member may be a zip bomb

# Raised by zipfile for the directory of an archive: an unknown version (NotImplementedError), a name that is not UTF-8 or a negative
# position (ValueError), fields that are cut, and positions beyond 64 bits.
_DIRECTORY = (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, OverflowError, EOFError)
# Raised for a member: a bad checksum, a password or an unknown method (both RuntimeError), an early end, and by each decompressor,
# which may ask for more memory than there is.
_UNPACKING = (*_DIRECTORY, RuntimeError, OSError, MemoryError, zlib.error, lzma.LZMAError)

_ZIP = re.compile(r"zip://(?P<member>[^\n]+?)::(?P<archive>[^\n]+)")
# Protocols of fsspec that name files of other machines. Others lead to local files, such as file:// and simplecache::file://.
_REMOTE = re.compile(r"(?:s3a?|gs|gcs|hf|https?|abfss?|az|oss|memory)://(?!.*::)[^\n]+")
_SECONDS = r"[0-9]+(?:\.[0-9]+)?"
_FRAGMENT = re.compile(
    rf"(?P<file>[^\n]+)#(?:t=(?P<start>{_SECONDS}),(?P<end>{_SECONDS}))?&?(?:channel=(?P<channel>[0-9]+))?"
)


class Segment(NamedTuple):
    """A file or archive member, and the part of it that is meant.

    Attributes:
        file: A path, or `zip://member::archive`.
        start: Start in seconds; None with `end` for the whole file.
        end: End in seconds.
        channel: Channel from 0; None is the mean of all channels.
    """

    file: str
    start: float | None = None
    end: float | None = None
    channel: int | None = None

    @property
    def is_whole(self) -> bool:
        """True for the whole file with all its channels."""
        return self[1:] == (None, None, None)


class AddressError(ValueError):
    """Nothing can be read at an address. The message does not name the path, which the caller adds."""


def parse_address(address: str | os.PathLike[str], exists: Callable[[str], bool] = os.path.lexists) -> list[Segment]:
    """Split an address into its segments.

    Args:
        address: An address.
        exists: Returns True if there is a file with exactly the name of an address. It is asked for segments only.
    """
    return [_parse_line(line, exists) for line in os.fspath(address).split("\n")]


def group_by_recording(sources: Iterable[T], size: int) -> list[list[T]]:
    """Divide addresses into groups of about `size`. The segments of one recording are in one group, so that it is read once.

    The bytes of a file in place of an address are a recording of their own.
    """
    recordings: dict[Hashable, list[T]] = {}
    for source in sources:
        recording: Hashable = source
        if isinstance(source, str) and not (segment := parse_address(source, exists=lambda _: False)[0]).is_whole:
            recording = segment.file
        recordings.setdefault(recording, []).append(source)
    groups: list[list[T]] = []
    for segments in recordings.values():
        if not groups or len(groups[-1]) >= size:
            groups.append([])
        groups[-1] += segments
    return groups


def _parse_line(line: str, exists: Callable[[str], bool]) -> Segment:
    match = _FRAGMENT.fullmatch(line) if "#" in line else None
    if match is None or line.endswith("#") or exists(line):
        return Segment(line)
    start, end, channel = match["start"], match["end"], match["channel"]
    return Segment(
        match["file"],
        None if start is None else float(start),
        None if end is None else float(end),
        None if channel is None else int(channel),
    )


def format_address(file: str, start: float | None = None, end: float | None = None, channel: int | None = None) -> str:
    """Return the address of a segment; `start` and `end` are in seconds, both or neither."""
    parts = [] if start is None or end is None else [f"t={_format_seconds(start)},{_format_seconds(end)}"]
    if channel is not None:
        parts.append(f"channel={channel}")
    return f"{file}#{'&'.join(parts)}" if parts else file


def join_addresses(first: str, second: str) -> str:
    """Return the address of two recordings in turn, in which no sample of a channel is played twice.

    A segment that follows another one of the same channel becomes one with it and the pause between them. Segments of a channel
    that overlap become one, in the place of the first.
    """
    before, after = parse_address(first), parse_address(second)
    joined = list(before)
    for segment in after:
        place = len(joined)
        if joined and _follows(joined[-1], segment):
            place -= 1
            segment = _span(joined.pop(), segment)
        while (other := next((i for i, each in enumerate(joined) if _overlap(each, segment)), None)) is not None:
            place = min(place, other)
            segment = _span(joined.pop(other), segment)
        joined.insert(place, segment)
    if len(joined) == len(before) + len(after):
        return f"{first}\n{second}"
    return "\n".join(format_address(*segment) for segment in joined)


def _follows(first: Segment, second: Segment) -> bool:
    is_later = first.end is not None and second.start is not None and first.end <= second.start
    return is_later and (first.file, first.channel) == (second.file, second.channel)


def _overlap(first: Segment, second: Segment) -> bool:
    if (first.file, first.channel) != (second.file, second.channel):
        return False
    if first.start is None or first.end is None or second.start is None or second.end is None:
        return True
    return first.start < second.end and second.start < first.end


def _span(first: Segment, second: Segment) -> Segment:
    """Return the segment from the earlier start to the later end; the whole channel if one of the two is."""
    if first.start is None or first.end is None or second.start is None or second.end is None:
        return first._replace(start=None, end=None)
    return first._replace(start=min(first.start, second.start), end=max(first.end, second.end))


def _format_seconds(seconds: float) -> str:
    return f"{seconds + 0.0:.6f}".rstrip("0").rstrip(".")  # -0.0 + 0.0 is 0.0


def zip_address(archive: str | os.PathLike[str], member: str) -> str:
    """Return the address of a member of a zip archive."""
    return f"zip://{member}::{os.fspath(archive)}"


def is_remote(file: str | os.PathLike[str]) -> bool:
    """Return True for a file or folder in remote storage, such as "s3://bucket/calls"."""
    return _REMOTE.fullmatch(os.fspath(file)) is not None


def absolute_file(file: str, folder: str | os.PathLike[str]) -> str:
    """Return a file, or a member of an archive, with an absolute path; a relative path starts at `folder`.

    All paths start at a folder in remote storage, so that a manifest there names no files of this machine.
    """
    match = _ZIP.fullmatch(file)
    if match is not None:
        return zip_address(absolute_file(match["archive"], folder), match["member"])
    if is_remote(file):
        return file
    if is_remote(folder):
        return f"{os.fspath(folder).rstrip('/')}/{file.lstrip('/')}"
    return os.path.abspath(os.path.join(folder, file))


def disk_files(address: str | os.PathLike[str]) -> list[str]:
    """Return the real paths of the files and archives that an address names."""
    return list(dict.fromkeys(os.path.realpath(disk_file(segment.file)) for segment in parse_address(address)))


def disk_file(file: str) -> str:
    """Return the file itself, or the archive of which it is a member."""
    match = _match_zip(file)
    return file if match is None else match["archive"]


def _match_zip(file: str) -> re.Match[str] | None:
    match = _ZIP.fullmatch(file)
    return None if match is None or os.path.lexists(file) else match


def file_problem(file: str | os.PathLike[str]) -> str | None:
    """Return why a file or a member of an archive cannot be read, or None.

    Symlinks are followed, also out of the corpus: people keep audio on another disk. Only regular files are accepted, because
    opening a FIFO would block.
    """
    file = os.fspath(file)
    if (match := _match_zip(file)) is not None:
        if problem := file_problem(match["archive"]):
            return f"lies in an archive that {problem}"
        try:
            _find_member(match["archive"], match["member"])
        except AddressError as error:
            return str(error)
        return None
    try:
        mode = os.stat(file).st_mode
    except FileNotFoundError:
        return f"{MISSING} (a symlink leads nowhere)" if os.path.islink(file) else MISSING
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        return f"cannot be read ({getattr(error, 'strerror', None) or error})"
    return None if stat.S_ISREG(mode) else "cannot be read (it is not a regular file)"


def open_file(file: str) -> io.BufferedIOBase:
    """Open a file or a member of an archive for reading and seeking; a member is unpacked in memory.

    Raises:
        AddressError: The archive is damaged or does not have the member.
        OSError: The file cannot be read.
    """
    match = _match_zip(file)
    if match is None:
        return open(file, "rb")
    archive, info = _find_member(match["archive"], match["member"])
    try:
        return io.BytesIO(archive.read(info))
    except _UNPACKING as error:
        raise AddressError(f"cannot be unpacked ({error})") from error


def list_members(archive: str | os.PathLike[str]) -> list[str]:
    """Return the names of the files in a zip archive.

    Raises:
        AddressError: The file is not a zip archive or cannot be read.
    """
    return [
        info.filename for info in _open_archive(os.fspath(archive)).infolist() if info.filename and not info.is_dir()
    ]


def _find_member(path: str, member: str) -> tuple[zipfile.ZipFile, zipfile.ZipInfo]:
    """Find a member. Members are never written to disk, so that their names are harmless; their size is limited."""
    try:
        archive = _open_archive(path)
    except AddressError as error:
        raise AddressError(f"lies in an archive that {error}") from error
    try:
        info = archive.getinfo(member)
    except KeyError:
        raise AddressError(f"{MISSING} in the archive") from None
    if stat.S_ISLNK(info.external_attr >> 16):
        raise AddressError("is a link in the archive, not a file")
    if info.file_size > MAX_MEMBER_BYTES:
        raise AddressError(f"unpacks to {info.file_size:,} bytes, more than {MAX_MEMBER_BYTES:,}")
    return archive, info


def _open_archive(path: str) -> zipfile.ZipFile:
    try:
        status = os.stat(path)
        return _archive(path, status.st_size, status.st_mtime_ns, os.getpid())
    except OSError as error:
        raise AddressError(f"cannot be read ({error.strerror})") from error
    except _DIRECTORY as error:
        is_zip = not isinstance(error, zipfile.BadZipFile)
        raise AddressError(f"{'cannot be read' if is_zip else 'is not a zip file'} ({error})") from error


# Archives stay open, because reading the table of DailyTalk's 23,676 members takes a second. A forked process opens its own.
_archive = once_per_key(lambda path, size, mtime_ns, pid: zipfile.ZipFile(path), maxsize=8)
