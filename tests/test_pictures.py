"""Pixels of whatever is accepted are right, whatever the file says beside them; the rest is refused in a line."""

import contextlib
import io
import re
import struct
import zlib
from random import Random

import numpy as np
import psutil
import pytest
from PIL import Image, ImageCms

from rae.data.decoding import decode, decode_and_judge, eval_transform, train_transform
from rae.data.images import open_images

SIDE = np.linspace(0, 1, 48)
RAMP = np.tile(SIDE, (32, 1))
"""Black on the left, white on the right, (32, 48)."""
COLOURS = np.stack([RAMP, np.tile(np.linspace(0, 1, 32)[:, None], 48), RAMP[:, ::-1]], -1)
PHOTO = Image.fromarray((COLOURS * 255).round().astype(np.uint8))


def save(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def shown(data: bytes, **options) -> np.ndarray:
    return decode(data, **options).permute(1, 2, 0).numpy().astype(float)


def assert_shows(data: bytes, fractions: np.ndarray, within: float = 1) -> None:
    """Whether an image shows what is given as fractions of white, (H, W) or (H, W, 3), within levels."""
    expected = fractions if fractions.ndim == 3 else np.repeat(fractions[..., None], 3, -1)
    assert np.abs(shown(data) - 255 * expected).max() <= within


def chunk(name: bytes, content: bytes, checksum: int = 0) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content) ^ checksum)


def png(samples: np.ndarray, bits: int, colour: int, *before: bytes, after: bytes = b"") -> bytes:
    """A PNG of integers (H, W, C)."""
    height, width, _ = samples.shape
    if bits < 8:
        spread = (samples >> np.arange(bits - 1, -1, -1)) & 1
        rows = np.packbits(spread.reshape(height, -1).astype(np.uint8), axis=1)
    else:
        rows = samples.astype(f">u{bits // 8}").reshape(height, -1).view(np.uint8)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(before) + pixels + after + chunk(b"IEND", b"")


def whole(fractions: np.ndarray, bits: int) -> np.ndarray:
    numbers = (fractions * (2**bits - 1)).round().astype(int)
    return numbers if numbers.ndim == 3 else numbers[..., None]


def tiff(samples: np.ndarray, photometric: int, kind: int, order: str = "<", planes: int = 1, **more: int) -> bytes:
    """A TIFF of one strip; ``samples`` (H, W), or (C, H, W) in planes."""
    data = samples.astype(samples.dtype.newbyteorder(order)).tobytes()
    *channels, height, width = samples.shape
    count, bits = (channels or [1])[0], 8 * samples.itemsize
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8, 277: count, 278: height}
    tags |= {279: len(data), 284: planes, 339: kind} | {int(key[1:]): value for key, value in more.items()}
    directory = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    mark = {"<": b"II", ">": b"MM"}[order]
    return mark + struct.pack(f"{order}HI", 42, 8 + len(data)) + data + struct.pack(f"{order}H", len(tags)) + directory


def exif(value: bytes = b"\0\6", kind: int = 3, order: str = ">") -> bytes:
    """EXIF with an orientation, by default 6: to be turned clockwise."""
    mark = {"<": b"II", ">": b"MM"}[order]
    return mark + struct.pack(f"{order}HIHHHI4sI", 42, 8, 1, 0x112, kind, 1, value.ljust(4, b"\0"), 0)


def with_segments(jpeg: bytes, *segments: tuple[int, bytes]) -> bytes:
    written = (struct.pack(">BBH", 255, marker, len(content) + 2) + content for marker, content in segments)
    return jpeg[:2] + b"".join(written) + jpeg[2:]


JPEG = save(PHOTO, "JPEG", quality=95)
XMP = (0xE1, b"http://ns.adobe.com/xap/1.0/\0<x/>")
TURNED = np.rot90(COLOURS, -1)


@pytest.mark.parametrize(
    "segments",
    [
        [(0xE1, b"Exif\0\0" + exif())],
        [XMP, (0xE1, b"Exif\0\0" + exif())],
        [(0xE1, b"FLIR\0\1\0\0" + bytes(40)), XMP, (0xE1, b"Exif\0\0" + exif())],
        [(0xE1, b"Exif\0\0Exif\0\0" + exif())],
        *([(0xE1, b"Exif\0\0" + exif(value, kind))] for kind, value in ((1, b"\6"), (4, b"\0\0\0\6"), (6, b"\6"))),
        *([(0xE1, b"Exif\0\0" + exif(value, kind))] for kind, value in ((7, b"\6"), (8, b"\0\6"), (9, b"\0\0\0\6"))),
        [(0xE1, b"Exif\0\0" + exif(b"\6", 4, "<"))],
    ],
)
def test_a_jpeg_is_turned_wherever_and_however_it_is_said(segments):
    assert_shows(with_segments(JPEG, *segments), TURNED, 12)


