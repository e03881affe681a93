"""`python -m tests.bench.data`: the data plane against what it stands beside; part of `make bench`.

Every comparison is made of pairs that take turns, on the same samples, pictures, threads and model.
"""

import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import webdataset
from PIL import Image

from datasets import pictures
from datasets.buckets import Frame
from datasets.config import DownloadConfig, ImageConfig
from datasets.fetching import download, rights, web
from datasets.files import storage
from datasets.files.fence import unfenced
from datasets.formats import shards
from datasets.formats.shard_table import Shards
from datasets.formats.shards import ImageRow
from datasets.planning import plan
from datasets.reading.batches import Batches, Source
from datasets.sources import loopback
from pipeline.models.encoders import Encoder
from pipeline.steps import encode
from stages.models.compressor import Compressor
from stages.models.layers import to_unit_range
from stages.settings.models import CompressorConfig
from tests.bench.figures import Line, at_least, at_most, ratio, took

PAIRS = 7
BATCH = 64
ENCODED = 16  # pictures at a time
FIELDS = {"text": (77, 1024), "latents_c": (16, 24, 24)}  # fp16, of a sample of Stage C
FULL_COLOUR = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]  # as we store it
HOST = "bench.invalid"
SIDES = (1024, 1200)  # px of what is downloaded: OpenCV halves ten times as fast as it does anything else
PLAN_ROWS = (1_000_000, 10_000_000)
# bars
FIRST_PASS, LATER_PASSES, SAMPLES_A_CPU_SECOND = 1.0, 3.0, 2000
ENCODING, DOWNLOADING = 0.9, 0.8
PLAN_CPU_SECONDS_A_MILLION, PLAN_MIB, PLAN_GROWTH = 60, 2048, 1.25


def lines() -> Iterator[Line]:
    """All measurements."""
    yield from reader(rows=64, num_shards=24, pairs=PAIRS)
    torch.manual_seed(0)
    yield from encoding(Compressor(CompressorConfig()).eval(), size=256, rows=48, num_shards=2, pairs=PAIRS)
    for side in SIDES:
        yield from downloading(count=96, side=side, size=512, pairs=PAIRS)
    yield from planning(PLAN_ROWS)


# ---------------------------------------------------------------------------------------------------- the reader


def reader(rows: int, num_shards: int, pairs: int) -> Iterator[Line]:
    """Samples a CPU-second: ours, which hashes, joins and shuffles, against webdataset and pyarrow, which do not."""
    with tempfile.TemporaryDirectory() as folder:
        sources, total = samples(folder, rows, num_shards), rows * num_shards
        urls = [f"{folder}/{tar_name(shard)}" for shard in range(num_shards)]
        first, second, tars, tables = [], [], [], []
        for _ in range(pairs):
            ours = Batches(sources, seed=0)
            first.append(took(lambda ours=ours: read_epoch(ours, 0), time.process_time))
            tars.append(took(lambda: read_tars(urls, total), time.process_time))
            second.append(took(lambda ours=ours: read_epoch(ours, 1), time.process_time))
            tables.append(took(lambda: _read_tables(sources, num_shards), time.process_time))
    rates = [total / statistics.median(times) for times in (first, second, tars, tables)]
    yield Line(
        "reader, samples a CPU-second (text 77x1024, codes 16x24x24)",
        "from the second pass on {:,.0f}; webdataset {:,.0f}; pyarrow {:,.0f}".format(*rates[1:]),
    )
    yield at_least("  first pass, which hashes", f"{rates[0]:,.0f}", rates[0], SAMPLES_A_CPU_SECOND)
    yield ratio("  first pass / webdataset", first, tars, FIRST_PASS)
    yield ratio("  from then on / webdataset", second, tars, LATER_PASSES)
    yield ratio("  from then on / pyarrow", second, tables)


