"""What a picture needs of its file: what else is in it may be broken or long, and decoders refuse all for it."""

import re
import struct
import zlib

_PNG, _MOST = b"\x89PNG\r\n\x1a\n", 2**20
_KEPT = (b"tRNS", b"eXIf", b"iCCP")
_TEXTS = (b"zTXtRaw profile type exif\0", b"tEXtRaw profile type exif\0", b"iTXtXML:com.adobe.xmp\0\0")
_SCAN, _NOTES = 0xDA, {0xFE, *range(0xE2, 0xEE), 0xEF}
_PROGRESSIVE, _MARKER = 0xC2, re.compile(rb"\xff[^\x00\xff\xd0-\xd9]")
_LEAST = {0xE0: 16, 0xEE: 14}
"""Lengths of JFIF's and Adobe's segments of a JPEG, below which they are broken."""


def reduce_png(data: bytes) -> bytes:
    """A PNG with its colours, EXIF and ICC profile if they are sound, and its samples."""
    chunks, place = [_PNG], len(_PNG)
    while place + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, place)
        chunk = data[place : place + 12 + length]
        name, place = chunk[4:8], place + len(chunk)
        if name[:1].isupper():
            chunks.append(chunk)
        elif (name in _KEPT or chunk[4:].startswith(_TEXTS)) and _is_sound(name, chunk):
            chunks.insert(len(chunks) if name == b"tRNS" else 2, chunk)  # what follows the samples is seen too late
    return b"".join(chunks)


def _is_sound(name: bytes, chunk: bytes) -> bool:
    if zlib.crc32(chunk[4:-4]) != int.from_bytes(chunk[-4:]) or len(chunk) > _MOST:
        return False
    if name not in (b"iCCP", b"zTXt"):
        return True
    inflate = zlib.decompressobj()
    try:
        inflate.decompress(chunk[8:-4].partition(b"\0")[2][1:], _MOST)
    except zlib.error:
        return False
    return inflate.eof


def reduce_webp(data: bytes) -> bytes:
    """A WebP with its frames, EXIF and ICC profile, and a length that is right."""
    chunks, place = [], 12
    while place + 8 <= len(data):
        name, length = struct.unpack_from("<4sI", data, place)
        end = place + 8 + length + length % 2
        if name.startswith((b"VP8", b"AL", b"AN")) or (name in (b"ICCP", b"EXIF") and end <= len(data)):
            chunks.append(data[place:end])
        place = end
    content = b"WEBP" + b"".join(chunks)
    return struct.pack("<4sI", b"RIFF", len(content)) + content


def reduce_jpeg(data: bytes) -> bytes:
    """A JPEG with its EXIF and its samples, nothing between its segments, and its end marked."""
    kept, place = [data[:2]], 2
    while 0 < place <= len(data) - 4:
        marker, length = data[place + 1], int.from_bytes(data[place + 2 : place + 4])
        if data[place] != 0xFF or marker in (0, 0xFF):
            place = data.find(b"\xff", place + 1)
        elif marker == _SCAN:
            return b"".join([*kept, data[place:], b"\xff\xd9"])
        else:
            if length >= _LEAST.get(marker, 2) and marker not in _NOTES:
                kept.append(data[place : place + 2 + length])
            place += 2 + length
    return data


def is_complete(data: bytes) -> bool:
    """Whether a progressive JPEG's scans give each coefficient of each component to its last bit."""
    place, components, given = 2, 0, set()
    while found := _MARKER.search(data, place):
        marker, length = data[found.start() + 1], int.from_bytes(data[found.end() : found.end() + 2])
        segment, place = data[found.end() + 2 : found.end() + length], found.end() + length
        if marker == _PROGRESSIVE:
            components = segment[5]
        elif marker == _SCAN:
            first, last, bits = segment[-3:]
            if bits & 15 == 0:
                given |= {(each, k) for each in segment[1:-3:2] for k in range(first, last + 1)}
    return len(given) == 64 * components
