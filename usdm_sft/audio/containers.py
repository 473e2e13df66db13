"""What a file says of its own length, and whether all of it is there, for each container that libsndfile reads.

libsndfile hides most of it: of a file that was cut it reports the shorter length, a page of Ogg with a wrong checksum is skipped,
and the length of MP3 without a Xing tag is an estimate beyond which it cannot read.
"""

from __future__ import annotations

import io
import os
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import NamedTuple

REWRITE = "(write it again as FLAC or WAV)"
_BLOCK_BYTES = 1 << 20
_MAX_CHUNKS = 10_000

# Sizes that stand for an unknown one, by programs that write to a pipe: the largest value of the field (ffmpeg; signed: arecord), or
# a round one (sox: 0x7FFFF000 in WAV and 0x7F000000 in AIFF; GStreamer: 0x7FFF0000), rounded down to whole blocks or less a header.
_UNKNOWN = (0x7F000000, 0x7FFF0000, 0x7FFFF000, 1 << 31, 1 << 32, 1 << 63, 1 << 64)
_MARGIN = 512  # arecord's other value is 0x7FFFFF00; node-wav takes 101 bytes for the header


class AudioError(ValueError):
    """Audio that cannot become units. The message names file, reason and remedy."""


class Layout(NamedTuple):
    """Where the samples of a file lie, in bytes.

    Attributes:
        start: Where they begin.
        promised: How many the header promises; None if it does not say.
        there: How many are there.
        patches: Bytes that libsndfile gets to see in place of others: (position, bytes).
    """

    start: int
    promised: int | None
    there: int
    patches: tuple[tuple[int, bytes], ...] = ()

    @property
    def problem(self) -> str | None:
        """Why a part of the samples is missing, or None."""
        if self.promised is None or self.there >= self.promised:
            return None
        return f"is cut short (its header promises {self.promised:,} bytes of samples, {self.there:,} are there)"


def find_layout(file: io.RawIOBase) -> Layout | None:
    """Find the samples in a file of a container whose header holds their number of bytes; None for others.

    Raises:
        AudioError: The file holds more than its header tells.
    """
    end = file.seek(0, os.SEEK_END)
    mark = _read(file, 0, 4)
    found = _FINDERS[mark](file, end) if mark in _FINDERS else None
    if found is None or found.start > end:
        return None
    after = found.start + found.there
    if mark in (_read(file, after, 4), _read(file, after + after % 2, 4)):
        raise AudioError(f"holds several files one after the other, of which only the first can be read {REWRITE}")
    return found


def _read(file: io.RawIOBase, position: int, size: int) -> bytes:
    file.seek(position)
    return file.read(size) or b""


def _make_layout(start: int, size: int, end: int, block: int = 1) -> Layout:
    there = end - start
    is_unknown = size > there and any(base - _MARGIN - block < size <= base for base in _UNKNOWN)
    return Layout(start, None if is_unknown else size, there if is_unknown else min(size, there))


def _iter_chunks(
    file: io.RawIOBase, start: int, end: int, form: str, *, align: int = 2, counted: int = 0
) -> Iterator[tuple[bytes, int, int]]:
    """Yield the name of each chunk, the position of its content, and its size.

    `form` is its header for `struct`: name and size, which includes `counted` bytes of the header. Chunks begin at multiples of `align`.
    """
    header = struct.Struct(form)
    for _ in range(_MAX_CHUNKS):
        if start + header.size > end:
            return
        name, size = header.unpack(_read(file, start, header.size))
        yield name, start + header.size, max(0, size - counted)
        start += header.size + max(0, size - counted) + -size % align