def samples(folder: str, rows: int, num_shards: int) -> list[Source]:
    """The same samples as we store them, and as tars for webdataset, in a folder or store."""
    generator = np.random.default_rng(0)
    for shard in range(num_shards):
        images = [ImageRow(row, f"{shard * rows + row:032x}", "", "", "png", b"") for row in range(rows)]
        values = {
            field: generator.standard_normal((rows, *shape), np.float32).astype(np.float16)
            for field, shape in FIELDS.items()
        }
        name = shards.tensor_name(shard)
        for field, tensors in values.items():
            entry = storage.publish(shards.write_tensors(images, field, tensors), f"{folder}/{field}/{name}")
            shards.publish_receipt(
                f"{folder}/{field}", shard, rows_in=rows, rows_out=rows, files={name: entry}, clock=shards.Clock()
            )
        with webdataset.TarWriter(packed := io.BytesIO(), encoder=False) as tar:
            for row, image in enumerate(images):
                tar.write({"__key__": image.key, **{field: values[field][row].tobytes() for field in FIELDS}})
        storage.publish(packed.getvalue(), f"{folder}/{tar_name(shard)}")
    return [Source(field, Shards.gathered(f"{folder}/{field}")) for field in FIELDS]


def tar_name(shard: int) -> str:
    """What webdataset's tar of a shard is called."""
    return f"{shard:05d}.tar"


def read_epoch(batches: Batches, epoch: int) -> None:
    """All samples, by our reader."""
    for start in range(0, batches.rows, BATCH):
        batches.read(epoch * batches.rows + start, min(BATCH, batches.rows - start))


