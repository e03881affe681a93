"""What the tests of the pipeline share."""

import pytest


@pytest.fixture(scope="module")
def tars() -> dict[int, tuple[bytes, int]]:
    """Shards of pictures by number, and the rows of each."""
    from datasets.formats import shards
    from tests.pipeline.in_process import CAPTIONS, ROWS, picture

    numbers = iter(range(sum(ROWS)))
    return {
        shard: (
            shards.write_images(
                shards.ImageRow(row, f"{number:032x}", "u", CAPTIONS[number % len(CAPTIONS)], "png", picture(number))
                for row, number in zip(range(count), numbers, strict=False)
            ),
            count,
        )
        for shard, count in enumerate(ROWS)
    }
