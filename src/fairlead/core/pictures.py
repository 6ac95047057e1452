"""Pictures as files, and what may be asked of a model that makes them: pure, the same at a door and in an engine."""

import json
import secrets
from collections.abc import Callable
from io import BytesIO
from typing import Any, NoReturn

import numpy as np
from msgspec import Struct, structs
from numpy.typing import NDArray
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from fairlead.core.errors import InvalidRequest, TooLarge, Unsupported
from fairlead.core.generation import ImageInfo, Paint, PictureFormat

Pixels = NDArray[np.uint8]
"""[height, width, 3], or [height, width] of a mask."""

MAX_INPUT_PIXELS = 32 << 20
"""Of a picture that is sent: what a camera makes, and small enough to be decoded."""
PREVIEW_SIZE = 256
"""Pixels of a preview's longer side, at most."""
PREVIEW_QUALITY = 70
IMAGE_STRENGTH, MASK_STRENGTH = 0.8, 1.0
NUM_SEEDS = 1 << 63

EXIF_DESCRIPTION, EXIF_ORIENTATION, EXIF_SOFTWARE = 0x010E, 0x0112, 0x0131
PNG_KEY = "fairlead"

Refuse = Callable[[str], NoReturn]

CONTENT_TYPES: dict[PictureFormat, str] = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}


class Header(Struct, frozen=True):
    """What the first bytes of a picture's file tell."""

    format: PictureFormat
    width: int
    """As it is looked at: a camera may have been held upright."""
    height: int


# What is asked


def check(paint: Paint, info: ImageInfo) -> Paint:
    """The request with every default filled in but the seed. Raises InvalidRequest where a value is wrong, Unsupported where the
    model cannot do what is asked; both name the field."""
    given = _given(paint, info)
    width, height = paint.width, paint.height
    if given is not None and width is None and height is None:
        width, height = _size_like(given, info)
    width, height = width or info.width, height or info.height
    for name, size in (("width", width), ("height", height)):
        if size % info.multiple:
            below = size - size % info.multiple
            near = f"{below} or {below + info.multiple}" if below else str(info.multiple)
            raise InvalidRequest(f"`{name}` must be a multiple of {info.multiple}, and {size} is not: {near} is")
    if width * height > info.max_pixels:
        raise InvalidRequest(
            f"`width` times `height` is {width * height} pixels ({width}x{height}), and this model makes at most {info.max_pixels}"
        )
    num_steps = paint.num_steps or info.num_steps
    if num_steps > info.max_steps:
        raise InvalidRequest(f"`num_steps` must be at most {info.max_steps} for this model, and {num_steps} were asked for")
    strength = paint.strength
    if paint.image:
        strength = strength or (MASK_STRENGTH if paint.mask else IMAGE_STRENGTH)
        if int(num_steps * strength) < 1:
            raise InvalidRequest(f"`strength` of {strength} leaves none of {num_steps} steps to compute: raise it, or `num_steps`")
    _check_means(paint, info)
    return structs.replace(
        paint,
        width=width,
        height=height,
        num_steps=num_steps,
        guidance=info.guidance if paint.guidance is None else paint.guidance,
        scheduler=paint.scheduler or next(iter(info.schedulers), ""),
        strength=strength,
    )


def _given(paint: Paint, info: ImageInfo) -> Header | None:
    """Of the picture that it begins from."""
    for name, data in (("image", paint.image), ("mask", paint.mask)):
        if data and name not in info.inputs:
            raise Unsupported(f"`{name}`: this model begins from {' and '.join(info.inputs)} only")
        if not data and name in info.inputs and "text" not in info.inputs:
            raise InvalidRequest(f"`{name}` is missing: this model begins from {' and '.join(info.inputs)}")
    if paint.mask:
        read_header(paint.mask, "mask")
    return read_header(paint.image, "image") if paint.image else None


def _check_means(paint: Paint, info: ImageInfo) -> None:
    """Whether the model has what is asked for by name."""
    if paint.guidance is not None and not info.has_guidance:
        raise Unsupported("`guidance`: this model has none")
    if paint.negative and not info.has_negative:
        raise Unsupported("`negative`: this model has no guidance that a negative prompt could steer")
    if paint.scheduler and paint.scheduler not in info.schedulers:
        raise InvalidRequest(f"`scheduler` {paint.scheduler!r} is unknown; {_choices(info.schedulers)}")
    for lora in paint.loras:
        if lora.name not in info.loras:
            raise InvalidRequest(f"`loras`: {lora.name!r} is unknown; {_choices(info.loras)}")
    if len({lora.name for lora in paint.loras}) < len(paint.loras):
        raise InvalidRequest("`loras` names one twice")
    if paint.mode not in info.modes:
        raise Unsupported(f"`mode` {paint.mode!r}: this model computes in {_choices(info.modes)}")
    if paint.preview_steps and not info.previews:
        raise Unsupported("`preview_steps`: this model gives no previews")


