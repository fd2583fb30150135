"""AVSS colours: the published palette, and a table that agrees with comparing colour by colour."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from dataloader.palette import UnknownColourError, decode, encode, palette
from scripts.benchmark.literal_metrics import literal_decode

REFERENCE = np.load(Path(__file__).parents[1] / "reference" / "audio.npz")


def test_the_palette_is_the_published_one() -> None:
    assert np.array_equal(palette(71), REFERENCE["avss_palette"])


@given(arrays.arrays(np.uint8, st.tuples(st.integers(0, 9), st.integers(0, 9)), elements=st.integers(0, 70)))
def test_decoding_undoes_encoding_as_the_literal_definition_does(classes: np.ndarray) -> None:
    colours = encode(classes)
    assert np.array_equal(decode(colours), classes)
    assert np.array_equal(literal_decode(colours), classes)


@given(arrays.arrays(np.uint8, (3, 4, 3)))
def test_any_other_colour_is_named_with_its_position(colours: np.ndarray) -> None:
    literal = literal_decode(colours)
    if (literal == 255).any():
        with pytest.raises(UnknownColourError) as caught:
            decode(colours)
        assert literal[caught.value.position] == 255
        assert tuple(colours[caught.value.position]) == caught.value.colour
    else:
        assert np.array_equal(decode(colours), literal)


def test_a_colour_of_a_class_that_the_run_does_not_have_is_unknown() -> None:
    with pytest.raises(UnknownColourError):
        decode(encode(np.full((2, 2), 30, np.uint8)), num_classes=30)
    assert decode(encode(np.full((2, 2), 29, np.uint8)), num_classes=30).tolist() == [[29, 29], [29, 29]]


@pytest.mark.parametrize("classes", [0, 256])
def test_a_palette_fits_a_byte(classes: int) -> None:
    with pytest.raises(ValueError, match="1 to 255 classes"):
        palette(classes)
