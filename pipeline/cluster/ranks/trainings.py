"""What each training trains, and the one job that runs them: a rank takes an order and does its trainings in turn.

The table at the end has a row a training. The compressor and the perceptual loss are imported where they are made:
torchvision takes a while to load, and most workers need neither.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from pipeline.cluster.board import BoardClient
from pipeline.cluster.ranks.job import Job
from pipeline.cluster.ranks.rank import Rank
from pipeline.models import loading, panels
from pipeline.models.panels import Panel
from pipeline.models.showing import Decoder, Prompts, Shower
from pipeline.models.training_data import Reading, TrainingData
from pipeline.settings.sections import Baseline as BaselineSettings
from pipeline.settings.sections import Compressor as CompressorSettings
from pipeline.settings.sections import Previewer as PreviewerSettings
from pipeline.settings.sections import StageA as StageASettings
from pipeline.settings.sections import StageB as StageBSettings
from pipeline.settings.sections import StageC as StageCSettings
from pipeline.store.artifacts import Artifact
from stages.models.baseline import Baseline, BaselineObjective
from stages.models.discriminator import Discriminator
from stages.models.previewer import Previewer, PreviewerObjective
from stages.models.stage_a import StageA, StageAObjective
from stages.models.stage_b import StageB, StageBObjective
from stages.models.stage_c import StageC, StageCObjective
from stages.settings.models import StageAConfig
from stages.settings.training import TrainingConfig
from stages.training.trainer import be_deterministic
from stages.weights import pretrained
from stages.weights.pretrained import Found

if TYPE_CHECKING:
    from stages.models.compressor import Compressor, CompressorWarmup

PANEL = "panel.png"  # the last panel of a step
M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Order:
    """What the ranks of a step are to train, one after the other, and of what; can be sent to them.

    `settings` are the config's section of what the step is named after. `stage_a` and `text` are artifacts that some
    trainings read besides their batches: the first stage, and the tower's hidden states of the empty caption. `decoder`
    is what shows codes; None where none is there yet. `prompts` are drawn in panels beside the data's captions.
    """

    trainings: Mapping[str, TrainingConfig]
    settings: Any
    compressor: CompressorSettings
    stage_a_model: StageAConfig
    stage_a: Artifact | None
    text: Artifact | None
    reading: Reading
    seed: int
    decoder: Decoder | None = None
    prompts: Prompts | None = None


@dataclass(frozen=True)
class Row:
    """A training: its objective, the parts of that whose weights come out, and the panel that shows what they can do.

    The objective is made of the order, for a device, after that of the step's training before it, if there is one.
    `fields` are those of the order's batches that it reads; None: all.
    """

    objective: Callable[[Order, torch.device, Any], nn.Module]
    publishes: tuple[str, ...] = ()
    panel: Callable[[Order, Any, TrainingData, Shower | None], Panel] | None = None
    ends_with_panel: bool = True
    shows_codes: bool = False  # which takes a decoder
    fields: Callable[[Order], tuple[str, ...]] | None = None


def run(order: Order, job: Job, board: BoardClient) -> None:
    """Do the trainings of an order on one rank and publish what came out, or save and stop before the end."""
    rank = Rank(job, board)
    with rank.logged(), rank.sampled():
        _run(rank, order)


def _run(rank: Rank, order: Order) -> None:
    if rank.device.type == "cuda" and any(training.deterministic for training in order.trainings.values()):
        be_deterministic()  # before anything is encoded: cuBLAS looks only when it begins
    online = order.reading.loaded(rank.device)  # for all trainings
    objective, rows = None, 0
    for name, training in order.trainings.items():
        row = TRAININGS[name]
        reading = order.reading.only(row.fields(order)) if row.fields else order.reading
        data = reading.data(training, online)
        objective = row.objective(order, rank.device, objective)
        panel = _panel(row, order, objective, data)
        if not rank.train(name, objective, training, data, panel):
            return
        for part in row.publishes:
            rank.publish_model(part, objective.get_submodule(part))
        if panel and row.ends_with_panel:
            rank.publish(PANEL, lambda panel=panel: panel().png())  # type: ignore[misc]
        rows = data.largest.rows
    rank.finish(rows)


def _panel(row: Row, order: Order, objective: nn.Module, data: TrainingData) -> Callable[[], Panel] | None:
    """What makes a training's panels, where it has any and they can be seen."""
    if row.panel is None or (row.shows_codes and order.decoder is None):
        return None
    return partial(row.panel, order, objective, data, Shower(order.decoder, order.prompts) if order.decoder else None)


def seeded(seed: int, make: Callable[[], M]) -> M:
    """Make a module with initial weights that depend on the seed only."""
    torch.manual_seed(seed)
    return make()


