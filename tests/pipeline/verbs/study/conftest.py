"""Pictures to be compared: ours of a prompt set, level 150, and a rival's, darker on two prompts of three."""

from collections.abc import Callable

import pytest
from PIL import Image

from datasets.reading import prompts
from tests.pipeline.in_process import WORDS, Root
from tests.pipeline.steps.test_evaluate import flat, put

PROMPTS = 24
Words = list[str]  # of `study build`, but for out=


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Callable[[tuple[int, int]], Words]:
    """Make a root with both, the rival's pictures in a size of their own."""

    def make(size: tuple[int, int]) -> Words:
        folder = tmp_path_factory.mktemp("study")
        texts = [f"prompt {n}" for n in range(PROMPTS)]
        (folder / "mine.tsv").write_text("\n".join(["Prompt", *texts]))
        (folder / "rival").mkdir()
        for n, text in enumerate(texts):
            picture = Image.fromarray(flat(200 if n % 3 else 100)).resize(size)
            picture.save(folder / f"rival/{prompts.Prompt(text).key}.png")
        words = [f"eval.prompts.mine={folder}/mine.tsv", f"eval.rivals.other={folder}/rival"]
        words.append(f"eval.scorers.clip_h={folder}/mine.tsv")  # some file: prompts without originals need a scorer
        root = Root(folder / "root", "targets=[scores]", *words)
        rows = [{"key": prompts.Prompt(text).key, "caption": text, "seed": 1} for text in texts]
        put(root, "samples_mine", {"generated": [flat(150)] * len(rows)}, rows)
        return ["conf=stage_c", *WORDS, f"root={folder}/root", *words]

    return make


@pytest.fixture(scope="session")
def words(drawn: Callable[[tuple[int, int]], Words]) -> Words:
    """The same in equal sizes."""
    return drawn((64, 64))
