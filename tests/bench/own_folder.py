"""`python -m tests.bench.own_folder`: a folder of one's own against a plain loop of Pillow; part of `make bench`."""

import hashlib
import io
import statistics
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import yaml
from PIL import Image, ImageOps

from datasets.config import DataConfig
from datasets.fetching import download
from datasets.planning import plan
from datasets.sources import table
from pipeline.settings.compose import CONF
from tests.bench.figures import Line, ratio, took

PAIRS = 7
KINDS = {"PNG": "png", "JPEG": "jpg"}
LIKE_PLAIN_PILLOW = 0.9  # bar


def lines() -> Iterator[Line]:
    """All measurements."""
    for kind in KINDS:
        yield from own_folder(kind, count=96, side=640, size=256, pairs=PAIRS)


def own_folder(kind: str, count: int, side: int, size: int, pairs: int) -> Iterator[Line]:
    """Rows a CPU-second from a local folder to its shard: ours, and a plain loop that does the same work."""
    with tempfile.TemporaryDirectory() as scratch:
        own, out = Path(scratch, "own"), Path(scratch, "out")
        _draw(own, kind, count, side)
        out.mkdir()
        data = _config(own, size, KINDS[kind])
        _ours(data, out)  # imports
        ours, plain = [], []
        for _ in range(pairs):
            ours.append(took(lambda: _ours(data, out), time.process_time))
            plain.append(took(lambda: _plain(own, out, kind, size), time.process_time))
    rates = [count / statistics.median(times) for times in (ours, plain)]
    what = f"own folder, {kind} {side} -> {size} px, rows a CPU-second"
    yield Line(what, "{:,.0f}; plain Pillow {:,.0f}".format(*rates))
    yield ratio("  ours / plain Pillow", ours, plain, LIKE_PLAIN_PILLOW)


def _draw(folder: Path, kind: str, count: int, side: int) -> None:
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(count):
        dots = generator.integers(0, 255, (side // 16, side // 12, 3), np.uint8)
        picture = Image.fromarray(dots).resize((side * 4 // 3, side), Image.Resampling.BICUBIC)
        picture.save(folder / f"{number}.{KINDS[kind]}", kind)
        (folder / f"{number}.txt").write_text(f"picture {number}")


def _config(path: Path, size: int, suffix: str) -> DataConfig:
    tree = yaml.safe_load((CONF / "data" / "folder.yaml").read_text())
    tree["image"] |= {"size": size, "format": suffix}
    tree["filters"] |= {"min_side": size}
    tree["folder"]["path"] = str(path)
    return DataConfig.model_validate(tree | {"shard_rows": 4096})


def _ours(data: DataConfig, out: Path) -> None:
    """Plan a folder and store its pictures, in one shard."""
    parts: list[pa.Table] = []
    plan.make(data, 0, parts.append)
    with table.hosts(data) as hosts:
        receipt = download.download_shard(
            parts[0], shard=0, folder=str(out), image=data.image, download=data.download, hosts=hosts
        )
    assert not receipt.dropped, receipt.dropped


def _plain(own: Path, out: Path, kind: str, size: int) -> None:
    with tarfile.open(out / "plain.tar", "w") as tar:
        for text in sorted(own.glob("*.txt")):
            file = text.with_suffix(f".{KINDS[kind]}")
            body = file.read_bytes()
            hashlib.sha256(body)
            with Image.open(io.BytesIO(body)) as opened:
                upright = ImageOps.exif_transpose(opened).convert("RGB")
            picture = ImageOps.fit(upright, (size, size), Image.Resampling.BICUBIC)
            buffer = io.BytesIO()
            picture.save(buffer, kind, **({} if kind == "PNG" else {"quality": 95, "subsampling": "4:4:4"}))
            for name, content in ((file.name, buffer.getvalue()), (text.name, text.read_bytes())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


if __name__ == "__main__":
    for line in lines():
        print(*line, flush=True)