@pytest.mark.parametrize("number", range(1, 9))
def test_each_way_up_is_pillows(number):
    from PIL import ImageOps

    data = with_segments(JPEG, (0xE1, b"Exif\0\0" + exif(struct.pack(">H", number))))
    assert np.array_equal(shown(data), np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data)))))


def test_other_formats_are_turned_once():
    samples = whole(COLOURS, 8)
    assert_shows(png(samples, 8, 2, chunk(b"eXIf", exif())), TURNED)
    assert_shows(png(samples, 8, 2, after=chunk(b"eXIf", exif())), TURNED)
    assert_shows(save(PHOTO, "WEBP", lossless=True, exif=exif()), TURNED)
    turn = Image.Exif()
    turn[0x112] = 6
    for compression in (None, "tiff_lzw"):
        assert_shows(save(PHOTO, "TIFF", exif=turn, compression=compression), TURNED)
        deep = Image.fromarray((RAMP * 65535).astype("u2"))
        assert_shows(save(deep, "TIFF", exif=turn, compression=compression), np.rot90(RAMP, -1))


BROKEN = {
    **{f"{name} too short": chunk(name, b"\0") for name in (b"tIME", b"pHYs", b"gAMA", b"cHRM", b"sRGB", b"acTL")},
    "a wrong checksum": chunk(b"tIME", bytes(7), checksum=1),
    "a long comment": chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(3 << 20))),
    "a long profile": chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(3 << 20))),
    "no profile": chunk(b"iCCP", b"p\0\0none"),
    "no EXIF": chunk(b"eXIf", b"none"),
    "no EXIF in a text": chunk(b"tEXt", b"Raw profile type exif\0\nexif\n 8\nzz"),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_what_is_broken_beside_a_picture_does_not_cost_it(broken):
    samples = whole(COLOURS, 8)
    assert_shows(png(samples, 8, 2, BROKEN[broken]), COLOURS)
    assert_shows(png(samples, 8, 2, after=BROKEN[broken]), COLOURS)


def test_nor_in_webp_or_jpeg():
    for options in ({"exif": b"none"}, {"icc_profile": b"none"}, {"icc_profile": bytes(3 << 20)}, {"xmp": b"\xff"}):
        assert_shows(save(PHOTO, "WEBP", lossless=True, **options), COLOURS)
    webp = save(PHOTO, "WEBP", lossless=True, xmp=b"x" * 60)
    assert_shows(webp.replace(struct.pack("<I", 60), struct.pack("<I", 60000)), COLOURS)  # it runs past the end
    plain = shown(JPEG)
    for marker, content in ((0xE1, b"Exif\0\0none"), (0xE2, b"ICC_PROFILE\0"), (0xE2, b"ICC_PROFILE\0\1\3part"),
                            (0xE2, b"MPF\0II*\0\xff"), (0xED, b"Photoshop 3.0\0008BIM"), (0xEE, b"Adobe"),
                            (0xE0, b"JFIF\0"), (0xFE, bytes(65000))):  # fmt: skip
        assert np.array_equal(shown(with_segments(JPEG, (marker, content), (marker, content))), plain), content[:20]


NUMBER, SIGNED, FLOAT = 1, 2, 3
GREY = {
    "8 bits": ((RAMP * 255).astype("u1"), 1, NUMBER),
    "8 bits inverted": ((255 - RAMP * 255).astype("u1"), 0, NUMBER),
    "16 bits": ((RAMP * 65535).astype("u2"), 1, NUMBER),
    "16 bits inverted": ((65535 - RAMP * 65535).astype("u2"), 0, NUMBER),
    "32 bits": ((RAMP * (2**32 - 1)).astype("u4"), 1, NUMBER),
    "16 bits signed": ((RAMP * 65535 - 32768).astype("i2"), 1, SIGNED),
    "float": (RAMP.astype("f4"), 1, FLOAT),
    "float inverted": ((1 - RAMP).astype("f4"), 0, FLOAT),
}
REFUSED = {
    "8 bits signed": ((RAMP * 255 - 128).astype("i1"), 1, SIGNED),
    "32 bits signed": ((RAMP * (2**32 - 1) - 2**31).astype("i4"), 1, SIGNED),
    "half": (RAMP.astype("f2"), 1, FLOAT),
    "double": (RAMP.astype("f8"), 1, FLOAT),
    "float to 1000": ((RAMP * 1000).astype("f4"), 1, FLOAT),
    "not a number": (np.full_like(RAMP, np.nan, "f4"), 1, FLOAT),
}


