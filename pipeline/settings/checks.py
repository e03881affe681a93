"""What the sections of a config ask of each other.

Each check takes the sections that it compares. Its `ValueError` is one sentence that names the key and what to do.
"""

import math
from collections.abc import Callable, Mapping, Sequence, Set
from functools import partial

from datasets.buckets import STEP, Frame
from datasets.config import ImageConfig, ViewConfig
from pipeline.settings.evaluation import HELD_OUT, NULL, OURS, REFERENCE, TRAINING, Eval
from pipeline.settings.resources import Cluster
from pipeline.settings.sections import (
    LATENTS,
    WARMUP,
    WITHOUT_BLOCKS,
    Baseline,
    Compressor,
    Encode,
    Interpolation,
    Previewer,
    Sampling,
    StageA,
    StageB,
    StageC,
)
from stages.settings.models import CODE_STRIDE, CompressorConfig, StageAConfig, StageCConfig, TextConfig
from stages.settings.training import Phase, TrainingConfig

Trainings = Mapping[str, TrainingConfig]  # by their dotted keys


# ------------------------------------------------------------------------------------------------- of the stages


def has_an_origin(stage: str, section: StageA | StageB | StageC) -> None:
    """A stage is trained, or its weights are there."""
    if section.train is None and section.weights is None:
        raise ValueError(f"{stage}: train and weights are both null; give {stage}.weights=PATH or a training")


def lies_between(between: Interpolation, stage_c: StageC) -> None:
    """Stage C's weights come from one place, and the phases between which they lie are there."""
    if stage_c.weights and not between.phases:
        raise ValueError("stage_c.weights and interpolate both give Stage C's weights; leave one of them null")
    for key, number in between.phases.items():
        if stage_c.train is None or number > len(stage_c.train.phases):
            has = f"has {len(stage_c.train.phases)}" if stage_c.train else "is null"
            raise ValueError(
                f"{key}={number} is a phase of stage_c.train, which {has}; give another, or interpolate=null"
            )


def tower_fits(key: str, section: StageB | StageC | Baseline, towers: Mapping[str, TextConfig]) -> None:
    """A model's text tower is there and gives the width that it takes."""
    if section.text not in towers:
        raise ValueError(f"{key}.text names the tower '{section.text}', but text has {', '.join(towers)}")
    width, wanted = towers[section.text].width, section.model.text_width
    if width != wanted:
        raise ValueError(f"{key}.model.text_width is {wanted}, but the tower '{section.text}' gives width {width}")


def channels_agree(
    a: StageA, compressor: Compressor, b: StageB, c: StageC, previewer: Previewer, baseline: Baseline
) -> None:
    """Each model takes as many channels as what it works on has."""
    latents, code = a.model.latent_channels, compressor.model.latent_channels
    for key, value, wanted in (
        ("stage_b.model.latent_channels", b.model.latent_channels, latents),
        ("stage_b.model.code_channels", b.model.code_channels, code),
        ("stage_c.model.latent_channels", c.model.latent_channels, code),
        ("previewer.model.latent_channels", previewer.model.latent_channels, code),
        ("baseline.model.latent_channels", baseline.model.latent_channels, latents),
    ):
        if value != wanted:
            raise ValueError(f"{key}={value}: what it works on has {wanted} channels")


def latents_are_a_quarter(model: StageAConfig) -> None:
    """Stage A's latents have the side that Stage B draws."""
    if model.levels != 2:
        raise ValueError(
            f"stage_a.model.levels={model.levels}: Stage B draws latents of a quarter of the picture's side, which "
            "takes 2 levels"
        )


def can_be_released(targets: Sequence[str], model: StageCConfig) -> None:
    """What is released speaks the language of the stock pipelines."""
    if "release" in targets and not model.scaled_codes:
        raise ValueError(
            "stage_c.model.scaled_codes=false: the stock pipelines that a release is for take (code + 1) / 42; "
            "leave release out of targets"
        )


def samples_are_squares(sample: Sampling) -> None:
    """What is drawn has the shape of what it is compared with."""
    if sample.width != sample.height:
        raise ValueError(
            f"sample.width={sample.width}, sample.height={sample.height}: samples are compared with the stored "
            "pictures, which are square; `sample` takes any width= and height="
        )


