"""The trainings: a Ray Train job each, around the one loop of `stages.loop`."""

from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from datasets import storage, views
from datasets.batches import Batches, Source
from datasets.bucket_batches import BucketBatches, Span
from datasets.buckets import Frame, Size
from datasets.cache import VerifiedFiles
from datasets.storage import FileEntry
from pipeline.artifacts import Artifact
from pipeline.build import Build, Facts
from pipeline.config import Baseline as BaselineSettings
from pipeline.config import Compressor as CompressorSettings
from pipeline.config import Previewer as PreviewerSettings
from pipeline.config import StageA as StageASettings
from pipeline.config import StageB as StageBSettings
from pipeline.config import StageC as StageCSettings
from pipeline.errors import UsageError
from stages.config import StageALoss, TrainingConfig

if TYPE_CHECKING:
    from torch import Tensor, device

    from pipeline.encoders import Encode, EncodedBatches, Encoder
    from stages.baseline import Baseline
    from stages.compressor import Compressor
    from stages.perceptual import Perceptual
    from stages.previewer import Previewer
    from stages.stage_a import StageA
    from stages.stage_b import StageB

    Stretch = tuple[Frame, str | None]  # how pictures are seen, name of the view
    Data = dict[Stretch, EncodedBatches]

PANEL = "panel.png"  # reconstructions of some training pictures
PANEL_ROWS = 16
PERCEPTUAL_OFF = "the perceptual loss is off: stage_a.loss.perceptual_weights names no VGG16 weights"
PANEL_STEPS = 12  # model calls of Stage B, or of the baseline
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
    from pipeline import models

    stored = build.inputs.get("latents_c")
    if stored is None:
        return build.inputs["stage_b"].files[models.COMPRESSOR].sha256
    seen = stored.manifest["notes"].get("spec", {}).get("weights")
    if stage_b := stored.parent("stage_b"):
        models.check_compressor(seen, stage_b, "latents_c")
    return seen


def _data(build: Build, *fields: str, tower: str | None = None) -> dict[str, Any]:
    """Where the fields of a training's batches come from: stored ones by frame, and the encoders of others."""
    from pipeline import encoders

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
    from pipeline.rank import result

    _check_batches(build)
    stretches = build.config.stretches_of(build.step.name)
    if result(build.building) is None:
        chosen = {name: build.inputs[f"view_{name}"] for _, name in stretches if name}
        settings = {"seed": build.config.seed, "cache": build.config.cluster.cache}
        build.train(loop, {**payload, **settings, "stretches": stretches, "views": chosen})
    found = result(build.building)
    assert found is not None, "the job ended without a result, yet without an error"
    if PANEL in found["files"]:
        build.report.image("reconstructions", storage.read(storage.join(build.path, PANEL)), 0)
    return Facts(
        files={name: FileEntry(**entry) for name, entry in found["files"].items()},
        rows=found["rows"],
        call=CALL,
        workers=found["pids"],
        metrics=found["metrics"],
    )


def _check_batches(build: Build) -> None:
    """Refuse a batch larger than the data before any worker starts: it would hold a sample twice."""
    data = {name: made for name, made in build.inputs.items() if not name.startswith(("stage_", "view_"))}
    stored = min(artifact.manifest["rows"] for artifact in data.values())
    for training in build.config.trainings_of(build.step.name):
        for phase in training.phases:
            rows = build.inputs[f"view_{phase.view}"].manifest["rows"] if phase.view else stored
            if phase.batch_size > rows:
                seen, loosen = (f"view {phase.view}", "loosen the view") if phase.view else ("data", "raise data.limit")
                raise UsageError(
                    f"{build.step.name}: a batch of {phase.batch_size} is larger than the {seen}, which has {rows} "
                    f"rows; lower batch_size of the training's phases, or {loosen}"
                )


def _loaded(payload: dict[str, Any], where: "device") -> "list[tuple[Encoder, Encode]]":
    """The encoders of what is made online, with their models."""
    return [(encoder, encoder.load(where)) for encoder in payload["online"]]


def _batches(
    payload: dict[str, Any],
    training: TrainingConfig,
    where: "device",
    online: "list[tuple[Encoder, Encode]] | None" = None,
) -> "Data":
    """Batches by frame and view; squares of all sizes come in the same order, and so do buckets.

    A job of several trainings gives the `online` encoders, which may be large, to each; else they are loaded here.
    """
    from pipeline.encoders import EncodedBatches

    starts = accumulate((phase.steps for phase in training.phases), initial=0)
    spans = [
        Span(training.images_after(start), training.images_after(start + phase.steps), phase.batch_size)
        for start, phase in zip(starts, training.phases, strict=False)
        if phase.max_aspect > 1
    ]
    files = VerifiedFiles(payload["cache"].folder, int(payload["cache"].gib * 2**30))
    online = _loaded(payload, where) if online is None else online
    chosen = {name: views.read(artifact.read(views.FILE)) for name, artifact in payload["views"].items()}

    def stored(frame: Frame, view: str | None) -> Batches | BucketBatches:
        sources = payload["sources"][frame]
        if not frame.square:
            return BucketBatches(sources, frame, payload["seed"], spans, files)
        return Batches(sources, payload["seed"], files=files, view=chosen[view] if view else None)

    return {
        (frame, view): EncodedBatches(stored(frame, view), frame, payload["fields"], online)
        for frame, view in payload["stretches"]
    }


