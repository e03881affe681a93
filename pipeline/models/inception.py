"""From the config's file to Inception in memory, and what its distances may be called."""

from importlib.util import find_spec
from typing import TYPE_CHECKING

from datasets.files import storage
from pipeline.models import known_weights, loading
from pipeline.settings.config import Config
from stages.weight_files import BadWeights

if TYPE_CHECKING:
    from stages.scoring.inception import Inception

KEY = "eval.distances.inception"
NAME = "inception"  # in the table of weights
OTHERWISE = {"fid": "fd", "kid": "kd", "is": "is"}  # with the start of the file's sha256


def names(config: Config) -> dict[str, str]:
    """What FID, KID and IS are called: that, if the file is the published one or vouched for; else `fd:` and so on."""
    path = config.eval.distances.inception
    assert path is not None
    digits = known_weights.distinguished(NAME, path)
    return {name: f"{other}{digits}" if digits else name for name, other in OTHERWISE.items()}


def load(config: Config, device: str) -> "Inception":
    """The Inception of a config.

    Raises:
        BadWeights: it is another network, damaged, or torch-fidelity is not installed; the message names key and file.
    """
    from stages.scoring import inception

    path = config.eval.distances.inception
    assert path is not None
    try:
        return inception.load(loading.local(path), device)
    except BadWeights as error:
        row = known_weights.named(NAME)
        hint = "" if "torch-fidelity" in str(error) else f"; give {row.file}, from {row.source}"
        raise BadWeights(f"{KEY}: {error}{hint}") from error


def check(config: Config) -> None:
    """Refuse a file that is no Inception; a remote one is looked at when its step runs.

    Raises:
        BadWeights: as `load`; that torch-fidelity is not installed is told of a remote one too.
    """
    if not find_spec("torch_fidelity"):
        raise BadWeights(
            f"{KEY}: torch-fidelity, which knows the network, is not installed; pip install torch-fidelity"
        )
    if not storage.is_remote(str(config.eval.distances.inception)):
        load(config, "cpu")