def prompt_sets_are_there(prompts: Mapping[str, str], sets: Mapping[str, str], holds_out: bool) -> None:
    """Captions of the data are called what they are, and there are some."""
    for name, place in prompts.items():
        if place in (HELD_OUT, TRAINING) and name != place:
            raise ValueError(
                f"eval.prompts.{name}={place}: captions of the data are called what they are; name it {place}"
            )
        if name in (HELD_OUT, TRAINING) and name != place:
            raise ValueError(f"eval.prompts.{name}={place}: captions of the data are called so; give it another name")
    if HELD_OUT in sets and not holds_out:
        raise ValueError("eval.prompts.held_out: nothing is held out; give data.holdout, such as 0.01, or another set")


def rivals_are_known(settings: Eval, sets: Mapping[str, str]) -> None:
    """A rival's name is free, and its prompt sets are there."""
    for name, place in settings.rivals.items():
        if name in (OURS, NULL, REFERENCE):
            whose = "the real pictures" if name == REFERENCE else "our own pictures"
            raise ValueError(f"eval.rivals.{name}: this name is that of {whose}; take another")
        for unknown in sorted(place.keys() - sets.keys()) if isinstance(place, dict) else ():
            raise ValueError(f"eval.rivals.{name}.{unknown}: there is no such prompt set; there are {', '.join(sets)}")
    for unknown in sorted(settings.distances.references.keys() - sets.keys()):
        known = ", ".join(sets)
        raise ValueError(f"eval.distances.references.{unknown}: there is no such prompt set; there are {known}")


# ----------------------------------------------------------------------------------------------- of the pictures


def sizes_in_steps(trainings: Trainings) -> None:
    """Pictures of all phases but Stage A's come in steps of 128 px."""
    for key, phase in _phases(trainings):
        if phase.size % STEP and not key.startswith("stage_a."):
            raise ValueError(f"{key}.size={phase.size}: must be a multiple of {STEP} px")


def sizes_fit(trainings: Trainings, image: ImageConfig) -> None:
    """No phase sees larger pictures than are stored."""
    for key, phase in _phases(trainings):
        if phase.size > image.size:
            raise ValueError(
                f"{key}.size={phase.size} is larger than the stored pictures, data.image.size={image.size}"
            )


def aspects_fit(trainings: Trainings, image: ImageConfig) -> None:
    """No phase sees longer pictures than are stored, and where there are buckets, there are several."""
    frames = {"data.image": image.frame}
    frames |= {key: Frame(phase.size, phase.max_aspect) for key, phase in _phases(trainings)}
    for key, frame in frames.items():
        if frame.max_aspect > image.max_aspect:
            raise ValueError(
                f"{key}.max_aspect={frame.max_aspect:g} is more than what is stored, "
                f"data.image.max_aspect={image.max_aspect:g}"
            )
        if not frame.square and (frame.size % STEP or len(frame.sizes) == 1):
            raise ValueError(
                f"{key}: in steps of {STEP} px there is no other size than the square of {frame.size} px up to "
                f"max_aspect={frame.max_aspect:g}; raise size or max_aspect, or leave max_aspect at 1"
            )


def stored_in_steps(image: ImageConfig) -> None:
    """Stored pictures come in steps of 128 px."""
    if image.size % STEP:
        raise ValueError(f"data.image.size={image.size}: must be a multiple of {STEP} px")


def codes_have_a_side(model: CompressorConfig, smallest: int) -> None:
    """The compressor makes a code of every picture; `smallest` is the shortest side that it sees, px."""
    if model.code_side(smallest) < 1:
        raise ValueError(
            f"compressor.model.input_ratio={model.input_ratio:g} leaves {model.seen_side(smallest)} px of pictures of "
            f"{smallest} px, too few for a code; raise it until {CODE_STRIDE} px or more are left"
        )


def losses_can_judge(a: StageA, smallest: int) -> None:
    """Stage A's pictures or crops are large enough for its losses; `smallest` is its pictures' shortest side, px."""
    crop = a.loss.crop
    if crop is not None and crop > smallest:
        raise ValueError(f"stage_a.loss.crop={crop} is larger than the pictures of a phase, {smallest} px")
    if (crop or smallest) < a.loss.smallest_side:
        raise ValueError(
            f"stage_a.loss: pictures or crops of {crop or smallest} px are too small for the perceptual or the "
            f"adversarial loss; use {a.loss.smallest_side} px or more, or weights of 0"
        )


