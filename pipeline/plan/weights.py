"""Files that steps to do will read as they are: whether they are there, and whether weights among them fit.

A plan goes by what headers tell, in milliseconds and without torch; a run reads the weights whole, each as its step
will, before anything is created: a step that finds out by itself may come after weeks.
"""

from pathlib import Path

from datasets.files import storage
from pipeline.models.known_weights import how_to_get
from pipeline.plan.dag import Planned, Step, to_do
from pipeline.settings.config import Config
from pipeline.settings.keys import is_below
from pipeline.settings.sections import STAGES
from settings import FILES, WEIGHTS

LOSS, INCEPTION = "stage_a.loss", "eval.distances.inception"


def missing(config: Config, planned: list[Planned]) -> str | None:
    """What is not there of the weights and pictures that steps need, and what to do about it, as a sentence."""
    gone = gone_files(config, to_do(planned))
    places = "; ".join(f"{name}: there is nothing at {path}" for name, path in gone.items())
    return f"{places}; {how_to_get(*gone.values())}" if gone else None


def misfit(config: Config, planned: list[Planned]) -> str | None:
    """Which weights are damaged, or another model's than the steps' that need them, as a sentence, as far as headers
    tell it; a run reads the files whole (`check`)."""
    from stages import weight_files
    from stages.weight_files import Model

    models: dict[str, tuple[Model, ...]] = {
        **{f"{stage}.weights": (stage,) for stage in STAGES},
        "compressor.weights": ("compressor", "imagenet"),
        "interpolate.first": ("stage_c",),
        "interpolate.second": ("stage_c",),
    }
    found = {}
    for key, path in _weights_here(config, planned).items():
        place = Path(storage.absolute(path))
        if key in models:
            model = getattr(config, weight_files.section(models[key][0])).model
            found[key] = weight_files.misfit(place, models[key], model)
        else:
            found[key] = weight_files.damage(place)
    return "; ".join(f"{key}: {told}" for key, told in found.items() if told) or None


def check(config: Config, planned: list[Planned]) -> None:
    """Read whole the weights that steps to do need, before anything runs; that they are there, `missing` says.

    Remote ones are looked at when their step runs: it has to copy them.

    Raises:
        BadWeights: they are another model's, or damaged, or what reads them is not installed; names the key.
    """
    needed = needed_files(config, to_do(planned))
    if INCEPTION in needed:
        from pipeline.models import inception

        inception.check(config)
    here = _weights_here(config, planned).keys() - {INCEPTION}
    if not here:
        return
    import torch  # below: a run that is given no weights has no need of it

    from pipeline.models import loading, scorers
    from pipeline.models.foreign import captioners

    made = {item.step.output for item in planned if item.state != "done"}
    loading.check_existing(config, {stage for stage in STAGES if config.trained(stage) in made})
    for name, text in config.text.items():
        if f"text.{name}.weights" in here:
            loading.fresh_tower(text, name)
    for name, captioner in config.data.captioners.items():
        if f"data.captioners.{name}.weights" in here:
            captioners.check(captioner, f"data.captioners.{name}")
    if any(is_below(key, LOSS) for key in here):
        loading.perceptual(config.stage_a.loss, torch.device("cpu"))
    if config.data.scorer and any(is_below(key, "data.scorer") for key in here):
        scorers.of_pictures(config.data.scorer, "cpu")
    if any(is_below(key, "eval.scorers") for key in here):
        scorers.load(config, "cpu")


def needed_files(config: Config, steps: list[Step]) -> dict[str, str]:
    """Paths, by key, of the weights, pictures and lists that steps will read."""
    read = [key for step in steps for key in step.reads]
    needed = {name: path for name, path in config.paths(FILES).items() if any(is_below(name, key) for key in read)}
    if not config.stage_a.loss.perceptual:  # what a training leaves, an evaluation may name
        needed = {name: path for name, path in needed.items() if name in read or not is_below(name, LOSS)}
    if config.stage_b.weights:  # which may hold the compressor
        needed.pop("compressor.weights", None)
    return needed


def gone_files(config: Config, steps: list[Step]) -> dict[str, str]:
    """Of `needed_files` those that are not there."""
    return {name: path for name, path in needed_files(config, steps).items() if not storage.exists(path)}


def _weights_here(config: Config, planned: list[Planned]) -> dict[str, str]:
    """Of the files that steps to do will read, the weights that lie on this machine, by key."""
    needed = needed_files(config, to_do(planned)).items() & config.paths(WEIGHTS).items()
    return {key: path for key, path in sorted(needed) if not storage.is_remote(path) and storage.exists(path)}
