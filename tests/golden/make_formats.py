"""Record what Pillow decodes from small images in formats other than WebP, and from unusual but complete JPEGs.

Writes formats.safetensors: for each image the file, and the pixels of `Image.open(file).convert("RGB")`, which
torchvision's ImageFolder trains on. An image that Pillow refuses has no pixels. Run in this folder, with pillow, numpy
and safetensors installed:

    python make_formats.py
"""

import io
import json
import struct
import zlib

import numpy as np
import PIL.features
from PIL import Image
from safetensors.numpy import save_file

rng = np.random.default_rng(7)
WIDTH, HEIGHT = 13, 9
noise = rng.integers(0, 256, (HEIGHT, WIDTH, 4), np.uint8)
rgb = Image.fromarray(noise[..., :3])
rgba = Image.fromarray(noise)
grey = rgb.convert("L")
bilevel = Image.fromarray((noise[..., 0] > 127).astype(np.uint8) * 255).convert("1")
few = rgb.quantize(6)
many = rgb.quantize(200)
wide = rng.integers(0, 65536, (HEIGHT, WIDTH, 4)).astype(np.uint16)
# Values around 255 and 256, where clipping and scaling differ.
wide[0, :8, 0] = [0, 1, 127, 128, 254, 255, 256, 257]
wide[1, :4] = [[127, 128, 129, 255], [384, 385, 32767, 32768], [65407, 65408, 65535, 0], [255, 256, 257, 511]]


def saved(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


# PNG, written by hand: bit depths, color types, and errors around the data.


def chunk(name, data, crc=None):
    crc = zlib.crc32(name + data) if crc is None else crc
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", crc)


def png(rows, bits, color, *more, width=WIDTH, idat_crc=None, end=True, cut=None, adler=True):
    """Returns a PNG file; `rows` are the bytes of the lines, without filters."""
    data = zlib.compress(b"".join(b"\0" + bytes(row) for row in rows))
    if not adler:
        data = data[:-4] + bytes([data[-4] ^ 1]) + data[-3:]
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, len(rows), bits, color, 0, 0, 0))
    idat = chunk(b"IDAT", data[:cut], idat_crc)
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + idat + (chunk(b"IEND", b"") if end else b"")


def packed(values, bits):
    """Packs lines of values smaller than a byte, the first in the highest bits."""
    for line in values:
        text = "".join(format(value, f"0{bits}b") for value in line)
        text += "0" * (-len(text) % 8)
        yield bytes(int(text[at : at + 8], 2) for at in range(0, len(text), 8))


big = wide.astype(">u2")
plain_rows = [noise[y, :, :3].tobytes() for y in range(HEIGHT)]
sound = png(plain_rows, 8, 2)
palette = chunk(b"PLTE", noise[:2].reshape(-1)[:48].tobytes())
files = {
    "png grey 1": png(list(packed(noise[..., 0] >> 7, 1)), 1, 0),
    "png grey 2": png(list(packed(noise[..., 0] >> 6, 2)), 2, 0),
    "png grey 4": png(list(packed(noise[..., 0] >> 4, 4)), 4, 0),
    "png grey 8": png([noise[y, :, 0].tobytes() for y in range(HEIGHT)], 8, 0),
    "png grey 16": png([big[y, :, 0].tobytes() for y in range(HEIGHT)], 16, 0),
    "png rgb 8": sound,
    "png rgb 16": png([big[y, :, :3].tobytes() for y in range(HEIGHT)], 16, 2),
    "png palette 4": png(list(packed(noise[..., 0] >> 4, 4)), 4, 3, palette),
    "png palette with transparency": png(
        list(packed(noise[..., 0] >> 4, 4)), 4, 3, palette, chunk(b"tRNS", bytes(range(16)))
    ),
    "png grey alpha 8": png([noise[y, :, :2].tobytes() for y in range(HEIGHT)], 8, 4),
    "png grey alpha 16": png([big[y, :, :2].tobytes() for y in range(HEIGHT)], 16, 4),
    "png rgb alpha 8": png([noise[y].tobytes() for y in range(HEIGHT)], 8, 6),
    "png rgb alpha 16": png([big[y].tobytes() for y in range(HEIGHT)], 16, 6),
    "png grey 8 with transparency": png(
        [noise[y, :, 0].tobytes() for y in range(HEIGHT)], 8, 0, chunk(b"tRNS", b"\0" + noise[0, :1, 0].tobytes())
    ),
    "png grey 16 with transparency": png(
        [big[y, :, 0].tobytes() for y in range(HEIGHT)], 16, 0, chunk(b"tRNS", big[0, 3, :1].tobytes())
    ),
    "png rgb 8 with transparency": png(plain_rows, 8, 2, chunk(b"tRNS", b"".join(b"\0" + bytes([v]) for v in noise[0, 0, :3]))),
    "png without end": png(plain_rows, 8, 2, end=False),
    "png with a wrong data checksum": png(plain_rows, 8, 2, idat_crc=0),
    "png with a wrong data checksum, without end": png(plain_rows, 8, 2, idat_crc=0, end=False),
    "png grey 16 without end": png([big[y, :, 0].tobytes() for y in range(HEIGHT)], 16, 0, end=False),
    "png with an odd checksum of the pixels": png(plain_rows, 8, 2, adler=False),
    "png cut within the last checksum": sound[:-14],
    "png with cut data": png(plain_rows, 8, 2, cut=-20),
    "png with a wrong palette checksum": png(list(packed(noise[..., 0] >> 4, 4)), 4, 3, palette[:-4] + b"\0\0\0\0"),
    "png with a wrong text checksum": png(plain_rows, 8, 2, chunk(b"tEXt", b"a\0b", 0)),
    "png with bytes behind its end": sound + b"more",
}

