"""The trainings: a Ray Train job each, around the one loop of `stages.training.loop`."""

from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from datasets.buckets import Frame, Size
from datasets.files import json_files, storage
from datasets.files.cache import VerifiedFiles
from datasets.files.storage import FileEntry
from datasets.reading import views
from datasets.reading.batches import Batches, Source
from datasets.reading.bucket_batches import BucketBatches, Span
from datasets.reading.views import View
from pipeline.cluster.checkpoints import Checkpoints
from pipeline.errors import Preempted, UsageError
from pipeline.plan import batch_sizes, training_flops
from pipeline.settings.sections import Baseline as BaselineSettings
from pipeline.settings.sections import Compressor as CompressorSettings
from pipeline.settings.sections import Previewer as PreviewerSettings
from pipeline.settings.sections import StageA as StageASettings
from pipeline.settings.sections import StageB as StageBSettings
from pipeline.settings.sections import StageC as StageCSettings
from pipeline.steps.build import Build, Facts
from pipeline.store.artifacts import Artifact
from stages.settings.losses import StageALoss
from stages.settings.training import TrainingConfig

if TYPE_CHECKING:
    from torch import device

    from pipeline.models.encoders import Encode, Encoder, TrainingData
    from stages.training.perceptual import Perceptual

PANEL = "panel.png"  # reconstructions of some pictures
PERCEPTUAL_OFF = "the perceptual loss is off: stage_a.loss.perceptual_weights names no VGG16 weights"
CALL = "ray.train.torch.TorchTrainer.fit"


def train_a(build: Build) -> Facts:
    """images -> stage_a: the VQGAN, with a panel of reconstructions."""
    settings = build.config.stage_a
    notes = {"perceptual": _perceptual_term(settings.loss)}
    if notes["perceptual"] == PERCEPTUAL_OFF:
        build.report.warning(f"train_a: {PERCEPTUAL_OFF}")
    return replace(_train(build, _loop_a, settings=settings, **_data(build, "image")), notes=notes)


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
    return _train(
        build,
        _loop_b,
        settings=settings,
        compressor=build.config.compressor,
        stage_a_model=build.config.stage_a.model,
        stage_a=build.inputs["stage_a"],
        text=build.inputs[f"text_{settings.text}"],
        **_data(build, "image", "text", "latents_a", tower=settings.text),
    )


def train_c(build: Build) -> Facts:
    """latents_c, text -> stage_c: the text-conditional prior."""
    settings = build.config.stage_c
    compressor = _compressor(build)
    facts = _train(
        build,
        _loop_c,
        settings=settings,
        text=build.inputs[f"text_{settings.text}"],
        **_data(build, "text", "latents_c", tower=settings.text),
    )
    return replace(facts, notes={"compressor": compressor})


def train_previewer(build: Build) -> Facts:
    """images, latents_c -> previewer: small pictures from codes, with a panel of them."""
    return _train(build, _loop_previewer, settings=build.config.previewer, **_data(build, "image", "latents_c"))


def train_baseline(build: Build) -> Facts:
    """latents_a, text, stage_a -> baseline: the U-Net on Stage A's latents, with a panel of what it draws."""
    settings = build.config.baseline
    facts = _train(
        build,
        _loop_baseline,
        settings=settings,
        stage_a_model=build.config.stage_a.model,
        stage_a=build.inputs["stage_a"],
        text=build.inputs[f"text_{settings.text}"],
        **_data(build, "text", "latents_a", tower=settings.text),
    )
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


def _data(build: Build, *fields: str, tower: str | None = None) -> dict[str, Any]:
    """Where the fields of a training's batches come from: stored ones by frame, and the encoders of others."""
    from pipeline.models import encoders

    config, inputs = build.config, build.inputs
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
        return _source(inputs[f"text_{tower}"], field)

    frames = config.frames_of(build.step.name)
    sources = {frame: [source(field, frame) for field in sorted(read)] for frame in frames}
    return {"fields": fields, "online": online, "sources": sources}


def _source(artifact: Artifact, field: str) -> Source:
    return Source(field=field, folder=artifact.path, files=artifact.files)


def _images(build: Build, frame: Frame) -> Source:
    """The pictures; where they are stored in their own aspects, cropped to the frame."""
    images = _source(build.inputs["images"], "image")
    return images if build.config.data.image.frame.square else replace(images, size=Size(frame.size, frame.size))