def _find_riff(file: io.RawIOBase, end: int) -> Layout | None:
    """WAV: RIFF, RIFX (big-endian) and RF64, whose sizes of 64 bits are in the chunk ds64."""
    order = ">" if _read(file, 0, 4) == b"RIFX" else "<"
    form, block = f"{order}4sI", 1
    large: tuple[int, int] | None = None
    if _read(file, 8, 4) != b"WAVE":
        return None
    for name, start, size in _iter_chunks(file, 12, end, form):
        if name == b"ds64" and start + 16 <= end:
            large = start + 8, *struct.unpack("<8xQ", _read(file, start, 16))
        elif name == b"fmt " and start + 14 <= end:
            [block] = struct.unpack(f"{order}12xH", _read(file, start, 14))
        elif name == b"data":
            there = end - start
            if large is not None and size == 0xFFFFFFFF:
                position, size = large
                field = "<Q"
            elif there >= 1 << 32:
                raise AudioError(f"holds {there:,} bytes of samples, more than its header can count {REWRITE}")
            else:
                position, field = start - 4, f"{order}I"
            if size == 0 and not _has_chunks(file, start, end, form):  # written to a pipe, such as by mpg123
                return Layout(start, None, there, ((position, struct.pack(field, there)),))
            return _make_layout(start, size, end, block)
    return None


def _has_chunks(file: io.RawIOBase, start: int, end: int, form: str) -> bool:
    """Return True if there is nothing but chunks from `start` to the end."""
    stop = start
    for name, content, size in _iter_chunks(file, start, end, form):
        if not name.decode("latin-1").isprintable():
            return False
        stop = content + size
    return end - 8 < stop <= end


def _find_w64(file: io.RawIOBase, end: int) -> Layout | None:
    """Sony Wave64: names of 16 bytes, of which 4 tell enough, and sizes of 64 bits that include their header."""
    for name, start, size in _iter_chunks(file, 40, end, "<4s12xQ", align=8, counted=24):
        if name == b"data":
            return _make_layout(start, _check_size(size), end)
    return None


def _check_size(size: int) -> int:
    """Refuse a size of 0: sox writes it to a pipe, and after the samples a second header in the place of the first one."""
    if size <= 0:
        raise AudioError(f"has no length in its header {REWRITE}")
    return size


def _find_form(file: io.RawIOBase, end: int) -> Layout | None:
    """AIFF and AIFC (chunk SSND: offset and block size before the samples), and 8SVX (chunk BODY)."""
    for name, start, size in _iter_chunks(file, 12, end, ">4sI"):
        if name == b"SSND" and start + 4 <= end:
            [offset] = struct.unpack(">I", _read(file, start, 4))
            start += 8 + offset
            return Layout(start, None, end - start) if size == 0 else _make_layout(start, size - 8 - offset, end)
        if name == b"BODY":
            return _make_layout(start, size, end)
    return None


def _find_au(file: io.RawIOBase, end: int) -> Layout | None:
    order = ">" if _read(file, 0, 1) == b"." else "<"
    if len(read := _read(file, 4, 8)) < 8:
        return None
    start, size = struct.unpack(f"{order}II", read)
    return _make_layout(start, size, end)


_NIST_FIELD = re.compile(rb"^(sample_count|channel_count|sample_n_bytes) -(?:i|s\d+) (\d{1,15})\s*$", re.MULTILINE)


def _find_nist(file: io.RawIOBase, end: int) -> Layout | None:
    """NIST SPHERE: 1,024 bytes of text, or as many as its second line says."""
    size = _read(file, 8, 8).strip()
    start = int(size) if size.isdigit() else 1024
    header = _read(file, 0, min(start, _BLOCK_BYTES))
    if match := re.search(rb"^sample_coding -s\d+ .*(shorten|wavpack|shortpack)", header, re.MULTILINE):
        raise AudioError(
            f"is SPHERE with {match[1].decode()}, which is not read (convert it with: sph2pipe -f wav IN OUT)"
        )
    fields = {name: int(value) for name, value in _NIST_FIELD.findall(header)}
    if b"sample_count" not in fields or b"sample_n_bytes" not in fields:
        return None
    frame_bytes = fields.get(b"channel_count", 1) * fields[b"sample_n_bytes"]
    return _make_layout(start, fields[b"sample_count"] * frame_bytes, end)