def _largest(batches: "Data") -> "EncodedBatches":
    return batches[max(batches, key=lambda stretch: stretch[0])]


def _loop_a(payload: dict[str, Any]) -> None:
    from pipeline.models import existing, weights
    from pipeline.rank import Rank, seeded
    from stages import pretrained
    from stages.discriminator import Discriminator
    from stages.stage_a import StageA, StageAObjective

    settings: StageASettings = payload["settings"]
    assert settings.train is not None
    rank = Rank(payload)
    batches = _batches(payload, settings.train, rank.device)
    stage_a = seeded(payload["seed"], lambda: StageA(settings.model))
    if settings.weights:
        pretrained.fill(stage_a, existing("stage_a", settings.weights)["stage_a"], settings.model)
    discriminator = seeded(payload["seed"], Discriminator) if settings.loss.adversarial else None
    perceptual = _perceptual(settings.loss, rank.device)
    objective = StageAObjective(stage_a, settings.loss, discriminator, perceptual)
    if rank.train("stage_a", objective, settings.train, batches):
        rank.publish("stage_a.safetensors", weights(stage_a))
        rank.publish(PANEL, _panel_a(stage_a, batches))
        rank.finish(_largest(batches).rows)


def _perceptual(loss: StageALoss, device: "device") -> "Perceptual | None":
    """The configured perceptual distance, on the device."""
    if not (loss.perceptual and loss.perceptual_weights):
        return None
    from pipeline.models import state_dict
    from stages.perceptual import Perceptual

    heads = state_dict(loss.perceptual_heads) if loss.perceptual_heads else None
    return Perceptual(state_dict(loss.perceptual_weights), heads, device)


def _loop_b(payload: dict[str, Any]) -> None:
    from pipeline import models
    from pipeline.models import null_text, weights
    from pipeline.rank import Rank, seeded
    from stages import pretrained
    from stages.compressor import Compressor, CompressorWarmup
    from stages.stage_b import StageB, StageBObjective

    settings: StageBSettings = payload["settings"]
    assert settings.train is not None
    compressing: CompressorSettings = payload["compressor"]
    rank = Rank(payload)
    online = _loaded(payload, rank.device)
    batches = _batches(payload, settings.train, rank.device, online)
    compressor = seeded(payload["seed"], lambda: Compressor(compressing.model))
    start = models.existing("stage_b", settings.weights, compressing.weights) if settings.weights else {}
    if settings.weights:
        pretrained.fill(compressor, start["compressor"], compressing.model)
    elif compressing.weights:
        pretrained.fill(compressor, models.compressor_start(compressing.weights), compressing.model)
    if compressing.warmup and not settings.weights:
        loss, channels = compressing.warmup.loss, compressing.model.latent_channels
        warmup = seeded(
            payload["seed"], lambda: CompressorWarmup(compressor, channels, settings.model.latent_channels, loss)
        )
        rounds = compressing.warmup.train
        if not rank.train("compressor", warmup, rounds, _batches(payload, rounds, rank.device, online)):
            return
    stage_b = seeded(payload["seed"], lambda: StageB(settings.model))
    if settings.weights:
        pretrained.fill(stage_b, start["stage_b"], settings.model)
    objective = StageBObjective(
        stage_b, compressor, settings.loss, null_text(payload["text"]), train_compressor=compressing.joint
    )
    if rank.train("stage_b", objective, settings.train, batches):
        rank.publish("stage_b.safetensors", weights(stage_b))
        rank.publish("compressor.safetensors", weights(compressor))
        stage_a = models.stage_a(payload["stage_a_model"], payload["stage_a"]).to(rank.device)
        rank.publish(PANEL, _panel_b(stage_a, stage_b, compressor, batches))
        rank.finish(_largest(batches).rows)


def _loop_c(payload: dict[str, Any]) -> None:
    from pipeline.models import existing, null_text, weights
    from pipeline.rank import Rank, seeded
    from stages import pretrained
    from stages.stage_c import StageC, StageCObjective

    settings: StageCSettings = payload["settings"]
    assert settings.train is not None
    rank = Rank(payload)
    batches = _batches(payload, settings.train, rank.device)
    stage_c = seeded(payload["seed"], lambda: StageC(settings.model))
    if settings.weights:
        pretrained.fill(stage_c, existing("stage_c", settings.weights)["stage_c"], settings.model)
    objective = StageCObjective(stage_c, settings.loss, null_text(payload["text"]))
    if rank.train("stage_c", objective, settings.train, batches):
        rank.publish("stage_c.safetensors", weights(stage_c))
        rank.finish(_largest(batches).rows)


