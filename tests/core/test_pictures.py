"""Pictures that strangers send, and what may be asked of a model that makes them."""

import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
from msgspec import structs
from PIL import Image, PngImagePlugin

from fairlead.core.errors import InvalidRequest, TooLarge, Unsupported
from fairlead.core.generation import ImageInfo, Lora, Paint
from fairlead.core.pictures import (
    MAX_INPUT_PIXELS,
    check,
    decode,
    decode_image,
    decode_mask,
    encode,
    metadata_of,
    num_computed,
    preview,
    read_header,
    seed_of,
)

INFO = ImageInfo(
    family="sd",
    width=512,
    height=256,
    multiple=8,
    max_pixels=1 << 20,
    num_steps=20,
    max_steps=100,
    guidance=7.5,
    schedulers=("ddim", "euler"),
    inputs=("text", "image", "mask"),
    loras=("ink",),
)
BARE = ImageInfo(
    family="whole",
    width=64,
    height=64,
    multiple=16,
    max_pixels=4096,
    num_steps=4,
    max_steps=8,
    guidance=0.0,
    has_guidance=False,
    has_negative=False,
    previews=False,
)
FORMATS = ("png", "jpeg", "webp")


def ramp(width=32, height=16):
    """Grows from left to right."""
    return np.broadcast_to(np.linspace(0, 255, width).astype(np.uint8)[None, :, None], (height, width, 3)).copy()