def _choices(names: tuple[str, ...]) -> str:
    return f"one of {', '.join(names)}" if names else "this model has none"


def _size_like(header: Header, info: ImageInfo) -> tuple[int, int]:
    """The size nearest to a given picture's that the model makes."""
    shrink = min(1.0, (info.max_pixels / (header.width * header.height)) ** 0.5)
    width, height = (max(int(side * shrink) // info.multiple, 1) * info.multiple for side in (header.width, header.height))
    return width, height


def num_computed(paint: Paint) -> int:
    """Steps that are computed for each picture of a request that was checked."""
    assert paint.num_steps is not None
    return int(paint.num_steps * paint.strength) if paint.strength is not None else paint.num_steps


def random_seed() -> int:
    """Small enough for every client's idea of an integer."""
    return secrets.randbits(32)


def seed_of(paint: Paint, index: int) -> int:
    """Of picture `index`."""
    assert paint.seed is not None
    return (paint.seed + index) % NUM_SEEDS


# Files that come


def read_header(data: bytes, field: str) -> Header:
    """Kind and size by the file's structure alone: cheap, nothing is decoded. Raises InvalidRequest, naming `field`, for what is no
    PNG, JPEG or WebP, is cut short, has something else behind it, or is too large to be decoded."""

    def refuse(why: str) -> NoReturn:
        raise InvalidRequest(f"`{field}` {why}")

    try:
        if data.startswith(b"\x89PNG\r\n\x1a\n"):
            header = _png_header(data, refuse)
        elif data.startswith(b"\xff\xd8\xff"):
            header = _jpeg_header(data, refuse)
        elif data.startswith(b"RIFF") and data[8:12] == b"WEBP":
            header = _webp_header(data, refuse)
        else:
            refuse("must be a PNG, JPEG or WebP picture")
    except IndexError:
        refuse("is cut short")
    if not (header.width and header.height):
        refuse("has no size")
    if header.width * header.height > MAX_INPUT_PIXELS:
        raise TooLarge(f"`{field}` has {header.width}x{header.height} pixels, and at most {MAX_INPUT_PIXELS} are taken")
    if header.format == "jpeg" and _turned(data, refuse):
        header = Header(header.format, header.height, header.width)
    return header


def _png_header(data: bytes, refuse: Refuse) -> Header:
    at, size = 8, (0, 0)
    while True:
        length, kind = _number(data, at, 4), data[at + 4 : at + 8]
        if at == 8:
            if kind != b"IHDR":
                refuse("is no PNG: it does not begin with its size")
            size = _number(data, at + 8, 4), _number(data, at + 12, 4)
        elif kind == b"acTL":
            refuse("is animated: a still picture is needed")
        at += 12 + length
        if at > len(data):
            raise IndexError
        if kind == b"IEND":
            break
    if at != len(data):
        refuse("has other data behind the picture's end")
    return Header("png", *size)


def _jpeg_header(data: bytes, refuse: Refuse) -> Header:
    if not data.rstrip(b"\0").endswith(b"\xff\xd9"):
        refuse("is cut short, or has other data behind the picture's end")
    at = 2
    while True:
        if data[at] != 0xFF:
            refuse("is no JPEG: its segments do not follow each other")
        kind = data[at + 1]
        if kind == 0xFF:  # filling
            at += 1
        elif 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):
            return Header("jpeg", _number(data, at + 7, 2), _number(data, at + 5, 2))
        elif kind in (0xD9, 0xDA):
            refuse("is no JPEG: it does not tell its size")
        else:
            at += 2 + (0 if kind == 0x01 or 0xD0 <= kind <= 0xD7 else max(_number(data, at + 2, 2), 2))


def _webp_header(data: bytes, refuse: Refuse) -> Header:
    end = 8 + int.from_bytes(data[4:8], "little")
    if end > len(data):
        raise IndexError
    if end + end % 2 < len(data):
        refuse("has other data behind the picture's end")
    kind = data[12:16]
    if kind == b"VP8X":
        if data[20] & 2:
            refuse("is animated: a still picture is needed")
        return Header("webp", _number(data, 24, 3, "little") + 1, _number(data, 27, 3, "little") + 1)
    if kind == b"VP8L":
        bits = _number(data, 21, 4, "little")
        return Header("webp", (bits & 0x3FFF) + 1, ((bits >> 14) & 0x3FFF) + 1)
    if kind == b"VP8 ":
        return Header("webp", _number(data, 26, 2, "little") & 0x3FFF, _number(data, 28, 2, "little") & 0x3FFF)
    refuse("is no WebP picture")


def _number(data: bytes, at: int, length: int, order: Any = "big") -> int:
    part = data[at : at + length]
    if len(part) < length:
        raise IndexError
    return int.from_bytes(part, order)


def _turned(data: bytes, refuse: Refuse) -> bool:
    """Whether a viewer turns it by a quarter."""
    try:
        with Image.open(BytesIO(data), formats=("JPEG", "MPO")) as image:
            return int(image.getexif().get(EXIF_ORIENTATION, 1)) >= 5
    except Exception as error:  # of a stranger's bytes, a decoder may say anything
        refuse(f"cannot be read: {error}")


def decode(data: bytes, field: str) -> Image.Image:
    """Its pixels, turned as they are looked at: mode RGB, or RGBA where some are transparent. Raises InvalidRequest, naming `field`."""
    header = read_header(data, field)
    formats = {"png": ("PNG",), "jpeg": ("JPEG", "MPO"), "webp": ("WEBP",)}[header.format]
    try:
        with Image.open(BytesIO(data), formats=formats) as image:
            if sorted(image.size) != sorted((header.width, header.height)):  # turned or not
                raise ValueError("its parts tell different sizes")
            turned = ImageOps.exif_transpose(_eight_bit(image))
            return turned.convert("RGBA" if turned.has_transparency_data else "RGB")
    except Exception as error:  # of a stranger's bytes, a decoder may say anything
        raise InvalidRequest(f"`{field}` cannot be decoded: {error}") from None


def _eight_bit(image: Image.Image) -> Image.Image:
    """Pillow cuts off grey values above 255 where it should scale them."""
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray((np.asarray(image, np.uint32) >> 8).clip(0, 255).astype(np.uint8))


def decode_image(data: bytes, field: str, width: int, height: int) -> Pixels:
    """To begin from: scaled to cover `width` x `height`, what is over is cut off; white where it was transparent. [height, width, 3]."""
    image = decode(data, field)
    if image.mode == "RGBA":
        ground = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(ground, image).convert("RGB")
    return np.array(ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS))


