"""What would stop a run at once: weights, metadata or scores that are not there or do not fit, batches, precision.

`plan` and `doctor` tell of all of it, `run` refuses the first, before anything is created; of batches it asks again
before each step, when more is known of the data.
"""

from collections.abc import Mapping
from functools import partial

from datasets.config import NO_SCORES, DataError
from datasets.files import storage
from datasets.planning import plan, preview, recaps
from datasets.planning.plan import Counts
from datasets.sources import laion
from pipeline.errors import UsageError
from pipeline.plan import batch_sizes, weights
from pipeline.plan.dag import Planned, to_do
from pipeline.settings.config import Config
from pipeline.settings.evaluation import HELD_OUT, TRAINING
from pipeline.settings.keys import is_below
from pipeline.store.artifacts import Artifact

WITHOUT_BF16 = frozenset({"K80", "P4", "P100", "V100", "T4"})  # by Ray's names; later ones have it


def missing_rows(config: Config, planned: list[Planned], ask_stores: bool = False) -> str | None:
    """That Parquet files, still to be read, are not there or damaged, as a sentence; URIs are good unless asked.

    Raises:
        OtherColumns: they are there, and of another kind: these will not come yet, or come again.
    """
    if not _to_fetch(planned):
        return None
    try:
        plan.check(config.data, ask_stores)
    except laion.OtherColumns:
        raise
    except DataError as error:
        return str(error)
    return None


def missing_captions(config: Config, planned: list[Planned], ask_stores: bool = False) -> str | None:
    """That tables of captions, still to be joined, are not there, or others, as a sentence; URIs are good unless asked.

    The first file of each is looked at.
    """
    for name, recap in config.data.recaps.items():
        to_do = any(item.step.output == f"captions_{name}" and item.state != "done" for item in planned)
        if to_do and (ask_stores or not storage.is_remote(recap.path)):
            try:
                recaps.check(recap, f"data.recaps.{name}")
            except DataError as error:
                return str(error)
    return None


def ahead(config: Config, planned: list[Planned]) -> Counts | None:
    """What a source on this machine would give, if it is still to be read and may leave out so much only.

    Raises:
        DataError: it cannot be read, or gives nothing.
    """
    return preview.ahead(config.data, config.seed) if _to_fetch(planned) else None


def unread(config: Config, planned: list[Planned], counts: Counts | None) -> list[str]:
    """What is known of the sources of a mixture that `ahead` has not listed, if it is still to be read."""
    return preview.unread(config.data, counts) if _to_fetch(planned) and not missing_rows(config, planned) else []


def columns(config: Config, planned: list[Planned]) -> dict[str, dict[str, str]]:
    """By key of the config, which columns will be taken from LAION's Parquet on this machine, if it is still to read.

    Nothing for what cannot be read: `missing_rows` tells that.
    """
    if not _to_fetch(planned) or missing_rows(config, planned):
        return {}
    paths = {
        f"{part.key}.{name}": getattr(part.config, name)
        for part in config.data.parts
        for name in ("metadata", "scores")
    }
    return {key: laion.read_as(path, key) for key, path in paths.items() if path and not storage.is_remote(path)}


def missing_scores(config: Config, planned: list[Planned]) -> str | None:
    """That views want scores which LAION's metadata on this machine have not and nothing brings, as a sentence."""
    data = config.data
    bare = [
        part.config.metadata
        for part in data.parts
        if part.config.metadata and not (part.config.scores or data.scorer or storage.is_remote(part.config.metadata))
    ]
    if missing_rows(config, planned) or not all(storage.matching(path, ".parquet") for path in bare):
        return None  # the first is told elsewhere; a finished plan needs no metadata any more
    selects = [item for item in planned if item.step.name == "select" and item.state != "done"]
    wanting = [name for item in selects if data.views[name := item.step.output.removeprefix("view_")].scored]
    if not wanting or all("aesthetic" in laion.columns(path) for path in bare):
        return None
    return f"data.views.{wanting[0]}.min_aesthetic: {NO_SCORES}"


def too_large_batches(config: Config, planned: list[Planned], artifacts: Mapping[str, Artifact]) -> str | None:
    """Which training to do has a batch larger than the data can be, as a sentence, as far as those artifacts tell that
    are not to be made anew. Not of trainings that may stay as they are."""
    made = {name: artifacts[name] for name in artifacts.keys() - {step.output for step in to_do(planned)}}
    certain = [item for item in planned if not item.again or item.reason == "forced"]
    trainings = (step for step in to_do(certain) if config.trainings_of(step.name))
    told = (batch_sizes.too_large(config, step, partial(batch_sizes.at_most, config, step, made)) for step in trainings)
    return next(filter(None, told), None)


def missing_judges(config: Config, planned: list[Planned]) -> str | None:
    """Of a step that is to score rivals on prompts without originals, that nothing says whose pictures are better.

    For people to compare (`study`), it takes nothing.
    """
    files = sorted(config.prompt_sets().keys() - {HELD_OUT, TRAINING})
    judged = config.eval.scorers.paths or config.eval.distances.inception
    scored = any(item.step.name == "evaluate" and item.state != "done" for item in planned)
    if judged or not (scored and config.eval.rivals and files):
        return None
    return (
        f"eval.rivals: nothing can tell whose pictures for the prompt set {files[0]} are better, which has no "
        "originals; give a scorer, such as eval.scorers.pickscore=PATH, or let people tell (study build)"
    )


def every(config: Config, planned: list[Planned], counts: Counts | None, ask_stores: bool = False) -> list[str]:
    """What would stop a run at once, as sentences; `counts` are those of `ahead`."""
    artifacts = {item.step.output: item.artifact for item in planned if item.artifact}
    found = (
        missing_rows(config, planned, ask_stores),
        missing_captions(config, planned, ask_stores),
        counts and preview.beyond_budget(counts),
        weights.missing(config, planned),
        weights.misfit(config, planned),
        missing_scores(config, planned),
        missing_judges(config, planned),
        too_large_batches(config, planned, artifacts),
    )
    return [sentence for sentence in found if sentence]


def check_precision(config: Config, planned: list[Planned], kind: str) -> None:
    """Refuse bf16 in steps to do where a GPU of the cluster (`Cluster.kind`) has none.

    Raises:
        UsageError: names the keys.
    """
    old = WITHOUT_BF16.intersection(kind.removeprefix("cuda:").split("+"))
    read = [key for item in planned if item.state != "done" for key in item.step.reads]
    keys = [key for key in config.in_bf16() if any(is_below(key, section) for section in read)]
    if old and keys:
        raise UsageError(
            f"{' and '.join(sorted(old))} GPUs cannot compute in bf16; give {' '.join(f'{key}=fp32' for key in keys)}"
        )


def _to_fetch(planned: list[Planned]) -> bool:
    return any(item.step.output == "metadata" and item.state != "done" for item in planned)
