"""Frames and masks of any mode and size, and image files that cannot be trusted."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dataloader.images import Placement, normalise, open_image, read_binary_mask, read_colour_mask, read_frame
from utils.errors import DataError

FITS = Placement(4, 6)


def png_that_claims(width: int, height: int) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(1_000_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def png(mode: str = "RGB", size: tuple[int, int] = (6, 4)) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "I;16"])
def test_any_pixel_that_is_not_black_is_object_in_every_mode(tmp_path: Path, mode: str) -> None:
    mask = Image.new(mode, (6, 4))
    if mode == "P":
        mask.putpalette([0, 0, 0, 0, 0, 1])
    grey = {"1": 1, "P": 1, "RGB": (0, 0, 1), "RGBA": (0, 1, 0, 255), "LA": (1, 255)}.get(mode, 1)
    mask.putpixel((2, 1), grey)
    mask.save(tmp_path / "m.png")
    expected = np.zeros((4, 6), np.uint8)
    expected[1, 2] = 1
    assert np.array_equal(read_binary_mask(tmp_path / "m.png", FITS), expected)


def test_an_opaque_black_mask_is_empty(tmp_path: Path) -> None:
    Image.new("RGBA", (6, 4), (0, 0, 0, 255)).save(tmp_path / "m.png")
    assert read_binary_mask(tmp_path / "m.png", FITS).sum() == 0


@pytest.mark.parametrize("size", [(3, 2), (13, 9), (60, 40)])
def test_resized_label_images_hold_only_classes_that_were_there(tmp_path: Path, size: tuple[int, int]) -> None:
    from dataloader.palette import encode

    classes = np.random.default_rng(0).choice([0, 7, 70], (size[1], size[0])).astype(np.uint8)
    Image.fromarray(encode(classes)).save(tmp_path / "m.png")
    assert set(np.unique(read_colour_mask(tmp_path / "m.png", FITS, 71))) <= {0, 7, 70}


def test_frames_that_fit_are_read_bit_for_bit(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "f.png")
    assert np.array_equal(read_frame(tmp_path / "f.png", FITS), pixels)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK"])
def test_frames_of_any_mode_become_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("f.jpg" if mode == "CMYK" else "f.png")
    Image.new(mode, (30, 20)).save(path)
    assert read_frame(path, FITS).shape == (4, 6, 3)


def test_cropping_keeps_the_aspect_and_takes_the_centre() -> None:
    pixels = np.zeros((40, 120, 3), np.uint8)
    pixels[:, 40:80] = 255
    cropped = np.asarray(Placement(20, 20, crop=True).apply(Image.fromarray(pixels), Image.Resampling.NEAREST))
    assert cropped.shape == (20, 20, 3) and cropped.min() == 255
    stretched = np.asarray(Placement(20, 20).apply(Image.fromarray(pixels), Image.Resampling.NEAREST))
    assert stretched.shape == (20, 20, 3) and stretched.min() == 0


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 40), st.integers(1, 40), st.booleans())
def test_a_resized_image_has_the_size_asked_for(width: int, height: int, rows: int, columns: int, crop: bool) -> None:
    placed = Placement(rows, columns, crop=crop).apply(Image.new("RGB", (width, height)), Image.Resampling.BILINEAR)
    assert placed.size == (columns, rows)


def test_normalising_is_imagenet_s() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 4, 6, 3)).astype(np.uint8)
    scaled = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = (scaled - mean.view(3, 1, 1)) / deviation.view(3, 1, 1)
    assert torch.allclose(normalise(pixels), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (png_that_claims(50_000, 50_000), "more than 64,000,000 pixels"),
        (png_that_claims(9_000, 9_000), "more than 64,000,000 pixels"),
        (png_that_claims(4_000, 4_000), "damaged or truncated"),
        (png()[:40], "damaged or truncated|neither"),
        (b"", "neither a PNG nor a JPEG"),
        (b"GIF89a" + bytes(40), "neither a PNG nor a JPEG"),
        (b"<html>not found</html>", "neither a PNG nor a JPEG"),
    ],
)
def test_an_image_that_cannot_be_trusted_is_refused_by_name(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "f.png").write_bytes(data)
    with pytest.raises(DataError, match=rf"the frame .*f\.png .*({message})"):
        open_image(tmp_path / "f.png", "frame")


def test_an_image_of_a_harmless_but_unexpected_format_is_refused(tmp_path: Path) -> None:
    Image.new("RGB", (6, 4)).save(tmp_path / "f.png", "TIFF")
    with pytest.raises(DataError, match="neither a PNG nor a JPEG"):
        open_image(tmp_path / "f.png", "frame")


def test_missing_images_and_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the mask .*none\.png is missing"):
        open_image(tmp_path / "none.png", "mask")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(DataError, match=r"folder\.png cannot be read"):
        open_image(tmp_path / "folder.png", "mask")


@settings(max_examples=150, deadline=None)
@given(
    start=st.sampled_from([png("RGB", (20, 12)), png("L"), png("P"), b""]),
    changes=st.lists(st.tuples(st.integers(0, 500), st.integers(0, 255)), max_size=5),
    rest=st.binary(max_size=40),
)
def test_damaged_images_give_pixels_or_a_data_error(
    tmp_path_factory: pytest.TempPathFactory, start: bytes, changes: list[tuple[int, int]], rest: bytes
) -> None:
    data = bytearray(start + rest)
    for position, value in changes:
        if data:
            data[position % len(data)] = value
    path = tmp_path_factory.getbasetemp() / "damaged.png"
    path.write_bytes(data)
    for read in (lambda: read_frame(path, FITS), lambda: read_binary_mask(path, FITS)):
        try:
            assert read().shape[:2] == (4, 6)
        except DataError as error:
            assert "damaged.png" in str(error)