def _family(artifact: Artifact, field: str, frame: Frame) -> Source:
    """The latents of one frame."""
    prefix = f"{frame.name}/"
    files = {name.removeprefix(prefix): entry for name, entry in artifact.files.items() if name.startswith(prefix)}
    return Source(field=field, folder=storage.join(artifact.path, frame.name), files=files)


def _train(build: Build, loop: Any, **payload: Any) -> Facts:
    from pipeline.cluster.rank import result

    _check_batches(build)
    _check_checkpoints(build)
    _catch_up(build)
    stretches = build.config.stretches_of(build.step.name)
    if result(build.building) is None:
        chosen = {name: build.inputs[f"view_{name}"] for _, name in stretches if name}
        settings = {
            "seed": build.config.seed,
            "cache": build.config.cluster.cache,
            "stall_s": build.config.cluster.stall_s,
            "flops": training_flops.per_picture(build.step.name, build.config),
        }
        held_out = build.inputs.get("held_out")
        build.train(loop, {**payload, **settings, "stretches": stretches, "views": chosen, "held_out": held_out})
    found = result(build.building)
    if found is None:  # all ranks have saved and gone, without an error and without a signal
        raise Preempted("a node is being taken away, and the training was saved")
    if PANEL in found["files"]:
        build.report.image("reconstructions", storage.read(storage.join(build.path, PANEL)), 0)
    return Facts(
        files={name: FileEntry(**entry) for name, entry in found["files"].items()},
        rows=found["rows"],
        call=CALL,
        workers=found["pids"],
        metrics=found["metrics"] | build.interruptions.metrics(),
    )


def _check_batches(build: Build) -> None:
    """Refuse a batch larger than the data before any worker starts: it would hold a sample twice."""
    data = {name: made for name, made in build.inputs.items() if not name.startswith(("stage_", "view_", "held_out"))}
    stored = min(artifact.manifest["rows"] for artifact in data.values())

    def rows(view: str | None) -> int:
        chosen, _ = _split(build.inputs.get(f"view_{view}"), build.inputs.get("held_out"))
        return chosen.rows if chosen else stored

    if told := batch_sizes.too_large(build.config, build.step.name, rows):
        raise UsageError(told)


def _check_checkpoints(build: Build) -> None:
    """Refuse checkpoints of another training, such as one that was carried here, before any worker starts."""
    from pipeline.cluster.rank import checkpoints_of
    from stages.training.checkpoint import CheckpointMismatch, require_recipe

    for name, training in build.config.trainings_of(build.step.name).items():
        states = Checkpoints(checkpoints_of(build.building, name), build.report.warning)
        try:
            for recipe in states.recipes():
                require_recipe(recipe, training.recipe(build.config.seed))
        except CheckpointMismatch as error:
            raise UsageError(f"{build.step.name}: {error}; remove {states.folder} to start again") from None


def _catch_up(build: Build) -> None:
    """Log what ranks did after their driver was killed, up to their last checkpoint: nobody heard of it then."""
    from pipeline.cluster.rank import log_of

    for name in build.config.trainings_of(build.step.name):
        folder = log_of(build.building, name)
        logs = json_files.read_each(folder, r"\d+\.json", lambda told: {int(step): told[step] for step in told})
        for step, values in sorted(item for logged in logs.values() for item in logged.items()):
            if step > build.interruptions.reached.get(name, 0):
                build.report.metrics(values, step)
                build.interruptions.reached[name] = step


def _split(view: Artifact | None, held_out: Artifact | None) -> tuple[View | None, View | None]:
    """What trainings see of a view's pictures (None: of all), None for all of them; and what is held out of these."""
    chosen = views.read(view.read(views.FILE)) if view else None
    if held_out is None:
        return chosen, None
    held = views.read(held_out.read(views.FILE))
    return (~held, held) if chosen is None else (chosen & ~held, chosen & held)


def _loaded(payload: dict[str, Any], where: "device") -> "list[tuple[Encoder, Encode]]":
    """The encoders of what is made online, with their models."""
    return [(encoder, encoder.load(where)) for encoder in payload["online"]]


