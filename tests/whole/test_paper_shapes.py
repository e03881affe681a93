"""Real pictures at the paper's size through the full-size encoders, from HTTP to joined batches."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from datasets.buckets import Frame
from datasets.config import DownloadConfig, ImageConfig
from datasets.fetching.download import download_shard
from datasets.files import storage
from datasets.formats import shards
from datasets.formats.shard_table import Shards
from datasets.planning import plan
from datasets.reading.batches import Batches, Source
from datasets.source_settings import OpenMojiConfig
from datasets.sources import openmoji
from pipeline.steps import encode
from stages.models.compressor import Compressor
from stages.models.layers import to_unit_range
from stages.models.stage_a import StageA
from stages.settings.models import CompressorConfig, StageAConfig

SIDE, SHARDS = 1024, 2
DOWNLOAD = DownloadConfig(threads=2, timeout_s=60, retries=1, user_agent="test/1 (a@b.invalid)", max_lost=0.0)
CAPTIONS = ("red heart", "fox")  # a shard each


@pytest.mark.chaos
def test_pictures_of_1024_px_become_latents_and_codes_of_the_papers_shapes(tmp_path):
    config = OpenMojiConfig(captions=CAPTIONS, size=SIDE, similarity=0.3, punsafe=0.0, pwatermark=0.0, aesthetic=6.0)
    table = openmoji.metadata(config)
    torch.manual_seed(0)
    encoders = {"latents_a": StageA(StageAConfig()).eval().encode, "latents_c": Compressor(CompressorConfig()).eval()}
    with openmoji.serve(SIDE) as address:
        for shard, (url, text) in enumerate(zip(table["URL"].to_pylist(), table["TEXT"].to_pylist(), strict=True)):
            key = plan.key_of(url, text)
            rows = [{"key": key, "url": url, "caption": text, "shard": shard, "row": 0}]
            images = str(tmp_path / "images")
            receipt = download_shard(
                pa.Table.from_pylist(rows, schema=plan.SCHEMA),
                shard=shard,
                folder=images,
                image=ImageConfig(size=SIDE, format="jpg"),
                download=DOWNLOAD,
                hosts={openmoji.HOST: address},
            )
            name = shards.image_name(shard)
            kept = shards.read_images(storage.read(f"{images}/{name}", expect=receipt.files[name]), count=1)
            for field, model in encoders.items():
                image, _ = encode._pictures(Frame(SIDE))(kept, None)
                with torch.inference_mode():
                    values = model(to_unit_range(torch.from_numpy(image))).half().numpy()
                publish(str(tmp_path / field), shard, field, kept, values)
    batch = Batches([Source(field, Shards.gathered(str(tmp_path / field))) for field in encoders], seed=0).read(
        0, SHARDS
    )
    assert batch["latents_a"].shape == (SHARDS, 4, 256, 256)
    assert batch["latents_c"].shape == (SHARDS, 16, 24, 24)
    for field in encoders:
        assert np.isfinite(batch[field]).all()
        assert len(np.unique(batch[field])) > 100


def publish(folder, shard, field, rows, values):
    name = shards.tensor_name(shard)
    made = {name: storage.publish(shards.write_tensors(rows, field, values), storage.join(folder, name))}
    shards.publish_receipt(folder, shard, rows_in=len(rows), rows_out=len(rows), files=made, clock=shards.Clock())
