"""What stands in a run's way is told before anything is created: bf16 without it."""

import pytest

from pipeline.errors import UsageError
from pipeline.plan import obstacles
from pipeline.plan.wanted import planned_steps
from pipeline.settings.selection import Selection
from pipeline.store.artifacts import Look
from tests.pipeline.settings.loading import load


def test_bf16_is_refused_where_a_gpu_has_none(tmp_path):
    def check(kind: str, *words: str, selection: Selection = Selection()) -> None:  # noqa: B008
        loaded = load(*words)
        obstacles.check_precision(loaded, planned_steps(loaded, Look(str(tmp_path)), selection), kind)

    words = ("stage_c.train.precision=bf16", "sample.precision=bf16")
    for kind in ("cpu", "cuda:GPU", "cuda:A100+H100"):
        check(kind, *words)
    check("cuda:V100")
    check("cuda:V100", *words, selection=Selection(until="train_b"))
    told = "V100 GPUs cannot compute in bf16; give stage_c.train.precision=fp32 sample.precision=fp32"
    with pytest.raises(UsageError, match=told):
        check("cuda:A100+V100", *words)


def test_rivals_on_prompts_without_originals_want_a_judge_where_they_are_scored(tmp_path):
    """And none where people are asked: only the step that scores is refused."""
    (tmp_path / "mine.txt").write_text("a cat\n")
    words = (f"eval.prompts.mine={tmp_path}/mine.txt", f"eval.rivals.other={tmp_path}")
    told = "eval.rivals: nothing can tell whose pictures for the prompt set mine are better"

    def found(*words: str, target: str = "scores") -> bool:
        loaded = load(*words, f"targets=[{target}]")
        planned = planned_steps(loaded, Look(str(tmp_path / "root")), Selection())
        return (obstacles.missing_judges(loaded, planned) or "").startswith(told)

    assert found(*words)
    assert any(sentence.startswith(told) for sentence in sentences_of(tmp_path, *words, "targets=[scores]"))
    assert not found(*words, "eval.scorers.pickscore=weights")
    assert not found(words[0])
    assert not found(*words, target="samples_mine")


def sentences_of(tmp_path, *words: str) -> list[str]:
    loaded = load(*words)
    return obstacles.every(loaded, planned_steps(loaded, Look(str(tmp_path / "root")), Selection()), None)
