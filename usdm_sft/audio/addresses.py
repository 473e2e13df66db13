"""Where the audio of an utterance lies, as one string: a file, a member of a zip archive, a stretch of either, or several in turn.

    /corpus/data/3/0_0_d3.wav
    zip://DailyTalk/data/3/0_0_d3.wav::/corpus/DailyTalk.zip      as fsspec and datasets spell it
    /calls/fe_03_00001.wav#t=12.5,15.25&channel=1                 seconds (W3C media fragments) and channel, from 0
    first address \\n second address                               one after the other

So whoever holds a path can hold an address: columns, caches and `UnitTokenizer` know no difference. A name that exists as it is
written is a file, whatever it looks like.
"""

from __future__ import annotations

import io
import lzma
import os
import re
import stat
import zipfile
import zlib
from typing import BinaryIO, NamedTuple

from usdm_sft.utils.once import once_per_key

MISSING = "does not exist"
MAX_MEMBER_BYTES = 1 << 30  # 90 minutes of stereo at 48 kHz; a member that unpacks to more is a bomb

# What zipfile raises over a member: checksum, password, method of compression, end of file, and each method's own.
_UNPACKING = (zipfile.BadZipFile, RuntimeError, NotImplementedError, EOFError, OSError, zlib.error, lzma.LZMAError)

_ZIP = re.compile(r"zip://(?P<member>[^\n]+?)::(?P<archive>[^\n]+)")
_SECONDS = r"[0-9]+(?:\.[0-9]+)?"
_FRAGMENT = re.compile(
    rf"(?P<file>[^\n]+)#(?:t=(?P<start>{_SECONDS}),(?P<end>{_SECONDS}))?&?(?:channel=(?P<channel>[0-9]+))?"
)


class Stretch(NamedTuple):
    """A file or member, and what of it."""

    file: str
    start: float | None = None  # seconds; None is the whole
    end: float | None = None
    channel: int | None = None  # from 0; None is the mean of all

    @property
    def is_whole(self) -> bool:
        return self[1:] == (None, None, None)


class AddressError(ValueError):
    """Nothing can be read there; the message names no path."""


def parse_address(address: str | os.PathLike) -> list[Stretch]:
    """Take an address apart."""
    address = os.fspath(address)
    if "\n" not in address and os.path.lexists(address):
        return [Stretch(address)]
    return [_parse_line(line) for line in address.split("\n")]


def _parse_line(line: str) -> Stretch:
    match = _FRAGMENT.fullmatch(line)
    if match is None or line.endswith("#") or os.path.lexists(line):
        return Stretch(line)
    start, end, channel = match["start"], match["end"], match["channel"]
    return Stretch(
        match["file"],
        None if start is None else float(start),
        None if end is None else float(end),
        None if channel is None else int(channel),
    )


def format_address(file: str, start: float | None = None, end: float | None = None, channel: int | None = None) -> str:
    """Put an address together; `start` and `end` in seconds, both or neither."""
    parts = [] if start is None else [f"t={_spell(start)},{_spell(end)}"]
    if channel is not None:
        parts.append(f"channel={channel}")
    return f"{file}#{'&'.join(parts)}" if parts else file


def join_addresses(first: str, second: str) -> str:
    """The address of one recording after the other; two stretches of a channel become one, with the pause between them."""
    *before, last = parse_address(first)
    following, *after = parse_address(second)
    if (
        last.end is not None
        and following.end is not None
        and last[0::3] == following[0::3]
        and last.end <= following.start
    ):
        joined = [*before, last._replace(end=following.end), *after]
        return "\n".join(format_address(*stretch) for stretch in joined)
    return f"{first}\n{second}"


def _spell(seconds: float) -> str:
    return f"{seconds:.6f}".rstrip("0").rstrip(".")


def zip_address(archive: str | os.PathLike, member: str) -> str:
    return f"zip://{member}::{os.fspath(archive)}"


def absolute_file(file: str, folder: str | os.PathLike) -> str:
    """A file that is named from `folder`, or a member of an archive that is, by its absolute path."""
    match = _ZIP.fullmatch(file)
    if match is None:
        return os.path.abspath(os.path.join(folder, file))
    return zip_address(os.path.abspath(os.path.join(folder, match["archive"])), match["member"])


def disk_files(address: str | os.PathLike) -> list[str]:
    """The files on disk, or archives, that an address leads to, symlinks followed."""
    matches = [(stretch.file, _match_zip(stretch.file)) for stretch in parse_address(address)]
    return list(dict.fromkeys(os.path.realpath(file if match is None else match["archive"]) for file, match in matches))


def _match_zip(file: str) -> re.Match | None:
    return None if os.path.lexists(file) else _ZIP.fullmatch(file)


def file_problem(file: str | os.PathLike) -> str | None:
    """Why there is nothing to read at a file or member of an archive, or None.

    A symlink is followed wherever it leads, out of the corpus as well: people keep audio on another disk. What is no regular
    file is refused, since a FIFO would keep the run waiting for ever.
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
    except (OSError, ValueError) as error:  # ValueError: a NUL in it
        return f"cannot be read ({getattr(error, 'strerror', None) or error})"
    return None if stat.S_ISREG(mode) else "cannot be read (it is no regular file)"


def open_file(file: str) -> BinaryIO:
    """A file, or a member of an archive, to read and to seek in.

    Raises:
        AddressError: The archive is damaged, or has no such member.
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


def list_members(archive: str | os.PathLike) -> list[str]:
    """Names of the files in a zip archive.

    Raises:
        AddressError: It is no zip archive.
    """
    return [info.filename for info in _open_archive(os.fspath(archive)).infolist() if not info.is_dir()]


def _find_member(path: str, member: str) -> tuple[zipfile.ZipFile, zipfile.ZipInfo]:
    """Nothing is ever written to disk, so a member's name cannot lead out of a folder; its size could fill the memory."""
    archive = _open_archive(path)
    try:
        info = archive.getinfo(member)
    except KeyError:
        raise AddressError(f"{MISSING} in the archive") from None
    if stat.S_ISLNK(info.external_attr >> 16):
        raise AddressError("is a link in the archive, and no file")
    if info.file_size > MAX_MEMBER_BYTES:
        raise AddressError(f"unpacks to {info.file_size:,} bytes, more than {MAX_MEMBER_BYTES:,}")
    return archive, info


def _open_archive(path: str) -> zipfile.ZipFile:
    try:
        stat = os.stat(path)
        return _archive(path, stat.st_size, stat.st_mtime_ns, os.getpid())
    except zipfile.BadZipFile as error:
        raise AddressError(f"lies in what is no zip archive ({error})") from error
    except OSError as error:
        raise AddressError(f"lies in an archive that cannot be read ({error.strerror})") from error


def _read_directory(path: str, size: int, mtime_ns: int, pid: int) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)


# Kept open, since the table of DailyTalk's 23,676 members takes a second to read; a forked process opens its own.
_archive = once_per_key(_read_directory, maxsize=8)