def saved(image, format, **options):
    out = BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(width, height, data=b""):
    """A PNG that says it is so large."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def picture(format="png", width=32, height=16):
    return encode(ramp(width, height), format)


# What comes


@pytest.mark.parametrize("format", FORMATS)
def test_a_header_tells_kind_and_size_and_the_pixels_come_as_they_were_sent(format):
    data = picture(format)
    header = read_header(data, "image")
    assert (header.format, header.width, header.height) == (format, 32, 16)
    assert np.abs(decode_image(data, "image", 32, 16).astype(int) - ramp()).max() <= (0 if format == "png" else 12)


@pytest.mark.parametrize("options", [{"lossless": True}, {"lossless": False}, {"exif": b"Exif\0\0"}])
def test_every_form_of_webp_tells_its_size(options):
    data = saved(Image.fromarray(ramp()), "WEBP", **options)
    assert (read_header(data, "image").width, read_header(data, "image").height) == (32, 16)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "must be a PNG, JPEG or WebP picture"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "must be a PNG, JPEG or WebP picture"),
        (b"<?xml version='1.0'?><svg/>", "must be a PNG, JPEG or WebP picture"),
        (b"GIF89a" + b"\0" * 40, "must be a PNG, JPEG or WebP picture"),
        (b"%PDF-1.7 \x89PNG\r\n\x1a\n", "must be a PNG, JPEG or WebP picture"),
        (b"\x89PNG\r\n\x1a\n", "is cut short"),
        (b"\x89PNG\r\n\x1a\n" + chunk(b"tEXt", b"no size"), "does not begin with its size"),
        (png_of(0, 5), "has no size"),
        (b"\xff\xd8\xff\xe0\x00\x10JFIF\xff\xd9", "is cut short"),
        (b"\xff\xd8\xff\xd9", "does not tell its size"),
        (b"\xff\xd8\xff\xe0\x00\x02<script>\xff\xd9", "segments do not follow"),
        (b"RIFF\x04\0\0\0WEBP", "is no WebP picture"),
    ],
)
def test_what_is_no_picture_is_refused_by_name(data, why):
    with pytest.raises(InvalidRequest, match=f"`mask` .*{why}"):
        read_header(data, "mask")


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_with_another_behind_it_is_refused(format):
    with pytest.raises(InvalidRequest, match="has other data behind the picture's end"):
        read_header(picture(format) + b"PK\x05\x06" + b"<script>alert(1)</script>", "image")


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_cut_anywhere_is_refused_and_nothing_else_is_raised(format):
    data = picture(format)
    for end in range(len(data)):
        with pytest.raises(InvalidRequest):
            decode(data[:end], "image")


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_with_any_byte_changed_is_decoded_or_refused(format):
    data = picture(format)
    for at in range(len(data)):
        broken = data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]
        try:
            pixels = decode_image(broken, "image", 32, 16)
        except InvalidRequest:
            continue
        assert pixels.shape == (16, 32, 3)


def test_a_decompression_bomb_is_refused_before_anything_is_decoded():
    with pytest.raises(TooLarge, match=f"50000x50000 pixels, and at most {MAX_INPUT_PIXELS}"):
        decode(png_of(50_000, 50_000, bytes(1000)), "image")
    texts = PngImagePlugin.PngInfo()
    texts.add_text("bomb", "0" * (2 << 20), zip=True)
    with pytest.raises(InvalidRequest, match="`image` cannot be decoded"):
        decode(saved(Image.fromarray(ramp()), "PNG", pnginfo=texts), "image")


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_an_animation_is_refused(format):
    frames = [Image.fromarray(ramp()), Image.fromarray(255 - ramp())]
    with pytest.raises(InvalidRequest, match="is animated"):
        read_header(saved(frames[0], format, save_all=True, append_images=frames[1:]), "image")


def test_a_photo_taken_upright_is_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = saved(Image.fromarray(ramp()), "JPEG", exif=exif)
    assert (read_header(data, "image").width, read_header(data, "image").height) == (16, 32)
    turned = decode_image(data, "image", 16, 32)
    assert turned[0].mean() < 30 and turned[-1].mean() > 225


def test_transparency_is_white_in_a_picture_and_black_in_a_mask():
    clear = saved(Image.new("RGBA", (8, 8), (10, 20, 30, 0)), "PNG")
    assert (decode_image(clear, "image", 8, 8) == 255).all()
    assert (decode_mask(clear, "mask", 8, 8) == 0).all()


def test_grey_of_sixteen_bits_keeps_its_shades():
    deep = (np.linspace(0, 65535, 32).astype(np.uint16)[None, :]).repeat(16, axis=0)
    pixels = decode_image(saved(Image.fromarray(deep), "PNG"), "image", 32, 16)
    assert np.abs(pixels[0, :, 0].astype(int) - np.linspace(0, 255, 32)).max() <= 2


def test_another_size_is_filled_without_being_squeezed():
    """A square of black and white halves, cut to half its height, keeps its halves."""
    square = np.zeros((64, 64, 3), np.uint8)
    square[:, 32:] = 255
    pixels = decode_image(encode(square, "png"), "image", 32, 16)
    assert pixels.shape == (16, 32, 3) and pixels[:, :14].max() < 8 and pixels[:, 18:].min() > 247


# What goes


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_says_how_it_was_made(format):
    told = {"seed": 7, "model": "digits@3", "guidance": 7.5}
    data = encode(ramp(), format, metadata=told)
    assert metadata_of(data) == told and metadata_of(picture(format)) == {}
    assert read_header(data, "image").format == format


def test_a_preview_is_a_small_jpeg():
    header = read_header(preview(ramp(1024, 512)), "image")
    assert (header.format, header.width, header.height) == ("jpeg", 256, 128)


# What is asked


def test_what_is_left_open_is_what_the_model_says():
    paint = check(Paint(text="a seven"), INFO)
    assert (paint.width, paint.height, paint.num_steps, paint.guidance, paint.scheduler, paint.strength) == (
        512,
        256,
        20,
        7.5,
        "ddim",
        None,
    )
    assert check(paint, INFO) == paint and num_computed(paint) == 20


def test_a_picture_to_begin_from_gives_its_size_and_a_share_of_the_steps():
    paint = check(Paint(text="a seven", image=picture(width=100, height=60)), INFO)
    assert (paint.width, paint.height, paint.strength, num_computed(paint)) == (96, 56, 0.8, 16)
    large = check(Paint(text="a seven", image=picture(width=3000, height=1500)), INFO)
    assert large.width * large.height <= INFO.max_pixels and large.width / large.height == pytest.approx(2, rel=0.02)
    tiny = check(Paint(text="a seven", image=picture(width=3, height=3)), INFO)
    assert (tiny.width, tiny.height) == (8, 8)
    masked = check(Paint(text="a seven", image=picture(), mask=picture(), width=64), INFO)
    assert (masked.width, masked.height, masked.strength) == (64, 256, 1.0)


@pytest.mark.parametrize(
    ("fields", "error", "said"),
    [
        ({"width": 100}, InvalidRequest, "`width` must be a multiple of 8, and 100 is not: 96 or 104 is"),
        ({"height": 4}, InvalidRequest, "`height` must be a multiple of 8, and 4 is not: 8 is"),
        ({"width": 4096, "height": 4096}, InvalidRequest, "`width` times `height` is 16777216 pixels"),
        ({"num_steps": 101}, InvalidRequest, "`num_steps` must be at most 100"),
        ({"scheduler": "magic"}, InvalidRequest, "`scheduler` 'magic' is unknown; one of ddim, euler"),
        ({"loras": (Lora(name="oil"),)}, InvalidRequest, "`loras`: 'oil' is unknown; one of ink"),
        ({"loras": (Lora(name="ink"), Lora(name="ink"))}, InvalidRequest, "`loras` names one twice"),
        ({"mode": "turbo"}, Unsupported, "`mode` 'turbo': this model computes in one of exact"),
        ({"image": b"<svg/>"}, InvalidRequest, "`image` must be a PNG, JPEG or WebP"),
        ({"image": picture(), "mask": b"PK"}, InvalidRequest, "`mask` must be a PNG, JPEG or WebP"),
        ({"image": picture(), "strength": 0.04}, InvalidRequest, "`strength` of 0.04 leaves none of 20 steps"),
    ],
)
def test_what_cannot_be_made_is_refused_by_the_field(fields, error, said):
    with pytest.raises(error, match=said):
        check(Paint(text="a seven", **fields), INFO)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"image": picture()}, "`image`: this model begins from text only"),
        ({"guidance": 2.0}, "`guidance`: this model has none"),
        ({"negative": "blur"}, "`negative`: this model has no guidance"),
        ({"preview_steps": 2}, "`preview_steps`: this model gives no previews"),
    ],
)
def test_what_a_model_has_not_is_not_ignored(fields, said):
    with pytest.raises(Unsupported, match=said):
        check(Paint(text="a seven", **fields), BARE)
    with pytest.raises(InvalidRequest, match="'euler' is unknown; this model has none"):
        check(Paint(text="a seven", scheduler="euler"), BARE)


def test_a_model_that_only_changes_pictures_needs_one():
    inpainting = structs.replace(INFO, inputs=("image", "mask"))
    for fields, name in (({}, "image"), ({"image": picture()}, "mask")):
        with pytest.raises(InvalidRequest, match=f"`{name}` is missing: this model begins from image and mask"):
            check(Paint(text="a seven", **fields), inpainting)
    assert check(Paint(text="a seven", image=picture(), mask=picture()), inpainting).strength == 1.0


def test_pictures_of_one_request_have_seeds_that_follow():
    paint = Paint(text="a seven", seed=(1 << 63) - 1)
    assert [seed_of(paint, index) for index in range(3)] == [(1 << 63) - 1, 0, 1]
