"""Any image file becomes a square of bytes, or is refused in words."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from mibench.data.images import Decoder, UnfitImageError

SIZE = 16


def decode(data, size=SIZE, **how):
    image = Decoder(size, **how)(data)
    assert image.shape == (3, size, size)
    assert str(image.dtype) == "torch.uint8"
    return image.permute(1, 2, 0).numpy()


def test_an_image_of_the_right_size_keeps_every_bit(draw, png):
    picture = draw(0, SIZE)
    for kind, how in (("PNG", {}), ("WEBP", {"lossless": True}), ("BMP", {}), ("TIFF", {})):
        assert np.array_equal(decode(png(picture, kind, **how)), picture)


def test_a_file_and_its_bytes_are_the_same(tmp_path, draw, png):
    data = png(draw(1, 40))
    (tmp_path / "x.png").write_bytes(data)
    assert np.array_equal(decode(tmp_path / "x.png"), decode(data))


@pytest.mark.parametrize("mode", ["L", "P", "1", "RGB", "RGBA", "LA", "CMYK", "YCbCr", "I;16"])
def test_every_mode_becomes_rgb(mode, draw, png):
    grey = Image.fromarray(draw(2, SIZE)).convert("L")
    if mode == "I;16":
        source = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
        assert source.mode == mode
    else:
        source = grey.convert("RGB").convert(mode)
    found = decode(png(source, "JPEG" if mode in ("CMYK", "YCbCr") else "TIFF", quality=100)
                   if mode not in ("P", "PA") else png(source)).astype(int)  # fmt: skip
    wanted = np.asarray(source.convert("RGB") if mode != "I;16" else grey.convert("RGB"))
    assert np.abs(found - wanted.astype(int)).mean() < (4 if mode in ("CMYK", "YCbCr") else 1e-9)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_greys_of_16_bits_are_scaled_and_not_cut_off(kind, png):
    wide = np.linspace(0, 65535, SIZE * SIZE).reshape(SIZE, SIZE).round().astype(np.uint16)
    found = decode(png(wide, kind))
    assert np.array_equal(found[..., 0], np.round(wide / 257).astype(np.uint8))
    assert (found[..., 0] == found[..., 2]).all()


def test_whole_numbers_of_32_bits_are_read_as_16(png):
    wide = np.full((SIZE, SIZE), 65535, np.int32)
    assert decode(png(Image.fromarray(wide), "TIFF")).min() == 255
    with pytest.raises(UnfitImageError, match="greys outside"):
        decode(png(Image.fromarray(wide * 2), "TIFF"))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_lies_on_white(mode, png):
    colour = (10, 20, 30, 51) if mode == "RGBA" else (10, 51)
    found = decode(png(Image.new(mode, (SIZE, SIZE), colour)))[0, 0].astype(int)
    wanted = [round(255 * 0.8 + 0.2 * value) for value in (colour[:3] if mode == "RGBA" else [10])]
    assert np.abs(found - wanted).max() <= 1


def test_a_transparent_colour_of_a_palette_lies_on_white(png):
    picture = Image.new("P", (SIZE, SIZE), 0)
    picture.putpalette([200, 0, 0, 0, 0, 200])
    picture.putpixel((0, 0), 1)
    found = decode(png(picture, transparency=0))
    assert found[5, 5].tolist() == [255, 255, 255]
    assert found[0, 0].tolist() == [0, 0, 200]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientation_is_applied(orientation, png):
    upright = np.zeros((SIZE, SIZE, 3), np.uint8)
    upright[:4, :6] = [250, 10, 10]
    turns = {
        1: lambda x: x,
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.transpose(1, 0, 2),
        6: lambda x: np.rot90(x, 1),
        7: lambda x: np.rot90(x, 2).transpose(1, 0, 2),
        8: lambda x: np.rot90(x, -1),
    }
    exif = Image.Exif()
    exif[0x112] = orientation
    stored = np.ascontiguousarray(turns[orientation](upright))
    assert np.array_equal(decode(png(stored, exif=exif)), upright)


@pytest.mark.parametrize(("width", "height"), [(40, 20), (20, 40), (33, 16), (16, 17)])
def test_the_centre_is_cropped_to_the_shorter_side(width, height, png):
    picture = np.zeros((height, width, 3), np.uint8)
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    picture[top : top + side, left : left + side] = 200
    assert (decode(png(picture)) == 200).all()


def test_resizing_is_pillows_antialiased_bicubic(draw, png):
    picture = Image.fromarray(draw(3, 50))
    wanted = picture.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    assert np.array_equal(decode(png(picture)), np.asarray(wanted))
    assert decode(png(picture), 64).std() > 0  # enlarging works as well


def test_an_exact_size_is_asked_for(draw, png):
    assert np.array_equal(decode(png(draw(4, SIZE)), exact=True), draw(4, SIZE))
    with pytest.raises(UnfitImageError, match="is 24x20 pixels, but the protocol says 16x16"):
        decode(png(draw(4, 24)[:20]), exact=True)


def refused(data, words):
    with pytest.raises(UnfitImageError, match=words) as caught:
        decode(data)
    assert "\n" not in str(caught.value)
    assert " at 0x" not in str(caught.value)  # no address of an object: the same words every time


@pytest.mark.parametrize("data", [b"", b"no picture", b"\x89PNG\r\n\x1a\n", b"<svg/>"])
def test_what_is_no_image(data):
    refused(data, "is unreadable")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF"])
def test_a_truncated_image(kind, draw, png):
    data = png(draw(5, 64), kind)
    refused(data[: len(data) // 2], "is unreadable")


def test_a_missing_file(tmp_path):
    refused(tmp_path / "gone.png", "is unreadable")


def test_floats_are_refused(png):
    refused(png(Image.new("F", (SIZE, SIZE), 0.5), "TIFF"), "floats")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [10_000, 40_000])
def test_a_decompression_bomb(side):
    # A file of a hundred bytes or so that says it is huge: nothing of that size is ever made.
    refused(f"P4 {side} {side}\n".encode(), "too large|exceeds limit")


def test_pillow_does_not_warn_of_what_is_refused():
    # Elsewhere, as pytest has filters of its own.
    lines = (
        "from mibench.data.images import Decoder, UnfitImageError",
        "try: Decoder(8)(b'P4 10000 10000\\n')",
        "except UnfitImageError as error: print(error)",
    )
    run = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True
    )
    assert "too large" in run.stdout
    assert run.stderr == ""


@pytest.mark.parametrize("kind", ["GIF", "PNG", "TIFF", "WEBP"])
def test_of_several_frames_the_first_is_used(kind, png):
    first, second = (Image.new("RGB", (SIZE, SIZE), (shade,) * 3) for shade in (200, 20))
    how = {"lossless": True} if kind == "WEBP" else {}
    film = png(first, kind, save_all=True, append_images=[second], **how)
    for data, several in ((film, True), (png(first, kind, **how), False)):
        image, found = Decoder(SIZE).first_frame(data)
        assert found is several
        assert image.unique().tolist() == [200]


def test_a_second_frame_that_is_cut_off_does_not_matter(draw, png):
    frames = [Image.fromarray(draw(number, SIZE)) for number in (1, 2)]
    film = png(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.array_equal(decode(film[:-150]), decode(film))


def test_postscript_is_never_run():
    refused(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n", "not an image")