def views_exist(trainings: Trainings, views: Mapping[str, ViewConfig]) -> None:
    """The view of a phase is there, and asks for no other aspect ratios."""
    for key, phase in _phases(trainings):
        if phase.view is not None and phase.max_aspect > 1:
            raise ValueError(f"{key}: a phase takes view or max_aspect, not both; drop one")
        if phase.view is not None and phase.view not in views:
            known = ", ".join(views) or "no views; give data.views.NAME.min_aesthetic=... or the like"
            raise ValueError(f"{key}.view={phase.view}: data.views has {known}")


def latents_are_stored(latents: str, online: bool, teacher: str, stored: Sequence[Frame]) -> None:
    """Latents that are a target come to be: they are stored for the training of a stage, in the frames `stored`."""
    if online:
        raise ValueError(f"targets: encode.{latents}.mode=online stores none; set it to cached, or leave {latents} out")
    if not stored:
        raise ValueError(
            f"targets: {latents} are stored for the training of {teacher}, of which this config has none; leave "
            f"{latents} out"
        )


def latents_suffice(latents: str, teacher: str, stored: Sequence[Frame], student: str, seen: Sequence[Frame]) -> None:
    """A training finds latents of all that it sees among those that are stored for another one, its teacher's."""
    if not stored:
        raise ValueError(
            f"{student} takes the {latents} that are stored for the training of {teacher}, of which this config has "
            f"none; set encode.{latents}.mode=online"
        )
    for frame in seen:
        if frame not in stored:
            raise ValueError(
                f"{student}.train.phases has pictures of {frame.name} px, but it trains on the latents of "
                f"{teacher}.train.phases, which are of {', '.join(one.name for one in stored)} px"
            )


# ---------------------------------------------------------------------------------------------- of the trainings


def best_can_be_told(trainings: Trainings, holds_out: bool, adaptive: Set[str]) -> None:
    """Where the best weights are kept, there is something to measure them on; `adaptive` are keys of such losses."""
    for key, training in trainings.items():
        if training.keeps_best and not holds_out:
            raise ValueError(
                f"{key}.validation.keep=best needs pictures that no training sees: give data.holdout, such as 0.01, or "
                "use last"
            )
        if training.keeps_best and key in adaptive:
            raise ValueError(
                f"{key}.validation.keep=best: adaptive weights change the scale of the loss while they learn, so that "
                "no step's loss can be compared; use last, or another loss.weight"
            )


def pictures_can_be_augmented(trainings: Trainings, encode: Encode) -> None:
    """Latents are made of the pictures as they were changed."""
    for key, training in trainings.items():
        latents = LATENTS.get(key)
        if training.augment and latents and not getattr(encode, latents).online:
            raise ValueError(
                f"{key}.augment changes pictures of which it reads stored latents; set encode.{latents}.mode=online"
            )


def panels_can_be_drawn(trainings: Trainings) -> None:
    """The warm-up makes no pictures."""
    if WARMUP in trainings and trainings[WARMUP].panel_every:
        raise ValueError(f"{WARMUP}.panel_every: the warm-up makes no pictures; leave it null")


def blocks_can_be_recomputed(trainings: Trainings) -> None:
    """Activations are recomputed where there are blocks."""
    for key, training in trainings.items():
        if training.checkpointing is True and key in WITHOUT_BLOCKS:
            raise ValueError(f"{key}.checkpointing=true: this model has no blocks to recompute; leave it false")


def muon_has_matrices(trainings: Trainings) -> None:
    """Muon is asked for where there are blocks, whose matrices it takes."""
    for key, training in trainings.items():
        if training.muon and key in WITHOUT_BLOCKS:
            raise ValueError(f"{key}.muon: this model has no blocks, whose matrices Muon takes; leave it null")


def fewer_workers_are_fewer(min_workers: int | None, workers: int) -> None:
    """A training goes on with no more ranks than it began with."""
    if (min_workers or 0) > workers:
        raise ValueError(f"cluster.min_workers={min_workers} is more than workers={workers}; lower it")