def _stage_a(order: Order, where: torch.device, before: None) -> StageAObjective:
    settings: StageASettings = order.settings
    stage_a = seeded(order.seed, lambda: StageA(settings.model))
    if settings.weights:
        pretrained.fill(stage_a, loading.existing("stage_a", settings.weights)["stage_a"], settings.model)
    discriminator = seeded(order.seed, Discriminator) if settings.loss.adversarial else None
    perceptual = loading.perceptual(settings.loss, where) if settings.loss.perceptual else None
    return StageAObjective(stage_a, settings.loss, discriminator, perceptual)


def _warmup(order: Order, where: torch.device, before: None) -> "CompressorWarmup":
    from stages.models.compressor import CompressorWarmup

    settings: StageBSettings = order.settings
    assert order.compressor.warmup is not None
    compressor, loss = _compressor(order, None), order.compressor.warmup.loss
    channels = order.compressor.model.latent_channels, settings.model.latent_channels
    return seeded(order.seed, lambda: CompressorWarmup(compressor, *channels, loss))


def _warmup_fields(order: Order) -> tuple[str, ...]:
    assert order.compressor.warmup is not None
    return order.compressor.warmup.loss.reads


def _stage_b(order: Order, where: torch.device, before: "CompressorWarmup | None") -> StageBObjective:
    settings: StageBSettings = order.settings
    start = loading.existing("stage_b", settings.weights, order.compressor.weights) if settings.weights else {}
    compressor = before.compressor if before else _compressor(order, start.get("compressor"))
    stage_b = seeded(order.seed, lambda: StageB(settings.model))
    if settings.weights:
        pretrained.fill(stage_b, start["stage_b"], settings.model)
    return StageBObjective(
        stage_b, compressor, settings.loss, _null_text(order), train_compressor=order.compressor.joint
    )


def _compressor(order: Order, start: Found | None) -> "Compressor":
    """The compressor before any training: of Stage B's existing weights, of its own, or of none."""
    from stages.models.compressor import Compressor

    compressor = seeded(order.seed, lambda: Compressor(order.compressor.model))
    if start is None and order.compressor.weights:
        start = loading.compressor_start(order.compressor.weights)
    if start is not None:
        pretrained.fill(compressor, start, order.compressor.model)
    return compressor


def _stage_c(order: Order, where: torch.device, before: None) -> StageCObjective:
    settings: StageCSettings = order.settings
    stage_c = seeded(order.seed, lambda: StageC(settings.model))
    if settings.weights:
        pretrained.fill(stage_c, loading.existing("stage_c", settings.weights)["stage_c"], settings.model)
    return StageCObjective(stage_c, settings.loss, _null_text(order))


def _previewer(order: Order, where: torch.device, before: None) -> PreviewerObjective:
    settings: PreviewerSettings = order.settings
    return PreviewerObjective(seeded(order.seed, lambda: Previewer(settings.model)), settings.loss)


def _baseline(order: Order, where: torch.device, before: None) -> BaselineObjective:
    settings: BaselineSettings = order.settings
    baseline = seeded(order.seed, lambda: Baseline(settings.model))
    return BaselineObjective(baseline, settings.loss, _null_text(order))


def _null_text(order: Order) -> torch.Tensor:
    assert order.text is not None
    return loading.null_text(order.text)


def _panel_a(order: Order, made: StageAObjective, data: TrainingData, _: Shower | None) -> Panel:
    return panels.stage_a_panel(made.stage_a, data)


def _panel_b(order: Order, made: StageBObjective, data: TrainingData, _: Shower | None) -> Panel:
    return panels.stage_b_panel(_first_stage(order, made), made.stage_b, made.compressor, data)


def _panel_c(order: Order, made: StageCObjective, data: TrainingData, shower: Shower | None) -> Panel:
    assert shower is not None
    return panels.stage_c_panel(made.stage_c, shower, data)


def _panel_previewer(order: Order, made: PreviewerObjective, data: TrainingData, _: Shower | None) -> Panel:
    return panels.previewer_panel(made.previewer, data)


def _panel_baseline(order: Order, made: BaselineObjective, data: TrainingData, _: Shower | None) -> Panel:
    return panels.baseline_panel(_first_stage(order, made), made.baseline, data)


def _first_stage(order: Order, beside: nn.Module) -> StageA:
    """Stage A, on the same device; loaded for each panel, so that it takes no memory in between."""
    assert order.stage_a is not None
    return loading.stage_a(order.stage_a_model, order.stage_a).to(next(beside.parameters()).device)


TRAININGS: Mapping[str, Row] = {
    "stage_a": Row(_stage_a, ("stage_a",), _panel_a),
    # whose decoder is thrown away; Stage B goes on with the compressor
    "compressor": Row(_warmup, fields=_warmup_fields),
    "stage_b": Row(_stage_b, ("stage_b", "compressor"), _panel_b),
    "stage_c": Row(_stage_c, ("stage_c",), _panel_c, ends_with_panel=False, shows_codes=True),
    "previewer": Row(_previewer, ("previewer",), _panel_previewer),
    "baseline": Row(_baseline, ("baseline",), _panel_baseline),
}
