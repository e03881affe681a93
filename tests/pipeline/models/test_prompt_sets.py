"""Prompts of the data: which captions of held-out pictures trainings saw with other pictures."""

from pathlib import Path

from datasets.reading import views
from pipeline.models.prompt_sets import _trained
from tests.pipeline.verbs.data.forgettable import ROWS, built, commit, found


def test_a_caption_was_trained_on_where_a_picture_has_it_that_is_not_held_out(tmp_path: Path) -> None:
    """Whatever planned pictures have it that were lost, or are held out too."""
    store = built(tmp_path)
    images = found(store)["images"]

    def trained(*kept: tuple[int, int]) -> set[str]:
        held = {shard: [(shard, row) not in kept for row in range(ROWS - 1)] for shard in range(2)}
        view = views.dump(views.View.of(held))
        made = commit(store, "held_out", {views.FILE: view}, 1, images, settings={"kept": kept})
        return _trained(["caption", "its name", "nobody's"], images, made)

    assert trained() == set()
    assert trained((0, 0)) == {"caption"}
    assert trained((1, 1)) == {"its name"}
    assert trained((0, 2), (1, 1)) == {"caption", "its name"}