@pytest.mark.parametrize("samples", GREY)
def test_grey_tiffs_of_many_kinds_of_samples_are_right(samples):
    assert_shows(tiff(*GREY[samples]), RAMP, 1.01)
    if samples not in ("16 bits inverted", "32 bits"):  # which Pillow does not read in this byte order
        assert_shows(tiff(*GREY[samples], ">"), RAMP, 1.01)


@pytest.mark.parametrize("samples", REFUSED)
def test_where_it_is_unknown_what_is_white_the_samples_are_refused(samples):
    for order in "<>":
        with pytest.raises(ValueError, match=r"unknown what is white|unknown pixel mode|where 0 is black"):
            decode(tiff(*REFUSED[samples], order))


def test_compressed_samples_of_another_byte_order_are_right():
    """Pillow forgets that libtiff has turned them already."""
    for name in ("16 bits signed", "float"):
        data, length = tiff(*GREY[name], ">"), GREY[name][0].nbytes
        strip, rest = zlib.compress(data[8 : 8 + length]), data[8 + length :]
        for tag, old, new in ((259, 1, 8), (279, length, len(strip))):
            rest = rest.replace(struct.pack(">HHII", tag, 4, 1, old), struct.pack(">HHII", tag, 4, 1, new))
        assert_shows(data[:4] + struct.pack(">I", 8 + len(strip)) + strip + rest, RAMP)


def test_tiffs_that_pillow_mistakes_are_refused():
    planes = (COLOURS * 65535).astype("u2").transpose(2, 0, 1)
    with pytest.raises(ValueError, match="samples in this order is not read"):
        decode(tiff(planes, 2, 1, planes=2))
    lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    with pytest.raises(ValueError, match="CIE Lab"):
        decode(save(ImageCms.profileToProfile(PHOTO, *lab, outputMode="LAB"), "TIFF"))


def test_a_tiff_without_its_lower_part_is_refused():
    height, higher = (struct.pack("<HHII", 257, 4, 1, rows) for rows in (32, 64))
    with pytest.raises(ValueError, match="its lower part is missing"):
        decode(tiff(RAMP.astype("u1"), 1, 1).replace(height, higher))


def test_portable_floats_are_fractions_and_sixteen_bits_are_scaled():
    assert_shows(save(Image.fromarray(RAMP.astype("f4")), "PPM"), RAMP)
    for format in ("PNG", "TIFF", "PPM", "JPEG2000"):
        assert_shows(save(Image.fromarray((RAMP * 65535).astype("u2")), format), RAMP, 2 if format == "JPEG2000" else 1)


def test_colours_of_jpeg_2000_above_eight_bits_are_refused():
    """Pillow shows their white as black."""
    data = save(PHOTO, "JPEG2000")
    assert_shows(data, COLOURS)
    place = data.index(b"\xff\x4f\xff\x51") + 42
    deeper = bytearray(data)
    deeper[place : place + 9 : 3] = b"\x0b\x0b\x0b"
    with pytest.raises(ValueError, match="JPEG 2000 of 12 bits is read only in grey"):
        decode(bytes(deeper))


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_a_key_colour_is_transparent_at_any_depth(bits):
    samples = whole(RAMP, bits)
    key = samples[0, 30, 0]
    data = png(samples, bits, 0, chunk(b"tRNS", struct.pack(">H", key)))
    assert_shows(data, np.where(samples == key, 0, samples / (2**bits - 1))[..., 0])
    if bits < 8:
        return
    samples = whole(COLOURS, bits)
    samples[3, 3], samples[3, 4] = (key := samples[9, 9]), key ^ [1, 0, 0]  # another only in its lowest bit
    data = png(samples, bits, 2, chunk(b"tRNS", struct.pack(">3H", *key)))
    assert_shows(data, np.where((samples == key).all(-1, keepdims=True), 0, samples / (2**bits - 1)))


