"""The trainings: a Ray Train job each, around the one loop of `stages.training.loop`."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from datasets.buckets import Frame, Size
from datasets.files import storage
from datasets.files.storage import FileEntry
from datasets.reading import prompts
from datasets.reading.batches import Source
from pipeline.cluster.ranks.checkpoints import Checkpoints
from pipeline.cluster.ranks.job import Job
from pipeline.cluster.ranks.training_files import checkpoints_of, logged_steps, result
from pipeline.errors import Preempted, UsageError
from pipeline.plan import batch_sizes, training_flops, training_memory
from pipeline.plan.dag import order
from pipeline.plan.table import table
from pipeline.plan.wanted import prints_of
from pipeline.steps.build import Build, Facts
from pipeline.store.artifacts import Artifact, Look, lacking
from pipeline.store.deleting import RESULT
from stages.settings.losses import StageALoss
from stages.settings.models import PreviewerConfig

if TYPE_CHECKING:  # import torch, which a plan can do without
    from pipeline.cluster.ranks.trainings import Order
    from pipeline.models.showing import Decoder, Prompts
    from pipeline.models.training_data import Reading

PERCEPTUAL_OFF = "the perceptual loss is off: stage_a.loss.perceptual_weights names no VGG16 weights"
PROMPTS = 4  # of files, in a panel
CALL = "ray.train.torch.TorchTrainer.fit"


def train_a(build: Build) -> Facts:
    """images -> stage_a: the VQGAN, with a panel of reconstructions."""
    settings = build.config.stage_a
    notes = {"perceptual": _perceptual_term(settings.loss)}
    if notes["perceptual"] == PERCEPTUAL_OFF:
        build.report.warning(f"train_a: {PERCEPTUAL_OFF}")
    return replace(_train(build, settings, ("image",)), notes=notes)


def _perceptual_term(loss: StageALoss) -> str:
    """What Stage A's perceptual loss is, in words."""
    if not loss.perceptual:
        return "none"
    if not loss.perceptual_weights:
        return PERCEPTUAL_OFF
    return "LPIPS on VGG16" if loss.perceptual_heads else "unit-normalised VGG16 features, without LPIPS's heads"


def train_b(build: Build) -> Facts:
    """images, text, latents_a, stage_a -> stage_b: Stage B together with the semantic compressor."""
    settings = build.config.stage_b
    return _train(build, settings, ("image", "text", "latents_a"), tower=settings.text)


def train_c(build: Build) -> Facts:
    """latents_c, text -> stage_c: the text-conditional prior."""
    settings = build.config.stage_c
    compressor = _compressor(build)
    shows = settings.train is not None and settings.train.panel_every is not None
    shown = {"decoder": _decoder(build), "prompts": _prompts(build)} if shows else {}
    facts = _train(build, settings, ("text", "latents_c"), tower=settings.text, shown=shown)
    return replace(facts, notes={"compressor": compressor})


def train_previewer(build: Build) -> Facts:
    """images, latents_c -> previewer: small pictures from codes, with a panel of them."""
    return _train(build, build.config.previewer, ("image", "latents_c"))


def train_baseline(build: Build) -> Facts:
    """latents_a, text, stage_a -> baseline: the U-Net on Stage A's latents, with a panel of what it draws."""
    settings = build.config.baseline
    facts = _train(build, settings, ("text", "latents_a"), tower=settings.text)
    return replace(facts, notes={"first_stage": "Stage A of this run"})


def _compressor(build: Build) -> str | None:
    """The sha256 of the compressor whose codes Stage C is to learn, where it is known.

    Raises:
        UsageError: it is not the one that Stage B has now.
    """
    from pipeline.models import loading

    stored = build.inputs.get("latents_c")
    if stored is None:
        return build.inputs["stage_b"].files[loading.COMPRESSOR].sha256
    seen = stored.manifest["notes"].get("spec", {}).get("weights")
    if stage_b := stored.parent("stage_b"):
        loading.check_compressor(seen, stage_b, "latents_c")
    return seen


def _reading(build: Build, fields: tuple[str, ...], tower: str | None) -> "Reading":
    """Where the fields of a training's batches come from: stored ones by frame, and the encoders of others."""
    from pipeline.models import encoders
    from pipeline.models.training_data import Reading

    config, inputs, name = build.config, build.inputs, build.step.name
    online = []
    if "text" in fields and config.encode.text.online:
        online.append(encoders.text(config, inputs[f"text_{tower}"]))
    if "latents_a" in fields and config.encode.latents_a.online:
        online.append(encoders.latents_a(config, inputs["stage_a"]))
    if "latents_c" in fields and config.encode.latents_c.online:
        online.append(encoders.latents_c(config, inputs["stage_b"]))
    read = {*fields, *(encoder.reads for encoder in online)} - {encoder.field for encoder in online}

    def source(field: str, frame: Frame) -> Source:
        if field == "image":
            return _images(build, frame)
        if field.startswith("latents"):
            return _family(inputs[field], field, frame)
        return replace(_source(inputs[f"text_{tower}"], field), captions=config.data.captions or None)

    stretches = config.stretches_of(name)
    return Reading(
        fields=fields,
        online=online,
        sources={frame: [source(field, frame) for field in sorted(read)] for frame in config.frames_of(name)},
        stretches=stretches,
        views={view: inputs[f"view_{view}"] for _, view in stretches if view},
        held_out=inputs.get("held_out"),
        seed=config.seed,
        cache=config.cluster.cache,
        planned=_planned(build),
    )


