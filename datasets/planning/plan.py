"""The plan: which pictures a run fetches, and the key, shard and row that each of them keeps for ever.

A key is derived from the content (URL and caption), so the same picture has it in every data set. Where captions are
drawn by weights, a row is a picture with all its captions, and its key is derived from the URL alone. Shard and
row are given out once, here; pictures that are lost later leave gaps. All artifacts made from the pictures
share them. Where pictures are stored in several aspect ratios, a shard holds rows of one bucket.

Rows are laid out in the order of their lots, hashes of key and seed. So the shards are shuffled from the start, the
hosts of a shard are many, a limit is a fair draw, and all copies of a key meet: one sort, out of memory, does it all.
"""

import contextlib
import hashlib
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from datasets.buckets import Frame
from datasets.caption_settings import clean_caption
from datasets.config import DataConfig, DataError
from datasets.files import storage
from datasets.left_out import LeftOut
from datasets.planning import filters, grouping, layout, scores
from datasets.planning.mixture import Tally, in_shares
from datasets.planning.spill import Cap, Spill
from datasets.planning.urls import equal, normalised_url, with_equals
from datasets.source_settings import Part
from datasets.sources import laion, table
from datasets.sources.captions import parts_of

SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("url", pa.string()),
        ("caption", pa.string()),
        ("licence", pa.string()),  # of the picture, as the source names it
        ("origin", pa.string()),  # URL of the picture that the one at `url` is a copy of
        ("width", pa.float64()),
        ("height", pa.float64()),
        ("similarity", pa.float64()),
        ("punsafe", pa.float64()),
        ("pwatermark", pa.float64()),
        ("aesthetic", pa.float64()),
        ("shard", pa.int32()),
        ("row", pa.int32()),
    ]
)
BUCKETED = SCHEMA.append(pa.field("bucket", pa.string()))  # of plans with aspect-ratio buckets: such as 896x1152
CAPTIONS = pa.field("captions", pa.list_(pa.string()))  # of plans whose rows are pictures; `caption` is the first
SOURCE = pa.field("source", pa.string())  # of plans with several sources: the name of a row's
NAMES = ("key", "url", "origin")  # by which a removal list may name a picture
_PASSED_ON = ("width", "height", "similarity", "punsafe", "pwatermark", "aesthetic")


@dataclass(frozen=True)
class Counts:
    """How many rows were planned of those that were read, and what became of all others, by source and in all.

    `rejected` counts by reason: the filters' names, `url`, `caption`, `removed`, `duplicate`, `share`, `limit`, and
    what the source itself could not use. Together with the planned rows they make up the `read` ones. `buckets` counts
    the planned rows by bucket, where there are any. `captions` counts those of the planned rows, in place of which
    pictures may be planned: then it is they that make up the `read` ones.
    """

    sources: tuple[Tally, ...]
    buckets: dict[str, int]

    def of_all(self, config: DataConfig) -> bool:
        """Whether they are of all sources of a plan: some are known only when they are read."""
        return len(self.sources) == len(config.parts)

    @property
    def planned(self) -> int:
        return sum(source.planned for source in self.sources)

    @property
    def captions(self) -> int:
        return sum(source.captions for source in self.sources)

    @property
    def read(self) -> int:
        return sum(source.read for source in self.sources)

    @property
    def rejected(self) -> dict[str, int]:
        causes = dict.fromkeys(cause for source in self.sources for cause in source.left_out.counts)
        return {cause: sum(source.left_out.counts[cause] for source in self.sources) for cause in causes}


def make(
    config: DataConfig, seed: int, keep: Callable[[pa.Table], None], sources: Sequence[Part] | None = None
) -> Counts:
    """Read the metadata of a plan's sources, filter it, draw from it, and lay the rest out in shards.

    `keep` gets the planned rows (`schema`, sorted by shard and row) in parts of up to 256 full shards.
    Which rows are planned, and where they lie, depends on the rows that pass the filters and on the seed alone; a
    larger limit only adds rows. Memory holds one part, and a 256th of the rows; temporary files hold the others.

    Args:
        sources: those of the config's `parts` that are wanted; None: all of them.

    Raises:
        DataError: a source has no metadata, they are not LAION's, have no rows, or none passes the filters.
    """
    frame, per_picture = config.image.frame, bool(config.captions)
    sources = config.parts if sources is None else sources
    tallies = {part.name: Tally(part) for part in sources}
    removed = with_equals(removals(config.removed))
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="plan-"))
        spill = stack.enter_context(Spill(folder, "lot"))
        caps: dict[str, list[Cap]] = {}
        for name, tally in tallies.items():
            limits = filters.caps(tally.part.config.filters, by_url=not per_picture)
            caps[name] = [stack.enter_context(Cap(folder, rule, limit)) for rule, limit in limits]
            for kept in _passing(tally, frame, seed, removed, per_picture):
                spill.add(kept)
                for cap in caps[name]:
                    cap.add(kept)
        drawn = _fair(spill, tallies, caps, per_picture)
        if weights := {part.name: part.weight for part in sources if part.weight}:
            drawn = in_shares(drawn, stack.enter_context(Spill(folder, "lot")), weights, config.limit, tallies)
        schema_ = schema(frame, per_picture, mixed=any(part.apart for part in sources))
        laid_out = layout.Layout(frame, schema_, config.shard_rows, config.limit, keep)
        for rows in drawn:
            for name, count in grouping.by_source(laid_out.add(rows)).items():
                tallies[name].left_out.counts["limit"] += count
        laid_out.close()
    for name, tally in tallies.items():
        tally.planned, tally.captions = laid_out.rows[name], laid_out.captions[name]
        assert tally.captions + tally.left_out.counts.total() == tally.read, name
    return Counts(tuple(tallies.values()), dict(laid_out.buckets))


