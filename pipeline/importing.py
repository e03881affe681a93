"""The verb `import`: existing weights as the artifacts that trainings would have made, through the normal engine."""

import re
import shlex

from pipeline import run
from pipeline.artifacts import Store
from pipeline.config import STAGES, Config
from pipeline.dag import Selection
from pipeline.errors import UsageError
from pipeline.screen import console
from pipeline.weights import how_to_get

PLAIN = re.compile(r"[\w./:@-]+")  # what Hydra reads as one word without quotes


def composed(conf: str, overrides: list[str], source: str | None) -> tuple[dict[str, str], list[str]]:
    """What `source` holds (model -> a line about it), and the overrides by which a config takes it from there.

    Raises:
        UsageError: no source, or nothing there.
        stages.pretrained.BadWeights: it cannot be read, or holds none of our models.
    """
    if not source:
        raise UsageError("import needs from=DIR or from=FILE")
    from datasets import storage
    from pipeline.models import local
    from stages import pretrained

    if not storage.exists(source):
        raise UsageError(f"from={source}: there is nothing; {how_to_get(source)}")
    found = pretrained.find(local(source))
    words = []
    for model in found:
        if model in STAGES:
            words += [f"{model}.weights={_quoted(source)}", f"{model}.train=null"]
        elif "stage_b" not in found:  # else Stage B's weights bring it along
            words.append(f"compressor.weights={_quoted(source)}")
    lines = {
        pretrained.NAMES[model]: f"{', '.join(map(str, item.files))} ({item.layout})" for model, item in found.items()
    }
    return lines, [*overrides, *words]


def bring(config: Config, conf: str, root: str, found: dict[str, str], overrides: list[str], command: str) -> None:
    """Build the imports of a composed config; say what was found, where it lies now, and how to use it."""
    from pipeline.models import check_existing

    for name, line in found.items():
        console.print(f"found {name} in {line}", markup=False)
    targets = tuple(stage for stage in STAGES if config.origin(stage) == "import")
    same = " ".join(shlex.quote(word) for word in overrides)
    use = f"use with run, sample, export: conf={conf} {same}"
    if not targets:
        check_existing(config, STAGES)
        console.print(f"nothing to build by itself; {use}", markup=False)
        return
    config = config.model_copy(update={"targets": targets})
    planned = run.planned_steps(config, root, Selection())
    if any(item.state != "done" for item in planned):
        run.run(config, conf, root, planned, command)
    for item in planned:
        path = Store(root).path(item.step.output, item.fingerprint.digest)
        console.print(f"{item.step.output} is in {path}", markup=False)
    console.print(use, markup=False)


def _quoted(path: str) -> str:
    """A path as a value that Hydra reads as it stands."""
    return path if PLAIN.fullmatch(path) else "'" + path.replace("\\", "\\\\").replace("'", "\\'") + "'"