def _planned(build: Build) -> Artifact | None:
    """The plan of the pictures, which names their captions; None where it is gone."""
    made_of = (artifact.parent("images") for artifact in build.inputs.values())
    images = build.inputs.get("images") or next(filter(None, made_of), None)
    return images.parent("metadata") if images else None


def _decoder(build: Build) -> "Decoder | None":
    """What shows the codes that Stage C learns: a previewer that learned the same, else Stage B and A.

    Where neither is there yet, as with existing weights of Stage B and a Stage A that is built later, no panel is
    drawn, which is told: colours of a code's channels say nothing to anybody.
    """
    from pipeline.models.showing import ByPreviewer, ByStages

    config, inputs = build.config, build.inputs
    codes, root = inputs.get("latents_c"), build.path.rpartition("/artifacts/")[0]
    look, learned = Look(root), codes or inputs["stage_b"]
    for made in reversed(list(look.finished("previewer"))):
        if learned.manifest["fingerprint"] in made.manifest["parents"].values():
            return ByPreviewer(PreviewerConfig.model_validate(made.manifest["settings"]["previewer"]["model"]), made)
    stage_b = codes.parent("stage_b") if codes else inputs["stage_b"]
    stage_a = _stage_a(build, stage_b, look) if stage_b else None
    if stage_a is None or stage_b is None:
        build.report.warning(
            f"{build.step.name}: no panels: what shows codes, Stage A and B or a previewer of theirs, is not built "
            "yet; build it first, with --until train_a or import_a"
        )
        return None
    tower = f"text_{config.stage_b.text}"
    text = stage_b.parent(tower) or inputs.get(tower)
    shares = config.stage_b.text == config.stage_c.text
    return ByStages(config.stage_a.model, stage_a, config.stage_b.model, stage_b, shares, text)


def _prompts(build: Build) -> "Prompts | None":
    """Some prompts of the files that the model is going to be measured on, which panels show beside the data's
    captions: the first ones of each."""
    from pipeline.models.showing import Prompts

    config, tower = build.config, build.config.stage_c.text
    files = config.prompt_files()
    captions, texts = [], []
    for name, path in files.items():
        for one in prompts.read(path, config.eval.limit, config.seed, f"eval.prompts.{name}").prompts[: _each(files)]:
            captions.append(f"{name}: {one.text}")
            texts.append(one.text)
    captions, texts = captions[:PROMPTS], texts[:PROMPTS]
    return Prompts(captions, texts, config.text[tower], build.inputs[f"text_{tower}"]) if texts else None