def _find_caf(file: io.RawIOBase, end: int) -> Layout | None:
    """Core Audio: the chunk "data" begins with 4 bytes that count edits; a size of -1 is unknown."""
    for name, start, size in _iter_chunks(file, 8, end, ">4sQ", align=1):
        if name == b"data":
            return _make_layout(start + 4, _check_size(size - 4), end)
    return None


_FINDERS: dict[bytes, Callable[[io.RawIOBase, int], Layout | None]] = {
    b"RIFF": _find_riff,
    b"RIFX": _find_riff,
    b"RF64": _find_riff,
    b"riff": _find_w64,
    b"FORM": _find_form,
    b".snd": _find_au,
    b"dns.": _find_au,
    b"NIST": _find_nist,
    b"caff": _find_caf,
}


def find_flac_total(file: io.RawIOBase, start: int) -> tuple[int, tuple[int, bytes]] | None:
    """Find the number of samples in the header of FLAC: https://www.rfc-editor.org/rfc/rfc9639#name-streaminfo.

    Returns:
        The number, which is 0 if unknown, and a patch that makes it unknown; libsndfile then reads to the end of the file. None if the
        file is not FLAC.
    """
    head = _read(file, start, 26)
    if len(head) < 26 or head[:4] != b"fLaC" or head[4] & 0x7F:
        return None
    total = int.from_bytes(head[21:26], "big") & ((1 << 36) - 1)
    return total, (start + 21, bytes([head[21] & 0xF0, 0, 0, 0, 0]))


_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
_PAGE = struct.Struct("<4sBBqIIIB")
_FIRST, _LAST = 2, 4  # flags of a page: it begins or ends a stream


def find_ogg_streams(file: io.RawIOBase) -> list[int]:
    """Check that every page of an Ogg file is there and whole: https://www.rfc-editor.org/rfc/rfc3533#section-6.

    Returns:
        Where its streams begin that follow each other, of which libsndfile reads the first one.

    Raises:
        AudioError: A page is missing or damaged.
    """
    end = file.seek(0, os.SEEK_END)
    position, flags = 0, _FIRST
    numbers: dict[int, int] = {}
    starts = [0]
    has_begun = False  # with pages that are not the first of a stream
    while position < end:
        is_last = flags & _LAST
        head = _read(file, position, _PAGE.size)
        if is_last and head[:4] != b"OggS"[: len(head)] and b"OggS" not in _read(file, position, _BLOCK_BYTES):
            return starts  # before something else, such as a tag
        lengths = _read(file, position + _PAGE.size, head[-1]) if len(head) == _PAGE.size else b""
        size = len(head) + len(lengths) + sum(lengths)
        if len(head) < _PAGE.size or (head[:4] == b"OggS" and (len(lengths) < head[-1] or position + size > end)):
            raise AudioError("is cut short (it ends inside an Ogg page)")
        mark, _, flags, _, serial, number, checksum, _ = _PAGE.unpack(head)
        if mark != b"OggS":
            raise AudioError(f"is damaged (there is no Ogg page at byte {position:,})")
        if flags & _FIRST and has_begun:
            if not is_last:
                raise AudioError(
                    f"is damaged (the Ogg stream before byte {position:,} is not marked as ended) {REWRITE}"
                )
            starts.append(position)
            numbers.clear()
        has_begun = not flags & _FIRST
        page = _read(file, position, size)
        if _checksum(page[:22] + bytes(4) + page[26:]) != checksum:
            raise AudioError(
                f"is damaged (the Ogg page at byte {position:,} has another checksum than its header says)"
            )
        if numbers.get(serial, number - 1) != number - 1:
            raise AudioError(f"is damaged (Ogg pages are missing before byte {position:,})")
        numbers[serial] = number
        position += size
    if not flags & _LAST:
        raise AudioError(f"is cut short (its last Ogg page is not marked as the end) {REWRITE}")
    return starts