def read_tars(urls: list[str], total: int) -> None:
    """So many samples of tars, by webdataset."""
    samples = iter(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
    for start in range(0, total, BATCH):
        batch = [next(samples) for _ in range(min(BATCH, total - start))]
        for field, shape in FIELDS.items():
            np.stack([np.frombuffer(sample[field], np.float16).reshape(shape) for sample in batch])


def _read_tables(sources: list[Source], num_shards: int) -> None:
    for shard in range(num_shards):
        for source in sources:
            column = pq.read_table(f"{source.folder}/{shards.tensor_name(shard)}", columns=[source.field])[0]
            values = np.stack([np.frombuffer(value.as_buffer(), np.float16) for value in column])
            values.reshape(-1, *FIELDS[source.field])


# -------------------------------------------------------------------------------------------------- the encoders


def encoding(model: torch.nn.Module, size: int, rows: int, num_shards: int, pairs: int) -> Iterator[Line]:
    """Images a second of the encoding actor, from tars to receipts, over those of its model alone."""
    with tempfile.TemporaryDirectory() as folder:
        times = encoded(model, folder, size, rows, num_shards, pairs)
    each = 1000 * statistics.median(times[1]) / (num_shards * -(-rows // ENCODED))
    yield ratio(f"encoding / its model alone, {size} px", *times, ENCODING, f"; {each:.0f} ms a batch of {ENCODED}")


def encoded(
    model: torch.nn.Module, folder: str, size: int, rows: int, num_shards: int, pairs: int
) -> tuple[list[float], list[float]]:
    """Seconds that the encoding actor takes for shards in a folder or store, and that its model takes alone."""
    batch = torch.rand(ENCODED, 3, size, size)
    with torch.inference_mode():
        images = _images(f"{folder}/images", size, rows, num_shards)
        encoder = Encoder(
            "latents_c", "image", lambda _: lambda image: model(to_unit_range(image)), "fp32", ENCODED, "", {}
        )
        read = partial(encode._pictures, Frame(size))
        worker = encode.ShardEncoder(encoder, "fp16", read, "cpu")
        steps = num_shards * -(-rows // ENCODED)

        def ours() -> None:
            def work(shard: int) -> None:
                made = worker(shard, encode.Work(images[shard]))
                made.publish(f"{folder}/codes", shard, shards.Clock(), unfenced)

            with ThreadPoolExecutor(encode.AT_ONCE) as pool:  # as Ray calls it
                list(pool.map(work, range(num_shards)))

        def bare() -> None:
            for _ in range(steps):
                model(batch)

        bare()
        times = [(took(ours, time.perf_counter), took(bare, time.perf_counter)) for _ in range(pairs)]
    return [ours for ours, _ in times], [alone for _, alone in times]


def _images(folder: str, size: int, rows: int, num_shards: int) -> Shards:
    for shard in range(num_shards):
        content = shards.write_images(
            ImageRow(row, f"{shard * rows + row:032x}", "", "x", "jpg", photo(size, row)) for row in range(rows)
        )
        name = shards.image_name(shard)
        entry = storage.publish(content, f"{folder}/{name}")
        shards.publish_receipt(folder, shard, rows_in=rows, rows_out=rows, files={name: entry}, clock=shards.Clock())
    return Shards.gathered(folder)


def photo(side: int, seed: int) -> bytes:
    """A JPEG with the bytes of a photograph: soft shapes under a little noise."""
    generator = np.random.default_rng(seed)
    soft = Image.fromarray(generator.integers(0, 256, (side // 16, side // 16, 3), np.uint8))
    pixels = np.asarray(soft.resize((side, side), Image.Resampling.BICUBIC), np.int16)
    noisy = (pixels + generator.integers(-6, 7, pixels.shape, np.int16)).clip(0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noisy).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


# ------------------------------------------------------------------------------------------------- the downloads


def downloading(count: int, side: int, size: int, pairs: int) -> Iterator[Line]:
    """Pictures a second with all our guards over those of plain img2dataset.

    Same server, threads, output size and JPEG quality; img2dataset resizes with `area`, its antialiased way.
    """
    bodies = [photo(side, seed) for seed in range(8)]
    limits = DownloadConfig(
        threads=8, per_host=8, timeout_s=60, retries=0, user_agent="bench/1 (a@b.invalid)", max_lost=0
    )
    image = ImageConfig(size=size, format="jpg", quality=95)
    with _served(bodies) as address, tempfile.TemporaryDirectory() as folder:

        def ours() -> None:
            rows = _planned(f"http://{HOST}", count)
            receipt = download.download_shard(
                rows, shard=0, folder=f"{folder}/ours", image=image, download=limits, hosts={HOST: address}
            )
            assert receipt.rows_out == count, receipt.dropped

        def theirs() -> None:
            kept = _plain_img2dataset(f"http://{address[0]}:{address[1]}", count, Path(folder), image, limits)
            assert kept == count, kept

        for work in (ours, theirs):
            work()
        walls = [(took(ours, time.perf_counter), took(theirs, time.perf_counter)) for _ in range(pairs)]
        cpus = [(took(ours, time.process_time), took(theirs, time.process_time)) for _ in range(pairs)]
        split = _cpu_split(bodies, address, image, limits)
    mine, plain = zip(*walls, strict=True)
    note = f"; ours {count / statistics.median(mine):,.0f} pictures/s"
    yield ratio(f"download / plain img2dataset, {side} -> {size} px", mine, plain, DOWNLOADING, note)
    mine, plain = zip(*cpus, strict=True)
    used = [1000 * statistics.median(seconds) / count for seconds in (mine, plain)]
    yield ratio("  by CPU time", mine, plain, note="; {:.1f} ms a picture, img2dataset {:.1f}".format(*used))
    yield Line("  of which", ", ".join(f"{part} {a:.1f} ({b:.1f})" for part, (a, b) in split.items()))


@contextmanager
def _served(bodies: list[bytes]) -> Iterator[loopback.Address]:
    """A server in a process of its own: its CPU time is not the download's."""
    with tempfile.TemporaryDirectory() as folder:
        for number, body in enumerate(bodies):
            Path(folder, f"{number}.jpg").write_bytes(body)
        command = [sys.executable, "-m", "tests.bench.picture_server", folder]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            yield "127.0.0.1", int(process.stdout.readline())
            process.communicate()


def _planned(base: str, count: int) -> pa.Table:
    rows = [
        {"key": f"{row:032x}", "url": f"{base}/{row}", "caption": "x", "shard": 0, "row": row} for row in range(count)
    ]
    return pa.Table.from_pylist(rows, schema=plan.SCHEMA)


def _plain_img2dataset(base: str, count: int, folder: Path, image: ImageConfig, limits: DownloadConfig) -> int:
    """Its own Downloader, Resizer and writer, with the settings that come nearest to ours; pictures that were kept."""
    from img2dataset.resizer import Resizer
    from img2dataset.writer import WebDatasetSampleWriter

    rows = _planned(base, count).select(["url", "caption", "row"])
    with pa.ipc.new_file(str(folder / "rows.feather"), rows.schema) as writer:
        writer.write_table(rows)
    resizer = Resizer(image.size, "center_crop", False, downscale_interpolation="area", encode_quality=image.quality)
    resizer.encode_params += FULL_COLOUR
    downloader = download._downloader_class()(
        sample_writer_class=WebDatasetSampleWriter,
        resizer=resizer,
        thread_count=limits.threads,
        save_caption=True,
        extract_exif=False,
        output_folder=str(folder),
        column_list=rows.column_names,
        timeout=limits.timeout_s,
        number_sample_per_shard=count,
        oom_shard_count=5,
        compute_hash="sha256",
        verify_hash_type=None,
        encode_format="jpg",
        retries=0,
        user_agent_token="bench",
        disallowed_header_directives=rights.OPT_OUTS,
    )
    downloader.download_shard((0, str(folder / "rows.feather")))
    stats: dict[str, int] = json.loads((folder / "00000_stats.json").read_text())
    return stats["successes"]


def _cpu_split(
    bodies: list[bytes], address: loopback.Address, image: ImageConfig, limits: DownloadConfig
) -> dict[str, tuple[float, float]]:
    """CPU milliseconds a picture of each part, one thread: ours, and those of the libraries of img2dataset."""
    import urllib.request

    opener = web.Opener(limits, {HOST: address}, web.HostSlots(limits.per_host))
    plain = urllib.request.build_opener()
    decoded = [pictures.opened(body) for body in bodies]
    arrays = [cv2.imdecode(np.frombuffer(body, np.uint8), cv2.IMREAD_UNCHANGED) for body in bodies]
    small = [cv2.resize(array, (image.size, image.size), interpolation=cv2.INTER_AREA) for array in arrays]
    squares = [Image.fromarray(pictures.fitted(picture, image.size, image.size)) for picture in decoded]
    numbers = range(len(bodies))
    request = urllib.request.Request
    quality = [cv2.IMWRITE_JPEG_QUALITY, image.quality, *FULL_COLOUR]
    parts: dict[str, tuple[Callable[[int], object], Callable[[int], object]]] = {
        "fetch": (
            lambda n: opener.open(request(f"http://{HOST}/{n}"), timeout=60),
            lambda n: plain.open(f"http://{address[0]}:{address[1]}/{n}", timeout=60).read(),
        ),
        "decode": (
            lambda n: pictures.opened(bodies[n]),
            lambda n: cv2.imdecode(np.frombuffer(bodies[n], np.uint8), cv2.IMREAD_UNCHANGED),
        ),
        "resize": (
            lambda n: pictures.fitted(decoded[n], image.size, image.size),
            lambda n: cv2.resize(arrays[n], (image.size, image.size), interpolation=cv2.INTER_AREA),
        ),
        "encode": (
            lambda n: squares[n].save(io.BytesIO(), "JPEG", quality=image.quality, subsampling="4:4:4"),
            lambda n: cv2.imencode(".jpg", small[n], quality),
        ),
    }
    with ThreadPoolExecutor(1) as pool:  # a thread has a clock of its own

        def cpu(work: Callable[[int], object]) -> float:
            times = [pool.submit(took, lambda n=n: work(n), time.thread_time).result() for n in numbers for _ in "abc"]
            return 1000 * statistics.median(times)

        return {name: (cpu(mine), cpu(theirs)) for name, (mine, theirs) in parts.items()}


# ------------------------------------------------------------------------------------------------------ the plan


def planning(sizes: tuple[int, ...]) -> Iterator[Line]:
    """CPU time and peak memory of making plans of so many rows, each in a process of its own."""
    peaks = []
    for rows in sizes:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "tests.bench.plan_memory", folder, str(rows)]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        seconds, peak = found["cpu_seconds"], found["peak_mib"]
        peaks.append(peak)
        bar = PLAN_CPU_SECONDS_A_MILLION * rows / 1e6
        yield at_most(f"plan of {found['planned']:,} rows, CPU seconds", f"{seconds:,.0f}", seconds, bar)
        figure = f"{peak:,.0f}, {found['before_mib']:,.0f} before it"
        yield at_most("  peak memory, MiB", figure, peak, PLAN_MIB)
    growth = peaks[-1] / peaks[0]
    yield at_most("  growth of that from fewest to most rows", f"{growth:.2f}", growth, PLAN_GROWTH)


if __name__ == "__main__":
    for line in lines():
        print(*line, flush=True)