def _each(files: Collection[str]) -> int:
    """How many prompts of each file a panel shows."""
    return max(1, PROMPTS // len(files))


def _stage_a(build: Build, stage_b: Artifact, look: Look) -> Artifact | None:
    """The Stage A that a Stage B goes with: its own, else this config's."""
    if "stage_a" in stage_b.manifest["parents"]:
        return stage_b.parent("stage_a")
    steps = order(table(build.config), ["stage_a"])
    return look.find("stage_a", prints_of(build.config, look, steps)["stage_a"].digest)


def _source(artifact: Artifact, field: str) -> Source:
    return Source(field, artifact.shards())


def _images(build: Build, frame: Frame) -> Source:
    """The pictures; where they are stored in their own aspects, cropped to the frame."""
    images = _source(build.inputs["images"], "image")
    return images if build.config.data.image.frame.square else replace(images, size=Size(frame.size, frame.size))


def _family(artifact: Artifact, field: str, frame: Frame) -> Source:
    """The latents of one frame."""
    return Source(field, artifact.shards(frame.name))


def _train(
    build: Build,
    settings: Any,
    fields: tuple[str, ...],
    tower: str | None = None,
    shown: Mapping[str, Any] | None = None,
) -> Facts:
    """Do the step's trainings of `settings` on batches of `fields`, with the hidden states of a tower; `shown` are
    the order's decoder and prompts, for panels."""
    from pipeline.cluster.ranks import trainings

    order = replace(_order(build, settings, fields, tower), **(shown or {}))
    if tower:
        _tell_of_others(build, build.inputs[f"text_{tower}"])
    _check_batches(build)
    _check_checkpoints(build)
    _catch_up(build)
    if _published(build) is None:
        job = Job(
            path=build.path,
            building=build.building,
            fence=build.claim.fence,
            log=build.log,
            seed=build.config.seed,
            stall_s=build.config.cluster.stall_s,
            flops=training_flops.per_picture(build.step.name, build.config),
            bytes=training_memory.whole_bytes(build.step.name, build.config),
        )
        build.train(partial(trainings.run, order), job)
    found = result(build.path)
    if found is None:  # all ranks have saved and gone, without an error and without a signal
        raise Preempted("a node is being taken away, and the training was saved")
    if trainings.PANEL in found["files"]:
        build.report.image(build.step.output, storage.read(storage.join(build.path, trainings.PANEL)), 0)
    return Facts(
        files=_entries(found),
        rows=found["rows"],
        call=CALL,
        workers=found["pids"],
        metrics=found["metrics"] | build.interruptions.metrics() | {"model_flops": _model_flops(build)},
    )


def _tell_of_others(build: Build, text: Artifact) -> None:
    """Warn of pictures that have no caption with a weight: any other one is drawn."""
    drawn = {name for name, weight in build.config.data.captions.items() if weight}
    pictures = text.manifest["notes"].get("pictures", {})
    others = sum(count for names, count in pictures.items() if drawn.isdisjoint(names.split("+")))
    if drawn and others:
        build.report.warning(
            f"{build.step.name}: {others:,} of {sum(pictures.values()):,} pictures have no caption called "
            f"{' or '.join(sorted(drawn))}; others are drawn of them"
        )


def _model_flops(build: Build) -> float:
    """FLOPs of the models over all images that the step's trainings see, forward and backward."""
    each = training_flops.per_picture(build.step.name, build.config)
    return float(
        sum(
            phase.steps * phase.batch_size * each[name][phase.size]
            for name, training in build.config.trainings_of(build.step.name).items()
            for phase in training.phases
        )
    )


def _order(build: Build, settings: Any, fields: tuple[str, ...], tower: str | None) -> "Order":
    from pipeline.cluster.ranks.trainings import Order

    return Order(
        trainings=build.config.trainings_of(build.step.name),
        settings=settings,
        compressor=build.config.compressor,
        stage_a_model=build.config.stage_a.model,
        stage_a=build.inputs.get("stage_a"),
        text=build.inputs[f"text_{tower}"] if tower else None,
        reading=_reading(build, fields, tower),
        seed=build.config.seed,
    )


def _published(build: Build) -> dict[str, Any] | None:
    """What a job has finished before its driver could say so; not where its files have been deleted since."""
    found = result(build.path)
    told = lacking(build.path, _entries(found)) if found else None
    if told:
        build.claim.fence()
        storage.remove(storage.join(build.path, RESULT))
        build.report.warning(f"{build.step.name}: {told}; it goes on from its last checkpoint")
    return None if told else found


def _entries(found: dict[str, Any]) -> dict[str, FileEntry]:
    """The files that a job has published."""
    return {name: FileEntry(**entry) for name, entry in found["files"].items()}


def _check_batches(build: Build) -> None:
    """Refuse a batch larger than the data before any worker starts: it would hold a sample twice."""
    from pipeline.models.training_data import split

    stored = min(artifact.manifest["rows"] for artifact in batch_sizes.inputs(build.step, build.inputs).values())
    held = build.inputs.get("held_out")

    def seen(view: str | None) -> batch_sizes.Seen:
        chosen, out = split(build.inputs.get(f"view_{view}"), held)
        return batch_sizes.Seen(chosen.rows if chosen else stored, view, less_held_out=bool(out and out.rows))

    if told := batch_sizes.too_large(build.config, build.step, seen):
        raise UsageError(told)


def _check_checkpoints(build: Build) -> None:
    """Refuse checkpoints of another training, such as one that was carried here, before any worker starts."""
    from stages.training.checkpoint import CheckpointMismatch, require_recipe

    for name, training in build.config.trainings_of(build.step.name).items():
        states = Checkpoints(checkpoints_of(build.building, name), build.report.warning)
        try:
            for recipe in states.recipes():
                require_recipe(recipe, training.begun_with(recipe).recipe(build.config.seed))
        except CheckpointMismatch as error:
            raise UsageError(f"{build.step.name}: {error}; remove {states.folder} to start again") from None


def _catch_up(build: Build) -> None:
    """Log what ranks did after their driver was killed, up to their last checkpoint: nobody heard of it then."""
    for name in build.config.trainings_of(build.step.name):
        for step, values in logged_steps(build.building, name):
            if step > build.interruptions.reached.get(name, 0):
                build.report.metrics(values, step)
                build.interruptions.reached[name] = step