def _passing(tally: Tally, frame: Frame, seed: int, removed: Set[str], per_picture: bool) -> Iterator[pa.Table]:
    """The rows of a source that pass its filters, with their keys and lots; the others are counted.

    Raises:
        DataError: there are no rows, or none passes.
    """
    part, left_out, passed = tally.part, tally.left_out, 0
    picture_rules, caption_rules = _picture_rules(part, frame), filters.caption_rules(part.config.filters)
    rules = [rule.name for rule in (*picture_rules, *caption_rules)]
    left_out.counts.update(dict.fromkeys((*rules, "url", "caption", "removed", "duplicate", "limit"), 0))
    with table.naming(part):
        for rows in _source(part, frame, left_out):
            before = left_out.counts.total()
            pictures, _ = filters.accept(rows, picture_rules, left_out)
            readable = _clean(
                pictures, part, seed, removed, left_out, per_picture
            )  # slow: after the filters that drop most
            kept, _ = filters.accept(readable, caption_rules, left_out)
            assert kept.num_rows + left_out.counts.total() - before == rows.num_rows
            passed += kept.num_rows
            yield kept.append_column("source", pa.repeat(part.name, kept.num_rows))
        tally.read = passed + left_out.counts.total()
        if tally.read == 0:
            raise DataError(f"data.metadata: {part.config.metadata or part.config.source} holds no rows")
        if passed == 0:
            reasons = ", ".join(f"{reason} removed {count}" for reason, count in left_out.counts.items() if count)
            remedy = "loosen these" if any(left_out.counts[name] for name in rules) else "mend the rows"
            raise DataError(
                f"data.filters: none of {tally.read} rows passes: {reasons}; {remedy}, or give others; the first: "
                f"{'; '.join(left_out.examples(1)[:3])}"
            )


def _fair(
    spill: Spill, tallies: Mapping[str, Tally], caps: Mapping[str, Sequence[Cap]], per_picture: bool
) -> Iterator[pa.Table]:
    """All rows in the order of their lots, copies and what is beyond a cap left out, captions put together."""
    for firsts, rows in spill.buckets():
        unique, fair = _unique(rows), []
        for name, tally in tallies.items():
            ours, found = (some.filter(pc.equal(some["source"], name)) for some in (unique, rows))
            _leave_out("duplicate", found, ours, "another row has the same URL and caption", tally.left_out)
            for cap in caps[name]:
                kept = cap.kept(firsts, ours)
                told = f"more rows than data.filters.{cap.name} have the same"
                _leave_out(cap.name, ours, kept, told, tally.left_out)
                ours = kept
            fair.append(ours)
        rows = pa.concat_tables(fair)
        yield (grouping.grouped(rows) if per_picture else rows).sort_by("lot")


def schema(frame: Frame, pictures: bool, mixed: bool = False) -> pa.Schema:
    """Of planned rows: in buckets where pictures are not squares; of pictures with all their captions, or of these;
    with the names of their sources, where these are several."""
    found = SCHEMA if frame.square else BUCKETED
    for field in [CAPTIONS] * pictures + [SOURCE] * mixed:
        found = found.append(field)
    return found


def check(config: DataConfig, ask_stores: bool) -> None:
    """Refuse Parquet files that `make` would refuse, as far as the first one's schema tells; those at URIs if asked to.

    Raises:
        DataError: as of `make`.
    """
    for part in config.parts:
        own = part.config
        columns = {
            "data.metadata": (own.metadata, _needed(part, config.image.frame)),
            "data.scores": (own.scores, {"url", "aesthetic"}),
        }
        for key, (path, needed) in columns.items():
            if path is not None and (ask_stores or not storage.is_remote(path)):
                with table.naming(part):
                    laion.columns(path, needed, key)


