"""Five rows of every source in its published format, as files; what is planned of them, and a batch of it.

The pictures are made here, so they are anyone's (CC0).
"""

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from omegaconf import OmegaConf
from PIL import Image

from datasets.config import DataConfig
from datasets.fetching.download import download_shard
from datasets.formats.shard_table import Shards
from datasets.planning import plan, plan_files
from datasets.reading import batches
from datasets.sources import table

CONF = Path(__file__).parents[3] / "conf" / "data"
SIZE = 32
NAMES = [f"{number:012}" for number in (139, 285, 632, 724, 776)]
CAPTIONS = [f"a photograph of {thing}" for thing in ("a bear", "a bed", "a stop sign", "a toy", "a cat")]
COLOURS = [(250, 10, 10), (10, 250, 10), (10, 10, 250), (250, 250, 10), (10, 250, 250)]


def picture(number: int, kind: str = "JPEG", size: tuple[int, int] = (48, 40)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, COLOURS[number]).save(buffer, kind)
    return buffer.getvalue()


def settings(name: str, **changes: Any) -> DataConfig:
    """A committed source for small pictures, with some keys changed (`__` for a dot)."""
    tree = OmegaConf.create({"data": OmegaConf.load(CONF / f"{name}.yaml")})
    small = {"image__size": SIZE, "shard_rows": 2, "download__threads": 2}
    for key, value in (small | changes).items():
        OmegaConf.update(tree, "data." + key.replace("__", "."), value)
    return DataConfig.model_validate(OmegaConf.to_container(tree, resolve=True)["data"])


class Planned(NamedTuple):
    rows: pa.Table
    rejected: dict[str, int]  # without zeros


def planned(data: DataConfig) -> Planned:
    parts: list[pa.Table] = []
    counts = plan.make(data, 0, parts.append)
    assert counts.read == counts.planned + sum(counts.rejected.values())
    return Planned(pa.concat_tables(parts), {reason: count for reason, count in counts.rejected.items() if count})


def batch(data: DataConfig, rows: pa.Table, out: Path, web: Mapping[str, Any]) -> dict[str, tuple[int, int, int]]:
    """Colour of every picture by its caption, as a training gets them: downloaded, stored, read as one batch."""
    with table.hosts(data) as own:
        for shard, part in plan_files.shards(plan_files.parquet_bytes(rows, data.shard_rows)):
            common = {"image": data.image, "download": data.download, "hosts": {**own, **web}}
            receipt = download_shard(part, shard=shard, folder=str(out), **common)
            assert receipt.dropped == {}
    read = batches.Batches([batches.Source("image", Shards.gathered(str(out)))], seed=0).read(0, rows.num_rows)
    captions = dict(zip(rows["key"].to_pylist(), rows["caption"].to_pylist(), strict=True))
    assert read["image"].shape == (rows.num_rows, 3, SIZE, SIZE)
    return {
        captions[bytes(key).hex()]: tuple(pixels[:, SIZE // 2, SIZE // 2].tolist())
        for key, pixels in zip(read["key"], read["image"], strict=True)
    }


def laion(folder: Path) -> DataConfig:
    """Re-LAION: no score in the metadata, the scores in another table with the older spelling of the column."""
    columns = {
        "URL": [f"http://images.cocodataset.org/{name}.jpg" for name in NAMES],
        "TEXT": CAPTIONS,
        "WIDTH": [48.0] * 5,
        "HEIGHT": [40.0] * 5,
        "similarity": [0.3] * 5,
        "punsafe": [0.01] * 5,
        "pwatermark": [0.02] * 5,
        "LICENSE": ["cc-by-4.0", "cc0-1.0", "?", None, "cc0-1.0"],
    }
    pq.write_table(pa.table(columns), folder / "rows.parquet")
    table = {"url": columns["URL"][::-1], "aesthetic_score": np.linspace(6, 7, 5, dtype=np.float32)}
    pq.write_table(pa.table(table), folder / "scores.parquet")
    paths = {"metadata": str(folder / "rows.parquet"), "scores": str(folder / "scores.parquet")}
    return settings("laion_aesthetic", **paths)


def coco(folder: Path, **changes: Any) -> DataConfig:
    content = {
        "info": {"description": "COCO 2017 Dataset", "year": 2017},
        "licenses": [
            {"url": "http://creativecommons.org/licenses/by/2.0/", "id": 4, "name": "Attribution License"},
            {"url": "http://creativecommons.org/licenses/by-nc/2.0/", "id": 2, "name": "Attribution-NonCommercial"},
        ],
        "images": [
            {
                "license": 4 if number else 2,
                "file_name": f"{name}.jpg",
                "coco_url": f"http://images.cocodataset.org/{name}.jpg",
                "flickr_url": f"http://farm.invalid/{name}_z.jpg",
                "height": 40,
                "width": 48,
                "date_captured": "2013-11-14 11:18:45",
                "id": int(name),
            }
            for number, name in enumerate(NAMES)
        ],
        "annotations": [
            {"image_id": int(name), "id": number, "caption": caption}
            for number, (name, caption) in enumerate(zip(NAMES, CAPTIONS, strict=True))
        ],
    }
    (folder / "captions_val2017.json").write_text(json.dumps(content))
    return settings("coco_captions", coco_captions__annotations=str(folder / "captions_val2017.json"), **changes)


def narratives(folder: Path, **changes: Any) -> DataConfig:
    lines = [
        {
            "dataset_id": "mscoco_val2017",
            "image_id": str(int(name)),
            "annotator_id": 93,
            "caption": caption,
            "timed_caption": [{"utterance": caption, "start_time": 0.0, "end_time": 2.5}],
            "traces": [[{"x": 0.2086, "y": -0.0533, "t": 0.022}]],
            "voice_recording": f"coco_val/coco_val_{number}_93.ogg",
        }
        for number, (name, caption) in enumerate(zip(NAMES, CAPTIONS, strict=True))
    ]
    (folder / "coco_val.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    changes = {
        "localized_narratives__annotations": str(folder / "coco_val.jsonl"),
        "localized_narratives__images__mscoco_val2017": "http://images.cocodataset.org/{image_id:0>12}.jpg",
    } | changes
    return settings("localized_narratives", **changes)


def packed(path: Path, members: list[tuple[str, bytes]]) -> Path:
    """A plain tar of these members."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            about = tarfile.TarInfo(name)
            about.size = len(content)
            tar.addfile(about, io.BytesIO(content))
    return path


def sample(number: int, name: str = "", **about: Any) -> list[tuple[str, bytes]]:
    """The members that img2dataset writes for a picture."""
    name = name or f"{number:09}"
    told = {"caption": CAPTIONS[number], "url": f"https://example.org/{number}.jpg", "key": name, "status": "success"}
    files = {"jpg": picture(number), "txt": CAPTIONS[number].encode(), "json": json.dumps(told | about).encode()}
    return [(f"{name}.{kind}", content) for kind, content in files.items()]


def webdataset(folder: Path, **changes: Any) -> DataConfig:
    packed(folder / "in" / "00000.tar", [*sample(0), *sample(1), *sample(2, LICENSE="cc0-1.0", punsafe=0.25)])
    packed(folder / "in" / "sub" / "00001.tar", [*sample(3, "a dir/übung #1?"), *sample(4)])
    return settings("webdataset", webdataset__path=str(folder / "in"), **changes)


def own_folder(folder: Path) -> DataConfig:
    for number, name in enumerate(NAMES):
        (folder / f"{name}.jpg").write_bytes(picture(number))
        (folder / f"{name}.txt").write_text(CAPTIONS[number])
    return settings("folder", folder__path=str(folder))
