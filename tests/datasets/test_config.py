"""Settings of the data alone: what a section refuses, whoever builds it."""

import pytest
from pydantic import ValidationError

from datasets.config import ImageConfig, ViewConfig
from datasets.source_settings import FilterConfig, FolderConfig


@pytest.mark.parametrize("text", ["", " ", "\t\n", "a\x00b", "\x1b[2J", "x\x7f"])
def test_a_path_says_something(text):
    with pytest.raises(ValidationError, match=r"is blank|holds a control character"):
        FolderConfig(path=text)
    with pytest.raises(ValidationError, match=r"is blank|holds a control character"):
        FolderConfig(path="pictures", attribution=text)


@pytest.mark.parametrize("text", [".", "s3://bucket/a b", "Bilder/größer", "two\nlines", "a\tb"])
def test_any_text_that_does_is_taken_as_it_is(text):
    assert FolderConfig(path=text).path == text


@pytest.mark.parametrize("kind", [FilterConfig, ViewConfig])
def test_the_shorter_side_is_bounded_below_the_longer(kind):
    assert kind(min_side=512, max_side=512).max_side == 512
    assert kind(min_side=512).max_side is None
    with pytest.raises(ValidationError, match="min_side=513 is above max_side=512"):
        kind(min_side=513, max_side=512)


def test_captions_have_room_for_their_words():
    assert FilterConfig(min_words=3, max_characters=5).min_words == 3  # "a b c"
    with pytest.raises(ValidationError, match="max_characters=4 is too few for min_words=3"):
        FilterConfig(min_words=3, max_characters=4)


def test_stored_pictures_may_be_decoded():
    assert ImageConfig(size=64, format="png", max_pixels=64 * 64)
    with pytest.raises(ValidationError, match=r"max_pixels=4095 refuses every picture of size=64 px; raise it to 4096"):
        ImageConfig(size=64, format="png", max_pixels=64 * 64 - 1)
