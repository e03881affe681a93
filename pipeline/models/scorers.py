"""From the config's weights to scorers in memory, under the names that they may bear."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from datasets.config import ScorerConfig
from pipeline.models import known_weights, loading
from pipeline.settings.config import Config
from stages.scoring.scorers import PictureScorer, PromptScorer, Scorer, likenesses
from stages.settings.base import Precision
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
            key, path = f"eval.scorers.{name}", settings.paths[name]
            clip = _clip(key, path, architecture, name, device, settings.precision)
            found[name] = PromptScorer(clip, None if name == PICKSCORE else 100.0)
    if settings.aesthetic:
        assert settings.clip_l
        files = ("eval.scorers.clip_l", settings.clip_l), ("eval.scorers.aesthetic", settings.aesthetic)
        found["aesthetic"] = PictureScorer(_aesthetic(*files, ARCHITECTURES["clip_l"], device))
    loss = config.stage_a.loss  # whose distance without heads is none of LPIPS
    lpips = loading.perceptual(loss, torch.device(device)) if loss.perceptual_heads else None
    return found | likenesses(lpips, device)


def of_pictures(config: ScorerConfig, device: str) -> "AestheticScorer":
    """The aesthetic scorer of `data.scorer`; errors as of `load`."""
    clip, head = ("data.scorer.clip_weights", config.clip_weights), ("data.scorer.head_weights", config.head_weights)
    return _aesthetic(clip, head, config.model, device)


def _aesthetic(clip: tuple[str, str], head: tuple[str, str], architecture: str, device: str) -> "AestheticScorer":
    """LAION's predictor from its two files, each by key and path; `architecture` is open_clip's name of the CLIP."""
    from stages.scoring.aesthetic import AestheticScorer, read_head

    model = _clip(*clip, architecture, "clip_l", device)
    with _naming(head[0], "aesthetic_head"):
        return AestheticScorer(model, read_head(loading.local(head[1]), model.width), device)


def _clip(key: str, path: str, architecture: str, known: str, device: str, precision: Precision = "fp32") -> "Clip":
    from stages.scoring import clip

    with _naming(key, known):
        model = clip.load(loading.local(path), architecture)
    return clip.Clip(model, device, precision)


@contextmanager
def _naming(key: str, known: str) -> Iterator[None]:
    """Say of bad weights also which key names them, and what the table of weights has to give in their place."""
    try:
        yield
    except BadWeights as error:
        row = known_weights.named(known)
        raise BadWeights(f"{key}: {error}; give {row.file}, from {row.source}") from error