def removals(path: str | None, named_by: str = "data.removed") -> frozenset[str]:
    """What is on a removal list: keys (32 hex digits) and normalised URLs, from a text file with one of them a line.

    `named_by` is the word that named the file.

    Raises:
        DataError: there is no such file, or a line is neither.
    """
    if path is None:
        return frozenset()
    if not storage.is_file(path):
        raise DataError(f"{named_by}: there is no file {path}; give a text file with a key or a URL a line")
    try:
        lines = storage.read(path).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise DataError(f"{named_by}: {path} is not in UTF-8; save it in that encoding") from None
    found = set()
    for number, line in enumerate(lines, start=1):
        word = line.strip()
        if not word or word.startswith("#"):
            continue
        try:
            found.add(word.lower() if re.fullmatch("[0-9a-fA-F]{32}", word) else normalised_url(word))
        except ValueError:
            raise DataError(f"{named_by}: line {number} of {path} is neither a key nor a URL: {word!r}") from None
    return frozenset(found)


def key_of(url: str, caption: str = "") -> str:
    """A row's key, 32 hex digits: blake2b-128 of its normalised URL, a NUL, and its clean caption.

    Without a caption: of the picture with all its captions, none of which is empty.
    """
    return hashlib.blake2b(f"{url}\0{caption}".encode(), digest_size=16).hexdigest()


def _picture_rules(part: Part, frame: Frame) -> list[filters.Rule]:
    return filters.picture_rules(part.config.filters) + ([] if frame.square else [filters.sized()])


def _needed(part: Part, frame: Frame) -> set[str]:
    """The columns that LAION's metadata must have."""
    needed = {"url", "caption"}.union(*(rule.columns for rule in _picture_rules(part, frame)))
    return needed - {"aesthetic"} if part.config.scores else needed


def _source(part: Part, frame: Frame, left_out: LeftOut) -> Iterable[pa.Table]:
    """A source's rows under our names; what it could not even make a row of is counted by cause in `left_out`."""
    own = part.config
    if own.metadata is not None:
        tables: Iterable[pa.Table] = laion.tables(own.metadata, _needed(part, frame), left_out=left_out)
    else:
        tables = map(laion.renamed, table.tables(part, left_out))
    return scores.joined(tables, own.scores, left_out) if own.scores else tables


def _leave_out(cause: str, rows: pa.Table, kept: pa.Table, sentence: str, left_out: LeftOut) -> None:
    """Count the rows that are not among those that are kept: `kept` has some of `rows`, in their order."""
    if count := rows.num_rows - kept.num_rows:
        keys = Counter(rows["key"].to_pylist())
        keys.subtract(kept["key"].to_pylist())
        urls = dict(zip(rows["key"].to_pylist(), filters.urls(rows), strict=True))
        left_out.add_all(cause, (urls[key] for key in keys.elements()), count, sentence)


def _clean(
    rows: pa.Table, part: Part, seed: int, removed: Set[str], left_out: LeftOut, pictures: bool = False
) -> pa.Table:
    """Rows with normalised URLs, clean captions, keys and lots, of pictures or of captions; those without, or removed,
    are left out."""
    salt = seed.to_bytes(8, "little")
    places, keys, lots, urls, captions, licences, origins = [], [], [], [], [], [], []
    raw = (rows[name].to_pylist() for name in ("url", "caption", "licence", "origin"))
    for place, (raw_url, raw_caption, raw_licence, raw_origin) in enumerate(zip(*raw, strict=True)):
        try:
            url = table.apart(part, normalised_url((raw_url or b"").decode()))
        except ValueError:  # among them: not UTF-8, a host that IDNA refuses, a port that is no number
            left_out.add("url", repr(raw_url)[:200], "it is no http(s) URL of a public file")
            continue
        said, losses = parts_of(raw_caption)
        caption = clean_caption(said[0]) if said else ""
        if not caption:
            left_out.add("caption", url, losses[0][1] if losses else "its caption says nothing")
            continue
        row = key_of(url, caption)
        key = key_of(url) if pictures else row
        origin = _normalised_or_none(raw_origin)
        if removed and not removed.isdisjoint((key, row, equal(url), origin and equal(origin))):
            left_out.add("removed", url, "data.removed names it")
            continue
        places.append(place)
        keys.append(key)
        lots.append(hashlib.blake2b(key.encode(), digest_size=8, key=salt).digest())
        urls.append(url)
        captions.append(caption)
        licences.append(clean_caption((raw_licence or b"").decode(errors="replace")) or None)
        origins.append(origin)
    kept = rows.take(pa.array(places, pa.int64()))
    texts = {"key": keys, "url": urls, "caption": captions, "licence": licences, "origin": origins}
    columns = {name: pa.array(values, pa.string()) for name, values in texts.items()}
    numbers = pa.array(np.frombuffer(b"".join(lots), ">u8").astype(np.uint64))
    return pa.table({**columns, "lot": numbers, **{name: kept[name] for name in _PASSED_ON}})


def _normalised_or_none(url: bytes | None) -> str | None:
    try:
        return normalised_url(url.decode()) if url else None
    except ValueError:
        return None


def _unique(rows: pa.Table) -> pa.Table:
    """The first row of each caption of each key, in their old order."""
    pairs = zip(rows["key"].to_pylist(), rows["caption"].to_pylist(), strict=True)
    return rows.take(pa.array(grouping.firsts(pairs), pa.int64()))