def _loop_previewer(payload: dict[str, Any]) -> None:
    from pipeline.models import weights
    from pipeline.rank import Rank, seeded
    from stages.previewer import Previewer, PreviewerObjective

    settings: PreviewerSettings = payload["settings"]
    rank = Rank(payload)
    batches = _batches(payload, settings.train, rank.device)
    previewer = seeded(payload["seed"], lambda: Previewer(settings.model))
    if rank.train("previewer", PreviewerObjective(previewer, settings.loss), settings.train, batches):
        rank.publish("previewer.safetensors", weights(previewer))
        rank.publish(PANEL, _panel_previewer(previewer, batches))
        rank.finish(_largest(batches).rows)


def _loop_baseline(payload: dict[str, Any]) -> None:
    from pipeline import models
    from pipeline.models import null_text, weights
    from pipeline.rank import Rank, seeded
    from stages.baseline import Baseline, BaselineObjective

    settings: BaselineSettings = payload["settings"]
    rank = Rank(payload)
    batches = _batches(payload, settings.train, rank.device)
    baseline = seeded(payload["seed"], lambda: Baseline(settings.model))
    objective = BaselineObjective(baseline, settings.loss, null_text(payload["text"]))
    if rank.train("baseline", objective, settings.train, batches):
        rank.publish("baseline.safetensors", weights(baseline))
        stage_a = models.stage_a(payload["stage_a_model"], payload["stage_a"]).to(rank.device)
        rank.publish(PANEL, _panel_baseline(stage_a, baseline, batches))
        rank.finish(_largest(batches).rows)


def _panel_batch(batches: "Data") -> "dict[str, Tensor]":
    """Some samples, pictures at the largest size that was trained at."""
    import torch

    return {name: torch.from_numpy(values) for name, values in _largest(batches).first(PANEL_ROWS).items()}


def _panel_a(stage_a: "StageA", batches: "Data") -> bytes:
    """PNG of some pictures, and what Stage A makes of them with and without its codebook."""
    from stages.grid import grid
    from stages.sample import reconstruct_a

    pictures = _panel_batch(batches)["image"].to(next(stage_a.parameters()).device)
    stage_a.eval()
    columns = [
        pictures.permute(0, 2, 3, 1).cpu().numpy(),
        reconstruct_a(stage_a, pictures).numpy(),
        reconstruct_a(stage_a, pictures, quantised=True).numpy(),
    ]
    return grid(("original", "Stage A", "by the codebook"), [("", row) for row in zip(*columns, strict=True)], blocks=4)


def _panel_b(stage_a: "StageA", stage_b: "StageB", compressor: "Compressor", batches: "Data") -> bytes:
    """PNG of some pictures, what Stage A makes of them, and what Stage B makes of their compressor codes."""
    from stages.grid import grid
    from stages.sample import reconstruct_a, reconstruct_b

    batch = _panel_batch(batches)
    stage_b.eval()
    compressor.eval()
    device = next(stage_b.parameters()).device
    pictures, text = batch["image"].to(device), batch["text"].float().to(device)
    seeds = range(len(pictures))
    columns = [
        batch["image"].permute(0, 2, 3, 1).numpy(),
        reconstruct_a(stage_a, pictures).numpy(),
        reconstruct_b(stage_a, stage_b, compressor, pictures, text, seeds, PANEL_STEPS).numpy(),
    ]
    return grid(
        ("original", "Stage A alone", "Stages B + A"),
        [("", row) for row in zip(*columns, strict=True)],
        blocks=4,
    )


def _panel_previewer(previewer: "Previewer", batches: "Data") -> bytes:
    """PNG of some pictures, what the previewer is to make of them, and what it makes of their codes."""
    from stages.grid import grid
    from stages.layers import resized
    from stages.sample import preview

    batch = _panel_batch(batches)
    previewer.eval()
    previews = preview(previewer, batch["latents_c"].float().to(next(previewer.parameters()).device))
    columns = [
        batch["image"].permute(0, 2, 3, 1).numpy(),
        resized(batch["image"], tuple(previews.shape[1:3])).permute(0, 2, 3, 1).numpy(),
        previews.numpy(),
    ]
    return grid(("original", "made smaller", "preview"), [("", row) for row in zip(*columns, strict=True)], blocks=4)


def _panel_baseline(stage_a: "StageA", baseline: "Baseline", batches: "Data") -> bytes:
    """PNG of some pictures as Stage A keeps them, and what the baseline draws from their captions."""
    from stages.grid import grid
    from stages.sample import generate_baseline, to_pixels

    batch = _panel_batch(batches)
    baseline.eval()
    device = next(baseline.parameters()).device
    latents, text = batch["latents_a"].float().to(device), batch["text"].float().to(device)
    height, width = (stage_a.side_ratio * side for side in latents.shape[-2:])
    drawn = generate_baseline(
        stage_a,
        baseline,
        text,
        text,
        range(len(text)),
        width=width,
        height=height,
        steps=PANEL_STEPS,
        guidance=1.0,
    )
    columns = [to_pixels(stage_a.decode(latents)).numpy(), drawn.numpy()]
    return grid(("Stage A alone", "from the caption"), [("", row) for row in zip(*columns, strict=True)], blocks=4)