def workers_have_nodes(workers: int, cluster: Cluster) -> None:
    """The cluster's nodes, where they are known, have room for the ranks."""
    nodes, each = cluster.nodes, cluster.gpus_per_worker
    if nodes is None:
        return
    on_node = nodes.cpus // cluster.cpus_per_worker
    if nodes.gpus and each and cluster.device != "cpu":
        on_node = nodes.gpus // each
        if (cores := on_node * cluster.cpus_per_worker) > nodes.cpus:
            raise ValueError(
                f"cluster.cpus_per_worker={cluster.cpus_per_worker}: the {on_node} ranks of a node want {cores} cores, "
                f"cluster.nodes.cpus={nodes.cpus}; lower it to {nodes.cpus // on_node}"
            )
    if workers > on_node * nodes.count:
        raise ValueError(
            f"workers={workers}: cluster.nodes has room for {on_node * nodes.count}, {on_node} on each of "
            f"{nodes.count}; lower workers, or tell of more nodes"
        )


def ranks_key(key: str, training: TrainingConfig, workers: int) -> str:
    """The key that says how many ranks a training has."""
    return f"{key}.ranks" if training.ranks_among(workers) < workers else "workers"


def ranks_agree(trainings: Trainings, workers: int) -> None:
    """The trainings of one step, one after the other, have the same ranks: starting others takes a job of its own."""
    ranks = {key: training.ranks_among(workers) for key, training in trainings.items()}
    if len(set(ranks.values())) > 1:
        told = " and ".join(f"{key}.ranks={training.ranks or 'null'}" for key, training in trainings.items())
        raise ValueError(f"{told} differ, but one step does both on the same ranks; give both the same number")


def batches_divide(trainings: Trainings, workers: int) -> None:
    """All batches divide among the ranks of their training."""
    for key, training in trainings.items():
        named = ranks_key(key, training, workers)
        try:
            training.require_divisible(training.ranks_among(workers), named)
        except ValueError as error:
            near = _nearest_workers if named == "workers" else partial(_nearest_ranks, key)
            raise ValueError(f"{key}.{error}{near(trainings, workers)}") from None


def pairs_stay_together(key: str, training: TrainingConfig, workers: int) -> None:
    """Where samples are mixed in pairs, both of a pair go through the model at once, however a batch is cut up."""
    ranks = training.ranks_among(workers)
    if training.parts_pairs(ranks):
        raise ValueError(
            f"stage_c.loss.mixup mixes pairs of samples: give {key} an even micro_batch, or null, and batches that "
            f"divide by {2 * ranks}, twice its ranks"
        )


def _nearest_workers(trainings: Trainings, workers: int) -> str:
    """A hint at the numbers of workers next to ours among which the batches of all trainings divide, if any."""
    deciding = {key: one for key, one in trainings.items() if one.ranks_among(workers) == workers}

    def fits(world: int) -> bool:
        return all(one.divides(one.ranks_among(world)) for one in trainings.values())

    return _nearest("workers", workers, deciding, fits)


def _nearest_ranks(key: str, trainings: Trainings, workers: int) -> str:
    """The same of the ranks of one training, which are no more than `workers`."""
    training = trainings[key]

    def fits(world: int) -> bool:
        return world <= workers and training.divides(world)

    return _nearest(f"{key}.ranks", training.ranks_among(workers), {key: training}, fits)


def _nearest(key: str, number: int, trainings: Trainings, fits: Callable[[int], bool]) -> str:
    """A hint at those numbers that fit, of all that divide the batches, which are next to ours."""
    common = math.gcd(*(phase.batch_size for _, phase in _phases(trainings)))
    fitting = [world for world in range(1, common + 1) if common % world == 0 and fits(world)]
    fewer = [world for world in fitting if world < number][-1:]
    more = [world for world in fitting if world > number][:1]
    return f"; use {key}={' or '.join(map(str, fewer + more))}" if fitting else ""


def _phases(trainings: Trainings) -> list[tuple[str, Phase]]:
    """The phases of all trainings, each with its dotted key."""
    return [
        (f"{key}.phases.{number}", phase)
        for key, training in trainings.items()
        for number, phase in enumerate(training.phases)
    ]