def decode_mask(data: bytes, field: str, width: int, height: int) -> Pixels:
    """White where it is painted anew; what is transparent counts as black. [height, width]."""
    image = decode(data, field)
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
    return np.array(ImageOps.fit(image.convert("L"), (width, height), Image.Resampling.BILINEAR))


# Files that go


def encode(pixels: Pixels, format: PictureFormat, *, quality: int = 90, metadata: dict[str, Any] | None = None) -> bytes:
    """A file with `metadata` inside, as JSON: a text chunk of PNG, the description in the EXIF of JPEG and WebP."""
    image, out = Image.fromarray(pixels), BytesIO()
    text = json.dumps(metadata) if metadata else ""
    if format == "png":
        chunks = PngInfo()
        if text:
            chunks.add_text("Software", "Fairlead")
            chunks.add_text(PNG_KEY, text)
        image.save(out, "PNG", pnginfo=chunks, compress_level=4)  # half the time of the default, a few percent larger
        return out.getvalue()
    exif = Image.Exif()
    if text:
        exif[EXIF_SOFTWARE], exif[EXIF_DESCRIPTION] = "Fairlead", text
    if format == "jpeg":
        image.save(out, "JPEG", quality=quality, exif=exif)
    else:
        image.save(out, "WEBP", quality=quality, exif=exif)
    return out.getvalue()


def metadata_of(data: bytes) -> dict[str, Any]:
    """What `encode` put into a file; nothing where it was another's."""
    with Image.open(BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as image:
        text = image.info.get(PNG_KEY) if image.format == "PNG" else image.getexif().get(EXIF_DESCRIPTION)
    try:
        found = json.loads(text or "")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def preview(pixels: Pixels) -> bytes:
    """A small JPEG."""
    image, out = Image.fromarray(pixels), BytesIO()
    image.thumbnail((PREVIEW_SIZE, PREVIEW_SIZE))
    image.save(out, "JPEG", quality=PREVIEW_QUALITY)
    return out.getvalue()
