"""Files of weights by their headers alone: the sizes of the models in them."""

from collections.abc import Callable
from pathlib import Path

import pytest

from stages import weight_files
from stages.weights import pretrained
from tests.existing_weights import MICRO, combined_release, diffusers_pipelines, own_artifacts


@pytest.mark.parametrize("write", [diffusers_pipelines, combined_release, own_artifacts])
def test_headers_tell_the_sizes_of_every_layout(write: Callable[[Path], None], tmp_path: Path) -> None:
    write(tmp_path)
    for model in ("stage_a", "stage_b", "compressor", "stage_c"):
        ours = getattr(MICRO, model).model
        assert weight_files.misfit(tmp_path, [model], ours) is None
        other = ours.model_copy(update={"latent_channels": 5, "text_width": 7})
        assert f"is not {pretrained.NAMES[model]} of this config" in str(weight_files.misfit(tmp_path, [model], other))