def _training_data(
    payload: dict[str, Any], training: TrainingConfig, online: "list[tuple[Encoder, Encode]]"
) -> "TrainingData":
    """Batches by frame and view; squares of all sizes come in the same order, and so do buckets.

    Held-out samples do not depend on the seed, so that trainings can be compared.
    """
    from pipeline.models.encoders import EncodedBatches, TrainingData

    starts = accumulate((phase.steps for phase in training.phases), initial=0)
    spans = [
        Span(training.images_after(start), training.images_after(start + phase.steps), phase.batch_size)
        for start, phase in zip(starts, training.phases, strict=False)
        if phase.max_aspect > 1
    ]
    files = VerifiedFiles(payload["cache"].folder, int(payload["cache"].gib * 2**30))

    def split(view: str | None) -> tuple[View | None, View | None]:
        return _split(payload["views"].get(view), payload["held_out"])

    def seen(frame: Frame, view: str | None) -> Batches | BucketBatches:
        sources, (chosen, _) = payload["sources"][frame], split(view)
        if not frame.square:
            return BucketBatches(sources, frame, payload["seed"], spans, files, chosen)
        return Batches(sources, payload["seed"], files=files, view=chosen)

    def held_out(frame: Frame, held: View) -> Batches:
        sources = payload["sources"][frame]
        if not frame.square:
            return BucketBatches(sources, frame, 0, [], files, held).largest
        return Batches(sources, seed=0, window=1, files=files, view=held)

    def encoded(batches: Batches | BucketBatches, frame: Frame) -> EncodedBatches:
        return EncodedBatches(batches, frame, payload["fields"], online)

    batches = {(frame, view): encoded(seen(frame, view), frame) for frame, view in payload["stretches"]}
    last = training.phases[-1]
    frame, (_, held) = Frame(last.size, last.max_aspect), split(last.view)
    return TrainingData(batches, encoded(held_out(frame, held), frame) if held and held.rows else None)


def _loop_a(payload: dict[str, Any]) -> None:
    from pipeline.cluster.rank import Rank, seeded
    from pipeline.models.loading import existing
    from pipeline.models.panels import stage_a_panel
    from stages.models.discriminator import Discriminator
    from stages.models.stage_a import StageA, StageAObjective
    from stages.weights import pretrained

    settings: StageASettings = payload["settings"]
    assert settings.train is not None
    rank = Rank(payload)
    data = _training_data(payload, settings.train, _loaded(payload, rank.device))
    stage_a = seeded(payload["seed"], lambda: StageA(settings.model))
    if settings.weights:
        pretrained.fill(stage_a, existing("stage_a", settings.weights)["stage_a"], settings.model)
    discriminator = seeded(payload["seed"], Discriminator) if settings.loss.adversarial else None
    perceptual = _perceptual(settings.loss, rank.device)
    objective = StageAObjective(stage_a, settings.loss, discriminator, perceptual)

    def panel() -> bytes:
        return stage_a_panel(stage_a, data)

    if rank.train("stage_a", objective, settings.train, data, panel):
        rank.publish_model("stage_a", stage_a)
        rank.publish(PANEL, panel)
        rank.finish(data.largest.rows)


def _perceptual(loss: StageALoss, device: "device") -> "Perceptual | None":
    """The configured perceptual distance, on the device."""
    if not (loss.perceptual and loss.perceptual_weights):
        return None
    from pipeline.models.loading import state_dict
    from stages.training.perceptual import Perceptual

    heads = state_dict(loss.perceptual_heads) if loss.perceptual_heads else None
    return Perceptual(state_dict(loss.perceptual_weights), heads, device)