# BMP.


def bmp(rows, bits, *, compression=0, colors=b"", masks=b"", width=WIDTH, height=HEIGHT, header=40, used=0):
    """Returns a BMP file; `rows` start at the bottom and are padded to four bytes here, or are compressed data."""
    data = rows if isinstance(rows, bytes) else b"".join(row + bytes(-len(row) % 4) for row in rows)
    if header == 12:
        info = struct.pack("<IHHHH", 12, width, height, 1, bits)
    else:
        info = struct.pack("<IiiHHIIiiII", header, width, height, 1, bits, compression, len(data), 2835, 2835, used, 0)
        info += masks if header > 40 else b""
        info += bytes(header - len(info)) + (masks if header == 40 else b"")
    at = 14 + len(info) + len(colors)
    return b"BM" + struct.pack("<IHHI", at + len(data), 0, 0, at) + info + colors + data


upward = range(HEIGHT - 1, -1, -1)
bgr = [noise[y, :, 2::-1].tobytes() for y in upward]
bgrx = [noise[y][:, [2, 1, 0, 3]].tobytes() for y in upward]
sixteen = [wide[y, :, 0].tobytes() for y in upward]
colors = lambda count: b"".join(noise.reshape(-1, 4)[n, :3].tobytes() + b"\0" for n in range(count))
ramp = lambda count: b"".join(bytes([n * 255 // (count - 1)] * 3) + b"\0" for n in range(count))
indices = lambda most: [bytes(int(value) % most for value in noise[y, :, 0]) for y in upward]
rle8 = b"".join(bytes([3, 1 + y, 2, 4 + y, 0, 3, 9, 8, 7, 0, 5, 2]) + b"\0\0" for y in range(HEIGHT - 1)) + b"\x0d\x05\0\1"
rle8_moving = bytes([4, 1, 0, 2, 3, 2, 2, 7, 0, 0, 5, 3, 0, 1])
rle4 = b"".join(bytes([5, 0x12, 0, 5, 0x34, 0x56, 0x70, 0, 3, 0x9A]) + b"\0\0" for y in range(HEIGHT)) + b"\0\1"
files |= {
    "bmp rgb": saved(rgb, "BMP"),
    "bmp grey": saved(grey, "BMP"),
    "bmp bilevel": saved(bilevel, "BMP"),
    "bmp palette": saved(many, "BMP"),
    "bmp rgba of pillow": saved(rgba, "BMP"),
    "bmp 24 from the top": bmp(bgr[::-1], 24, height=-HEIGHT),
    "bmp 32": bmp(bgrx, 32),
    "bmp 24 of OS/2": bmp(bgr, 24, header=12),
    "bmp 16, 5 bits": bmp(sixteen, 16),
    "bmp 16, 5 bits by masks": bmp(sixteen, 16, compression=3, masks=struct.pack("<III", 0x7C00, 0x3E0, 0x1F)),
    "bmp 16, 5 6 5 bits": bmp(sixteen, 16, compression=3, masks=struct.pack("<III", 0xF800, 0x7E0, 0x1F)),
    "bmp 32 by masks": bmp(bgrx, 32, compression=3, masks=struct.pack("<III", 0xFF0000, 0xFF00, 0xFF)),
    "bmp 32 by other masks": bmp(bgrx, 32, compression=3, masks=struct.pack("<III", 0xFF000000, 0xFF0000, 0xFF00)),
    "bmp 32 with alpha": bmp(
        bgrx, 32, compression=3, header=124, masks=struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    ),
    "bmp 8 of few colors": bmp(indices(5), 8, colors=colors(5), used=5),
    "bmp 4": bmp(list(packed(noise[::-1, :, 0] >> 4, 4)), 4, colors=colors(16)),
    "bmp 1": bmp(list(packed(noise[::-1, :, 0] >> 7, 1)), 1, colors=colors(2)),
    "bmp 1, white first": bmp(list(packed(noise[::-1, :, 0] >> 7, 1)), 1, colors=b"\xff\xff\xff\0\0\0\0\0"),
    "bmp 8 of OS/2": bmp(indices(256), 8, header=12, colors=noise.reshape(-1)[:468].tobytes() + bytes(300)),
    "bmp 8, a grey ramp": bmp(indices(256), 8, colors=ramp(256)),
    "bmp rle8": bmp(rle8, 8, compression=1, colors=colors(32) + bytes(896)),
    "bmp rle8 that leaves pixels out": bmp(rle8_moving, 8, compression=1, colors=colors(32) + bytes(896)),
    "bmp rle4": bmp(rle4, 4, compression=2, colors=colors(16)),
    "bmp cut short": saved(rgb, "BMP")[:-20],
    "bmp of a color beyond the palette": bmp(indices(256), 8, colors=colors(5), used=5),
}

# PNM.
text = lambda values: " ".join(str(value) for value in values).encode()
files |= {
    "ppm": saved(rgb, "PPM"),
    "pgm": saved(grey, "PPM"),
    "pbm": saved(bilevel, "PPM"),
    "pgm 16": b"P5 13 9 65535\n" + big[..., 0].tobytes(),
    "ppm 16": b"P6\n13 9\n65535\n" + big[..., :3].tobytes(),
    "pgm of 1000": b"P5 13 9 1000\n" + (wide[..., 0] % 1001).astype(">u2").tobytes(),
    "ppm of 1000": b"P6 13 9 1000\n" + (wide[..., :3] % 1001).astype(">u2").tobytes(),
    "pgm of 15": b"P5 13 9 15\n" + (noise[..., 0] >> 4).tobytes(),
    "ppm of 100": b"P6 13 9 100\n" + (noise[..., :3] % 101).tobytes(),
    "ppm above its maximum": b"P6 13 9 100\n" + noise[..., :3].tobytes(),
    "plain pbm": b"P1\n# a comment\n13 9\n" + text((noise[..., 0] & 1).ravel()) + b"\n",
    "plain pbm without spaces": b"P1 13 9\n" + b"".join(b"%d" % value for value in (noise[..., 0] & 1).ravel()),
    "plain pgm": b"P2 13 9 # maximum\n255\n" + text(noise[..., 0].ravel()) + b"\n",
    "plain ppm": b"P3\n13\n9\n255\n" + text(noise[..., :3].ravel()) + b"\n",
    "plain ppm of 7": b"P3 13 9 7 " + text((noise[..., :3] & 7).ravel()),
    "plain pgm 16": b"P2 13 9 65535\n" + text(wide[..., 0].ravel()) + b"\n",
    "ppm with a comment": b"P6\n# GIMP\n13 9\n# more\n255\n" + noise[..., :3].tobytes(),
    "ppm cut short": saved(rgb, "PPM")[:-20],
    "pam": b"P7\nWIDTH 13\nHEIGHT 9\nDEPTH 3\nMAXVAL 255\nTUPLTYPE RGB\nENDHDR\n" + noise[..., :3].tobytes(),
    "pfm": b"Pf\n13 9\n-1.0\n" + (wide[..., 0] / 100).astype("<f4").tobytes(),
}

# GIF.


def gif(*parts, size=(WIDTH, HEIGHT), colors=b"", background=0, end=b";"):
    flags = 0x80 | ((len(colors) // 3).bit_length() - 2) if colors else 0
    return b"GIF89a" + struct.pack("<HHBBB", *size, flags, background, 0) + colors + b"".join(parts) + end


def frame(left, top, image, colors=b"", interlaced=False):
    """Returns the frame of Pillow's file for an image of indices, at another position."""
    plain = saved(image, "GIF", interlace=interlaced, optimize=False)
    at = plain.index(b",", 13 + 768)
    flags = (0x40 if interlaced else 0) | (0x80 | ((len(colors) // 3).bit_length() - 2) if colors else 0)
    return b"," + struct.pack("<HHHHB", left, top, *image.size, flags) + colors + plain[at + 10 : -1]


control = lambda flags, transparent=0: b"!\xf9\4" + bytes([flags, 0, 0, transparent]) + b"\0"
indexed = Image.fromarray(noise[..., 0], "P")
indexed.putpalette(noise.reshape(-1)[:384].tobytes() * 2)
corner = indexed.crop((0, 0, 7, 5))
table = noise[::-1].reshape(-1).tobytes()[:384] * 2
files |= {
    "gif": saved(rgb, "GIF"),
    "gif grey": saved(grey, "GIF"),
    "gif interlaced": gif(frame(0, 0, indexed, interlaced=True), colors=table),
    "gif with transparency": gif(control(1, int(noise[0, 0, 0])), frame(0, 0, indexed), colors=table),
    "gif smaller than its screen": gif(frame(3, 2, corner), colors=table, background=9),
    "gif smaller than its screen, transparent": gif(control(1, 5), frame(3, 2, corner), colors=table, background=9),
    "gif larger than its screen": gif(frame(0, 0, indexed), colors=table, size=(7, 5)),
    "gif of own colors": gif(frame(0, 0, indexed, colors=table)),
    "gif of own colors instead": gif(frame(0, 0, indexed, colors=table), colors=table[::-1]),
    "gif without colors": gif(frame(0, 0, indexed)),
    "gif animated": gif(frame(0, 0, indexed), control(4), frame(3, 2, corner), colors=table),
    "gif with a comment": gif(b"!\xfe\5hello\0", frame(0, 0, indexed), colors=table),
    "gif without end": gif(frame(0, 0, indexed), colors=table, end=b""),
    "gif cut short": gif(frame(0, 0, indexed), colors=table)[:-30],
    "gif of a color beyond the table": gif(frame(0, 0, indexed), colors=table[:48]),
    "gif without image": gif(colors=table),
}

# TIFF.


def tiff(tags, *strips, order="<"):
    """Returns a TIFF file; `tags` maps a number to type and values."""
    tags = {**tags, 273: (4, [0] * len(strips)), 279: (4, [len(strip) for strip in strips])}
    sizes = {3: ("H", 2), 4: ("I", 4)}
    base = 8 + 2 + 12 * len(tags) + 4
    extras = [sizes[kind][1] * len(values) for kind, values in tags.values()]
    data = base + sum(extra for extra in extras if extra > 4)
    tags[273] = (4, [data + sum(map(len, strips[:number])) for number in range(len(strips))])
    entries, extra = b"", b""
    for number, (kind, values) in sorted(tags.items()):
        raw = struct.pack(f"{order}{len(values)}{sizes[kind][0]}", *values)
        if len(raw) > 4:
            place, extra = base + len(extra), extra + raw
            raw = struct.pack(order + "I", place)
        entries += struct.pack(order + "HHI", number, kind, len(values)) + raw.ljust(4, b"\0")
    start = b"II*\0" if order == "<" else b"MM\0*"
    return start + struct.pack(order + "IH", 8, len(tags)) + entries + bytes(4) + extra + b"".join(strips)


def tags(bits, photometric, compression=1, **more):
    base = {256: (4, [WIDTH]), 257: (4, [HEIGHT]), 258: (3, bits), 259: (3, [compression]), 262: (3, [photometric])}
    return {**base, 277: (3, [len(bits)]), 278: (4, [HEIGHT]), **more.get("also", {})}


orientation = lambda value: {274: (3, [value])}
files |= {
    "tiff": saved(rgb, "TIFF"),
    "tiff lzw": saved(rgb, "TIFF", compression="tiff_lzw"),
    "tiff deflate": saved(rgb, "TIFF", compression="tiff_adobe_deflate"),
    "tiff packbits": saved(rgb, "TIFF", compression="packbits"),
    "tiff jpeg": saved(rgb, "TIFF", compression="jpeg", quality=90),
    "tiff grey": saved(grey, "TIFF"),
    "tiff grey lzw": saved(grey, "TIFF", compression="tiff_lzw"),
    "tiff grey jpeg": saved(grey, "TIFF", compression="jpeg", quality=90),
    "tiff bilevel": saved(bilevel, "TIFF"),
    "tiff group 4": saved(bilevel, "TIFF", compression="group4"),
    "tiff group 3": saved(bilevel, "TIFF", compression="group3"),
    "tiff palette": saved(many, "TIFF"),
    "tiff rgba": saved(rgba, "TIFF"),
    "tiff cmyk": saved(rgb.convert("CMYK"), "TIFF"),
    "tiff lab": saved(rgb.convert("LAB"), "TIFF"),
    "tiff grey alpha": saved(rgba.convert("LA"), "TIFF"),
    "tiff grey 16": saved(Image.fromarray(wide[..., 0]), "TIFF"),
    "tiff float": saved(Image.fromarray((wide[..., 0] / 100).astype(np.float32)), "TIFF"),
    "tiff int": saved(Image.fromarray(wide[..., 0].astype(np.int32)), "TIFF"),
    "tiff of two pages": saved(rgb, "TIFF", save_all=True, append_images=[grey]),
    "tiff big": saved(rgb, "TIFF", big_tiff=True),
    "tiff zstd": saved(rgb, "TIFF", compression="zstd"),
    "tiff lzma": saved(rgb, "TIFF", compression="lzma"),
    "tiff of the motorola order": tiff(tags([8, 8, 8], 2), noise[..., :3].tobytes(), order=">"),
    "tiff rgb 16": tiff(tags([16, 16, 16], 2), wide[..., :3].tobytes()),
    "tiff rgb 16 of the motorola order": tiff(tags([16, 16, 16], 2), big[..., :3].tobytes(), order=">"),
    "tiff grey 16 of the motorola order": tiff(tags([16], 1), big[..., 0].tobytes(), order=">"),
    "tiff white is zero": tiff(tags([8], 0), noise[..., 0].tobytes()),
    "tiff grey 4": tiff(tags([4], 1), b"".join(packed(noise[..., 0] >> 4, 4))),
    "tiff palette 4": tiff(
        tags([4], 3, also={320: (3, [int(v) for v in wide.ravel()[:48]])}), b"".join(packed(noise[..., 0] >> 4, 4))
    ),
    "tiff in planes": tiff(tags([8, 8, 8], 2, also={284: (3, [2])}), *(noise[..., n].tobytes() for n in range(3))),
    "tiff of two strips": tiff(
        {**tags([8, 8, 8], 2), 278: (4, [5])}, noise[:5, :, :3].tobytes(), noise[5:, :, :3].tobytes()
    ),
    "tiff cut short": tiff(tags([8, 8, 8], 2), noise[..., :3].tobytes())[:-20],
    "tiff premultiplied": tiff(tags([8, 8, 8, 8], 2, also={338: (3, [1])}), noise.tobytes()),
    "tiff of an unused channel": tiff(tags([8, 8, 8, 8], 2, also={338: (3, [0])}), noise.tobytes()),
} | {
    f"tiff orientation {value}": tiff(tags([8, 8, 8], 2, also=orientation(value)), noise[..., :3].tobytes()) for value in range(2, 9)
}

# JPEG files that violate the standard, or omit optional parts.

jpeg = saved(rgb, "JPEG", quality=85)


def segments(file):
    """Splits a file into the segments up to its first scan, with their markers, and the rest."""
    at, found = 2, []
    while file[at + 1] != 0xDA:
        length = 2 + int.from_bytes(file[at + 2 : at + 4], "big")
        found.append(file[at : at + length])
        at += length
    return found, file[at:]


parts, scan = segments(jpeg)
joined = lambda parts, scan: b"\xff\xd8" + b"".join(parts) + scan
codes = [part for part in parts if part[1] == 0xC4]


def lookup(segment):
    """Returns a table from symbols to codes, as strings of bits."""
    counts, symbols, code, found = segment[5:21], iter(segment[21:]), 0, {}
    for length, count in enumerate(counts, 1):
        for _ in range(count):
            found[next(symbols)] = format(code, f"0{length}b")
            code += 1
        code <<= 1
    return found


def number(value):
    size = abs(value).bit_length()
    return size, format(value if value > 0 else value + (1 << size) - 1, f"0{size}b") if size else ""


def entropy(bits):
    bits += "1" * (-len(bits) % 8)
    return b"".join(bytes([value, 0] if value == 255 else [value]) for value in (int(bits[at : at + 8], 2) for at in range(0, len(bits), 8)))


def progressive(width, height, blocks, last, low=0):
    """Returns a gray image: a DC scan, and a scan of coefficients 1 to `last` whose `low` bits are never sent."""
    header = b"\xff\xc2\0\x0b\x08" + struct.pack(">HHB", height, width, 1) + b"\1\x11\0"
    steps = b"\xff\xdb\0\x43\0" + bytes(range(3, 67))
    mean, other = lookup(codes[0]), lookup(codes[1])
    before, means, others = 0, "", ""
    for block in blocks:
        size, bits = number(block[0] - before)
        means, before = means + mean[size] + bits, block[0]
        run = 0
        for value in block[1 : last + 1]:
            value = (abs(value) >> low) * (1 if value > 0 else -1)
            if value == 0:
                run += 1
                continue
            others += other[0xF0] * (run // 16)
            size, bits = number(value)
            others, run = others + other[(run % 16) << 4 | size] + bits, 0
        others += other[0] if run else ""
    scans = b"\xff\xda\0\x08\1\1\0\0\0\0" + entropy(means)
    scans += b"\xff\xda\0\x08\1\1\0\1" + bytes([last, low]) + entropy(others)
    return b"\xff\xd8" + steps + header + codes[0] + codes[1] + scans + b"\xff\xd9"


blocks = [[int(value) for value in rng.integers(-6, 7, 64)] for _ in range(4)]
stray = [piece for part in parts for piece in (part, b"stray")]
files |= {
    "jpeg with bytes between segments": joined(stray, scan),
    "jpeg with a value between segments": joined([parts[0], b"\xff\0", *parts[1:]], scan),
    "jpeg with bytes before its frame": joined([*parts[:-1], b"\0" * 40, parts[-1]], scan),
    "jpeg without codes": joined([part for part in parts if part[1] != 0xC4], scan),
    "jpeg grey without codes": joined(*(lambda p, s: ([part for part in p if part[1] != 0xC4], s))(*segments(saved(grey, "JPEG")))),
    "jpeg of half its codes": joined([part for part in parts if part not in codes[2:]], scan),
    "jpeg progressive of 63 coefficients": progressive(13, 9, blocks, 63),
    "jpeg progressive of 20 coefficients": progressive(13, 9, blocks, 20),
    "jpeg progressive of 9 coefficients": progressive(13, 9, blocks, 9),
    "jpeg progressive of 5 coefficients": progressive(13, 9, blocks, 5),
    "jpeg progressive without the last bit": progressive(13, 9, blocks, 63, 1),
}

results, refused = {}, {}
for name, file in files.items():
    results[f"{name} file"] = np.frombuffer(file, np.uint8)
    try:
        results[f"{name} pixels"] = np.asarray(Image.open(io.BytesIO(file)).convert("RGB")).copy()
    except Exception as error:  # Pillow refuses the file, for any reason.
        refused[name] = f"{type(error).__name__}: {error}"

if __name__ == "__main__":
    for name, error in refused.items():
        print(f"refused: {name}: {error}")
    versions = {"pillow": PIL.__version__, "libtiff": PIL.features.version("libtiff"), "zlib": PIL.features.version("zlib")}
    save_file(results, "formats.safetensors", metadata={"versions": json.dumps(versions)})
