"""The verb `import`: existing weights as the artifacts that trainings would have made, through the normal engine."""

from dataclasses import replace

from pipeline.errors import UsageError
from pipeline.models.known_weights import how_to_get
from pipeline.plan.wanted import planned_steps
from pipeline.run import invocation
from pipeline.settings.config import Config
from pipeline.settings.sections import STAGES
from pipeline.settings.selection import Selection
from pipeline.settings.words import Words
from pipeline.store.artifacts import Look
from pipeline.terminal import console
from pipeline.verbs.configured import command, configured_run


def handle(words: Words) -> None:
    found, overrides = composed(words.required_conf(), words.overrides, words.own.get("from"))
    words = replace(words, overrides=overrides)
    loaded, root = configured_run(words)
    bring(loaded, words.required_conf(), root, found, words.same, command())


def composed(conf: str, overrides: list[str], source: str | None) -> tuple[dict[str, str], list[str]]:
    """What `source` holds (model -> a line about it), and the overrides by which a config takes it from there.

    Of a folder, each key gets the file that holds its model, or the folder of its shards; files that cannot be used
    are told and passed over.

    Raises:
        UsageError: no source, or nothing there.
        stages.weights.pretrained.BadWeights: it cannot be read, or holds none of our models.
    """
    if not source:
        raise UsageError("import needs from=DIR or from=FILE")
    from datasets.files import storage
    from pipeline.models.loading import PUBLIC_COMPRESSOR, local
    from stages.weights import pretrained

    if not storage.exists(source):
        raise UsageError(f"from={source}: there is nothing; {how_to_get(source)}")
    place = local(source)
    try:
        found, skipped = pretrained.look(place)
    except pretrained.BadWeights as error:
        raise UsageError(f"from: {error}") from error
    for reason in skipped:
        console.print(f"skipped: {reason}", style="yellow", markup=False)
    if skipped:
        console.print(f"files skipped: {len(skipped)}; models found: {len(found)}", style="yellow", markup=False)

    def where(item: pretrained.Found) -> str:
        path = item.files[0] if len(item.files) == 1 else item.files[0].parent
        return storage.join(source, *path.relative_to(place).parts)

    brought = any(word.startswith("compressor.weights=") for word in overrides)
    if "stage_b" in found and len(found) > 1 and not brought and not found.keys() & {"compressor", "imagenet"}:
        left = found.pop("stage_b")
        told = f"Stage B in {left.files[0]}: with it belongs the compressor that it was trained with"
        console.print(f"skipped: {told}: compressor.weights=PATH; {PUBLIC_COMPRESSOR}", style="yellow", markup=False)
    stage_b = found.get("stage_b")
    compressor = found.get("compressor") or (None if stage_b else found.get("imagenet"))
    if stage_b and compressor and compressor.files == stage_b.files:
        compressor = None  # Stage B's weights bring it along
    words = []
    for model, item in found.items():
        if model in STAGES:
            words += [f"{model}.weights={where(item)}", f"{model}.train=null"]
        elif item is compressor:
            words.append(f"compressor.weights={where(item)}")
    lines = {}
    for model, item in found.items():
        keys = ", ".join(f"{item.section}.model.{name}" for name in item.assumed)
        told = f"; nothing in it tells {keys}: taken as the config has it" if keys else ""
        lines[pretrained.NAMES[model]] = f"{', '.join(map(str, item.files))} ({item.layout}){told}"
    return lines, [*overrides, *words]


def bring(config: Config, conf: str, root: str, found: dict[str, str], same: str, command: str) -> None:
    """Build the imports of a composed config; say what was found, where it lies now, and by which words to use it."""
    from pipeline.models.loading import check_existing

    for name, line in found.items():
        console.print(f"found {name} in {line}", markup=False)
    targets = tuple(stage for stage in STAGES if config.origin(stage) == "import")
    use = f"use with run, sample, export: {same}"
    if not targets:
        check_existing(config, STAGES)
        console.print(f"nothing to build by itself; {use}", markup=False)
        return
    config = config.model_copy(update={"targets": targets})
    look = Look(root)
    planned = planned_steps(config, look, Selection())
    if any(item.state != "done" for item in planned):
        invocation.run(config, conf, look, planned, command)
    for item in planned:
        path = look.path(item.step.output, item.fingerprint.digest)
        console.print(f"{item.step.output} is in {path}", markup=False)
    console.print(use, markup=False)