def _loop_b(payload: dict[str, Any]) -> None:
    from pipeline.cluster.rank import Rank, seeded
    from pipeline.models import loading
    from pipeline.models.loading import null_text
    from pipeline.models.panels import stage_b_panel
    from stages.models.compressor import Compressor, CompressorWarmup
    from stages.models.stage_b import StageB, StageBObjective
    from stages.weights import pretrained

    settings: StageBSettings = payload["settings"]
    assert settings.train is not None
    compressing: CompressorSettings = payload["compressor"]
    rank = Rank(payload)
    online = _loaded(payload, rank.device)  # for both trainings
    data = _training_data(payload, settings.train, online)
    compressor = seeded(payload["seed"], lambda: Compressor(compressing.model))
    start = loading.existing("stage_b", settings.weights, compressing.weights) if settings.weights else {}
    if settings.weights:
        pretrained.fill(compressor, start["compressor"], compressing.model)
    elif compressing.weights:
        pretrained.fill(compressor, loading.compressor_start(compressing.weights), compressing.model)
    if compressing.warmup and not settings.weights:
        loss, channels = compressing.warmup.loss, compressing.model.latent_channels
        warmup = seeded(
            payload["seed"], lambda: CompressorWarmup(compressor, channels, settings.model.latent_channels, loss)
        )
        rounds = compressing.warmup.train
        if not rank.train("compressor", warmup, rounds, _training_data(payload, rounds, online)):
            return
    stage_b = seeded(payload["seed"], lambda: StageB(settings.model))
    if settings.weights:
        pretrained.fill(stage_b, start["stage_b"], settings.model)
    objective = StageBObjective(
        stage_b, compressor, settings.loss, null_text(payload["text"]), train_compressor=compressing.joint
    )

    def panel() -> bytes:
        stage_a = loading.stage_a(payload["stage_a_model"], payload["stage_a"]).to(rank.device)
        return stage_b_panel(stage_a, stage_b, compressor, data)

    if rank.train("stage_b", objective, settings.train, data, panel):
        rank.publish_model("stage_b", stage_b)
        rank.publish_model("compressor", compressor)
        rank.publish(PANEL, panel)
        rank.finish(data.largest.rows)


def _loop_c(payload: dict[str, Any]) -> None:
    from pipeline.cluster.rank import Rank, seeded
    from pipeline.models.loading import existing, null_text
    from pipeline.models.panels import stage_c_panel
    from stages.models.stage_c import StageC, StageCObjective
    from stages.weights import pretrained

    settings: StageCSettings = payload["settings"]
    assert settings.train is not None
    rank = Rank(payload)
    data = _training_data(payload, settings.train, _loaded(payload, rank.device))
    stage_c = seeded(payload["seed"], lambda: StageC(settings.model))
    if settings.weights:
        pretrained.fill(stage_c, existing("stage_c", settings.weights)["stage_c"], settings.model)
    objective = StageCObjective(stage_c, settings.loss, null_text(payload["text"]))
    if rank.train("stage_c", objective, settings.train, data, lambda: stage_c_panel(stage_c, data)):
        rank.publish_model("stage_c", stage_c)
        rank.finish(data.largest.rows)


def _loop_previewer(payload: dict[str, Any]) -> None:
    from pipeline.cluster.rank import Rank, seeded
    from pipeline.models.panels import previewer_panel
    from stages.models.previewer import Previewer, PreviewerObjective

    settings: PreviewerSettings = payload["settings"]
    rank = Rank(payload)
    data = _training_data(payload, settings.train, _loaded(payload, rank.device))
    previewer = seeded(payload["seed"], lambda: Previewer(settings.model))

    def panel() -> bytes:
        return previewer_panel(previewer, data)

    if rank.train("previewer", PreviewerObjective(previewer, settings.loss), settings.train, data, panel):
        rank.publish_model("previewer", previewer)
        rank.publish(PANEL, panel)
        rank.finish(data.largest.rows)


def _loop_baseline(payload: dict[str, Any]) -> None:
    from pipeline.cluster.rank import Rank, seeded
    from pipeline.models import loading
    from pipeline.models.loading import null_text
    from pipeline.models.panels import baseline_panel
    from stages.models.baseline import Baseline, BaselineObjective

    settings: BaselineSettings = payload["settings"]
    rank = Rank(payload)
    data = _training_data(payload, settings.train, _loaded(payload, rank.device))
    baseline = seeded(payload["seed"], lambda: Baseline(settings.model))
    objective = BaselineObjective(baseline, settings.loss, null_text(payload["text"]))

    def panel() -> bytes:
        stage_a = loading.stage_a(payload["stage_a_model"], payload["stage_a"]).to(rank.device)
        return baseline_panel(stage_a, baseline, data)

    if rank.train("baseline", objective, settings.train, data, panel):
        rank.publish_model("baseline", baseline)
        rank.publish(PANEL, panel)
        rank.finish(data.largest.rows)