@pytest.mark.parametrize("bits", [8, 16])
def test_the_background_is_chosen(bits):
    opacity = COLOURS[..., 1:2]
    for colours, colour in ((COLOURS, 6), (RAMP[..., None], 4)):
        data = png(whole(np.concatenate([colours, opacity], -1), bits), bits, colour)
        for background, beneath in (("black", 0), ("white", 1)):
            expected = 255 * (colours * opacity + beneath * (1 - opacity))
            assert np.abs(shown(data, background=background) - expected).max() <= 1.5
        assert np.abs(shown(data, background="drop") - 255 * colours).max() <= 1
    palette = save(PHOTO.convert("P"), "PNG", transparency=bytes(256))
    assert shown(palette).max() == 0 and shown(palette, background="white").min() == 255
    assert train_transform(32, 32, background="white")(palette, Random(0)).min() == 255
    assert eval_transform(32, background="white")(palette, Random(0)).min() == 255


def wide_profile() -> bytes:
    """An ICC profile of Adobe RGB's primaries and a gamma of 2.2."""
    fixed = lambda *values: b"".join(struct.pack(">i", round(value * 65536)) for value in values)  # noqa: E731
    xyz = {
        b"wtpt": (0.9642, 1, 0.8249), b"rXYZ": (0.60974, 0.31111, 0.01947), b"gXYZ": (0.20528, 0.62567, 0.06087),
        b"bXYZ": (0.14919, 0.06322, 0.74457),
    }  # fmt: skip
    tags = {name: b"XYZ \0\0\0\0" + fixed(*values) for name, values in xyz.items()}
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), b"curv\x00\x00\x00\x00\x00\x00\x00\x01\x023\x00\x00")
    tags[b"desc"] = b"desc\0\0\0\0\0\0\0\5wide\0".ljust(104, b"\0")
    tags[b"cprt"] = b"text\0\0\0\0none"
    table, body, start = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, content in tags.items():
        table += struct.pack(">4sII", name, start + len(body), len(content))
        body += content
    size, names = 128 + len(table + body), (b"mntr", b"RGB ", b"XYZ ", b"acsp")
    head = struct.pack(">I4sI4s4s4s12x4s24x", size, b"none", 0x2100000, *names)
    return (head + fixed(0.9642, 1, 0.8249)).ljust(128, b"\0") + table + body


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_wide_colours_are_brought_to_srgb(format):
    profile, srgb = wide_profile(), ImageCms.createProfile("sRGB")
    options = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}.get(format, {})
    stored = Image.open(io.BytesIO(data := save(PHOTO, format, icc_profile=profile, **options))).convert("RGB")
    expected = ImageCms.profileToProfile(stored, ImageCms.ImageCmsProfile(io.BytesIO(profile)), srgb)
    assert np.abs(shown(data) - np.asarray(expected)).max() <= 1
    assert np.abs(shown(data) - np.asarray(stored)).max() > 20
    same = save(PHOTO, format, icc_profile=ImageCms.ImageCmsProfile(srgb).tobytes(), **options)
    assert np.array_equal(shown(same), np.asarray(stored))


def swollen(data: bytes, form: str, *sizes: int) -> bytes:
    """A file whose header promises 30000 × 30000 where it had these sizes."""
    before = struct.pack(form, *sizes)
    assert before in data
    return data.replace(before, struct.pack(form, *([30000] * 2 + [0] * 2)[: len(sizes)]), 1)


LOSSLESS = save(PHOTO, "WEBP", lossless=True)
GIANTS = {
    "PNG": b"\x89PNG\r\n\x1a\n"
    + chunk(b"IHDR", struct.pack(">IIBBBBB", 30000, 30000, 8, 0, 0, 0, 0))
    + chunk(b"IDAT", b""),
    "JPEG": swollen(JPEG, ">HH", 32, 48),
    "progressive JPEG": swollen(save(PHOTO, "JPEG", progressive=True), ">HH", 32, 48),
    "GIF": swollen(save(PHOTO, "GIF"), "<HH", 48, 32),
    "BMP": swollen(save(PHOTO, "BMP"), "<ii", 48, 32),
    "TIFF": tiff(RAMP.astype("u1"), 1, 1).replace(struct.pack("<II", 1, 48), struct.pack("<II", 1, 2**30)),
    "JPEG 2000": swollen(save(PHOTO, "JPEG2000"), ">II", 32, 48),
    "JPEG 2000's samples": swollen(save(PHOTO, "JPEG2000"), ">IIII", 48, 32, 0, 0),
    "WEBP": LOSSLESS[:21] + struct.pack("<I", 2**28 - 1) + LOSSLESS[25:],
    "PPM": b"P6\n30000 30000\n255\n" + bytes(100),
    "PSD": b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 30000, 30000, 8, 3) + bytes(14),
    "TGA": bytes([0, 0, 2]) + bytes(9) + struct.pack("<HH", 30000, 30000) + bytes([24, 0]) + bytes(50),
    "QOI": b"qoif" + struct.pack(">II", 30000, 30000) + b"\3\0" + bytes(20),
}


