"""From the config's weights to scorers in memory, under the names that they may bear."""

from typing import TYPE_CHECKING

import torch

from pipeline.models import known_weights, loading
from pipeline.settings.config import Config
from pipeline.settings.evaluation import Scorers
from stages.scoring.scorers import PictureScorer, PromptScorer, Scorer, likenesses
from stages.weight_files import BadWeights

if TYPE_CHECKING:  # they take seconds to import: only who has such a scorer waits for it
    from stages.scoring.aesthetic import AestheticScorer
    from stages.scoring.clip import Clip

ARCHITECTURES = {"pickscore": "ViT-H-14", "clip_h": "ViT-H-14", "clip_l": "ViT-L-14-quickgelu"}  # of open_clip
PICKSCORE = "pickscore"


def names(config: Config) -> dict[str, str]:
    """What the scorers of a config are called in the tables, by their keys: a file that is not the published PickScore,
    nor vouched for, is `clip:` and the start of its sha256."""
    found = {name: name for name in config.eval.scorers.paths}
    if (path := config.eval.scorers.pickscore) and (digits := known_weights.distinguished(PICKSCORE, path)):
        found[PICKSCORE] = f"clip{digits}"
    return found


def load(config: Config, device: str) -> dict[str, Scorer]:
    """The scorers of a config by their keys, likenesses included.

    Raises:
        BadWeights: a file does not hold what it should; the message names key and file.
    """
    settings = config.eval.scorers
    found: dict[str, Scorer] = {}
    for name, architecture in ARCHITECTURES.items():
        if name in settings.paths:
            clip = _clip(settings, name, architecture, device)
            found[name] = PromptScorer(clip, None if name == PICKSCORE else 100.0)
    if settings.aesthetic:
        assert settings.clip_l
        found["aesthetic"] = PictureScorer(_predictor(settings.clip_l, settings.aesthetic, device))
    loss = config.stage_a.loss  # whose distance without heads is none of LPIPS
    lpips = loading.perceptual(loss, torch.device(device)) if loss.perceptual_heads else None
    return found | likenesses(lpips, device)


def _clip(settings: Scorers, name: str, architecture: str, device: str) -> "Clip":
    from stages.scoring import clip

    try:
        model = clip.load(loading.local(settings.paths[name]), architecture)
    except clip.BadClipWeights as error:
        row = known_weights.named(name)
        raise BadWeights(f"eval.scorers.{name}: {error}; give {row.file}, from {row.source}") from error
    return clip.Clip(model, device, settings.precision)


def _predictor(clip: str, head: str, device: str) -> "AestheticScorer":
    from stages.scoring import aesthetic

    try:
        return aesthetic.load(loading.local(clip), loading.local(head), ARCHITECTURES["clip_l"], device)
    except BadWeights as error:
        raise BadWeights(str(error).replace("data.scorer.", "eval.scorers.", 1)) from error