def _checksum(page: bytes) -> int:
    """Return the CRC of an Ogg page: as in zlib, but with the highest bit first, and without inversion."""
    crc = zlib.crc32(page.translate(_REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{crc:032b}"[::-1], 2)


class MpegFrames(NamedTuple):
    """The frames of MPEG audio, without the one that holds a Xing or Info tag.

    Attributes:
        num_frames: Number of frames.
        frame_samples: Samples of one frame.
        promised: Number of frames by the tag; None without a tag, and then libsndfile estimates the length.
        is_cut: True if bytes are missing at the end: of the last frame, or of those that the tag counts.
    """

    num_frames: int
    frame_samples: int
    promised: int | None
    is_cut: bool


_RATES = (44_100, 48_000, 32_000)
_BITRATES = {  # kbit/s, by MPEG 1 (1) or 2 and 2.5 (2), and layer
    (1, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (1, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (1, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (2, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (2, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (2, 3): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_TAGS = (b"TAG", b"APETAGEX", b"LYRICSBEGIN", b"ID3", b"3DI")  # what may stand between frames, and after the last one
_XING_BYTES = 64  # of the first frame, in which a tag begins
_RESYNC_BYTES = 1 << 20  # searched for the first frame


class _Frame(NamedTuple):
    """The header of an MPEG frame."""

    size: int  # in bytes; 0 in the free format, where all frames have the same size, but for `padding`
    padding: int  # bytes, which `size` includes
    samples: int
    shared: tuple[int, ...]  # by all frames of a file: version, layer, rate, and whether there is one channel


@lru_cache(4096)
def _parse_frame(header: bytes) -> _Frame | None:
    """Parse 4 bytes; return None if they are not the header of a frame."""
    if len(header) < 4 or header[0] != 0xFF or header[1] < 0xE0:
        return None
    version, layer = header[1] >> 3 & 3, 4 - (header[1] >> 1 & 3)  # version: 0 is MPEG 2.5, 2 is MPEG 2, 3 is MPEG 1
    rate, bitrate = header[2] >> 2 & 3, header[2] >> 4
    if version == 1 or layer == 4 or rate == 3 or bitrate == 15:
        return None
    kind = 1 if version == 3 else 2
    samples = 384 if layer == 1 else 576 if (layer, kind) == (3, 2) else 1152
    slot = 4 if layer == 1 else 1  # bytes
    padding = (header[2] >> 1 & 1) * slot
    size = 0
    if bitrate:
        hertz = _RATES[rate] >> {3: 0, 2: 1, 0: 2}[version]
        size = samples // 8 // slot * 1000 * _BITRATES[kind, layer][bitrate - 1] // hertz * slot + padding
    return _Frame(size, padding, samples, (version, layer, rate, int(header[3] >> 6 == 3)))


def find_mpeg_frames(file: io.RawIOBase, start: int, end: int) -> MpegFrames | None:
    """Find the frames of MP3, or MPEG layer I or II, between two positions; None if there are none.

    Raises:
        AudioError: A frame is damaged, or the tag counts fewer frames.
    """
    data = _read(file, 0, end)
    first_position = _find_frame(data, start, start + _RESYNC_BYTES)
    if first_position is None:
        return None
    if first_position != start and _parse_frame(data[start : start + 4]) is not None:
        raise AudioError(f"is damaged (there is no MPEG frame after the one at byte {start:,})")
    first = _parse_frame(data[first_position : first_position + 4])
    assert first is not None  # found above
    free_size = 0 if first.size else _find_free_size(data, first_position, first)
    position, num_frames, is_cut = first_position, 0, False
    while position < end:
        header = data[position : position + 4]
        frame = _parse_frame(header)
        if frame is not None and frame.shared == first.shared and (size := frame.size or free_size + frame.padding):
            is_cut = position + size > end
            num_frames += not is_cut
            position += size
            continue
        following = _skip_tag(data, position) or _find_frame(data, position, end, first.shared)
        if following is None:
            is_cut = len(header) < 4 and header[:1] == b"\xff"
            break
        if not data.startswith(_TAGS, position):
            raise AudioError(f"is damaged (there is no MPEG frame at byte {position:,})")
        position = following
    tag = _find_tag(data[first_position : first_position + _XING_BYTES + 120])
    if tag is None:
        return MpegFrames(num_frames, first.samples, None, is_cut)
    promised, num_bytes = tag
    num_frames -= 1
    if promised < num_frames:
        raise AudioError(f"holds {num_frames:,} MPEG frames, of which its header counts only {promised:,} {REWRITE}")
    is_cut |= num_bytes is not None and num_bytes > end - first_position and promised > num_frames
    return MpegFrames(num_frames, first.samples, promised, is_cut)


def _iter_frames(data: bytes, start: int, stop: int) -> Iterator[tuple[int, _Frame]]:
    """Yield the position of what looks like a frame, from `start` to before `stop`, and its header."""
    for match in re.compile(rb"\xff(?=[\xe0-\xff])").finditer(data, start, stop + 1):
        if (frame := _parse_frame(data[match.start() : match.start() + 4])) is not None:
            yield match.start(), frame


def _find_frame(data: bytes, start: int, stop: int, shared: tuple[int, ...] | None = None) -> int | None:
    """Find the next frame that another frame, a tag or the end of the file follows; of the kind `shared`, if given."""
    for position, frame in _iter_frames(data, start, stop):
        if shared is None and not frame.size:
            return position
        after = position + frame.size
        following = _parse_frame(data[after : after + 4])
        is_frame = following is not None and following.shared == frame.shared
        if shared in (None, frame.shared) and (is_frame or after == len(data) or data.startswith(_TAGS, after)):
            return position
    return None


def _find_free_size(data: bytes, start: int, first: _Frame) -> int:
    """Return the size of the frames of the free format without padding: the distance to the next one."""
    for position, frame in _iter_frames(data, start + 4, start + _RESYNC_BYTES):
        if (frame.size, frame.shared) == (0, first.shared):
            return position - start - first.padding
    return len(data) - start


def _skip_tag(data: bytes, position: int) -> int | None:
    """Return where a tag ends whose size is known: ID3v1, ID3v2 or APEv2; None for anything else."""
    head = data[position : position + 32]
    if head[:3] == b"TAG":
        return min(position + 128, len(data))
    if head[:8] == b"APETAGEX" and len(head) == 32:
        size, flags = struct.unpack("<12xI4xI", head[:24])
        return min(position + 32 + (size if flags >> 29 & 1 else 0), len(data))  # of a header, or a footer alone
    return min(position + id3_size(head), len(data)) if head[:3] == b"ID3" and len(head) >= 10 else None


def id3_size(head: bytes) -> int:
    """Return the size of an ID3v2 tag in bytes, with its header, which `head` begins with."""
    size = 0
    for byte in head[6:10]:  # seven bits per byte
        size = size << 7 | byte & 0x7F
    return 10 + size


def _find_tag(frame: bytes) -> tuple[int, int | None] | None:
    """Return the numbers of frames and bytes in the tag of the first frame: http://gabriel.mp3-tech.org/mp3infotag.html."""
    match = re.search(rb"(?:Xing|Info)(.{4})", frame[: _XING_BYTES + 8], re.DOTALL)
    if match is None:
        return None
    [flags] = struct.unpack(">I", match[1])
    fields = frame[match.end() : match.end() + 8].ljust(8, b"\0")
    frames, num_bytes = struct.unpack(">II", fields)
    if not flags & 1:
        return None
    return frames, num_bytes if flags & 2 else None