@pytest.mark.parametrize("format", GIANTS)
def test_a_giant_header_is_refused_before_anything_is_decoded(format):
    before = psutil.Process().memory_info().rss
    with pytest.raises(ValueError, match=r"more than 134,217,728|exceeds limit"):
        decode(GIANTS[format])
    assert psutil.Process().memory_info().rss - before < 2**26


FOREIGN = [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", b"\x89HDF\r\n\x1a\n", b"GRIB\0\0\0\1"]
FOREIGN += [
    b"BUFR",
    b"\0\0\1\xb3",
    b"\xd7\xcd\xc6\x9a",
    b"SIMPLE  =",
    b"\0\0\1\0\1\0",
    b"<svg/>",
    b"PK\3\4",
    b"some text",
]


@pytest.mark.parametrize("start", FOREIGN)
def test_only_image_decoders_run(start, monkeypatch):
    import subprocess

    monkeypatch.setattr(subprocess, "Popen", None)
    with pytest.raises(ValueError, match=r"it is no image of a known format"):
        decode(start.ljust(200, b"\0"))


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize((400, 320))
NOISY = save(NOISE, "JPEG", quality=92)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
def test_missing_parts_of_a_jpeg_are_told(mode, progressive, capfd):
    data = save(NOISE.convert(mode), "JPEG", quality=92, progressive=progressive)
    pixels, said = decode_and_judge(data)
    assert not said
    for end in (data[:-2], data[:-1], data[:-2] + b"\0"):
        again, said = decode_and_judge(end)
        assert (pixels == again).all() and (not said or end[-1:] == b"\0")
    assert "premature end" in decode_and_judge(data[: len(data) // 2] + b"\xff\xd9")[1]
    with pytest.raises(ValueError, match="the file is cut off"):
        decode(data[: len(data) // 2])
    for scan in list(re.finditer(b"\xff\xda", data))[1:]:
        assert "missing" in decode_and_judge(data[: scan.start()] + b"\xff\xd9")[1]
    segment = 4 + int.from_bytes(data[4:6])
    between = data[:segment] + b"abc" + data[segment:]
    assert (decode(between) == pixels).all()
    assert capfd.readouterr().err == ""


def test_damaged_files_leave_nothing_in_memory_and_on_stderr(capfd):
    big = NOISE.resize((2000, 1500), Image.Resampling.BICUBIC)
    jpeg = save(big, "JPEG", quality=90)
    damaged = [jpeg[: int(len(jpeg) * 0.9)], jpeg[: len(jpeg) // 2] + b"\xff\xd9"]
    strips = save(NOISE, "TIFF", compression="tiff_lzw")
    damaged += [strips[:200] + bytes(2000) + strips[2200:], save(NOISE, "PNG")[:-3000], save(NOISE, "GIF")[:-3000]]

    def decode_all() -> int:
        for data in damaged:
            with contextlib.suppress(ValueError):
                train_transform(64, 96)(memoryview(data), Random(0))
        return psutil.Process().memory_info().rss

    begin = [decode_all() for _ in range(5)][-1]
    assert [decode_all() for _ in range(20)][-1] - begin < 2**25  # of 9 MB in each of 40 that are three megapixels
    assert capfd.readouterr().err == ""


def test_a_strip_is_refused_with_its_own_size_and_costs_no_other(tmp_path):
    for size in ((1, 20000), (60000, 1), (120, 100)):
        Image.new("RGB", size).save(tmp_path / f"{size[0]}x{size[1]}.png")
    images = open_images(str(tmp_path), 256)
    assert images[0]["name"] == "120x100.png" and images[0]["image"].shape == (3, 256, 256)
    for number, size in ((1, "1 × 20000"), (2, "60000 × 1")):
        with pytest.raises(Exception, match=f"{size} is too narrow to be resized to 256"):
            images[number]
