"""Several sources in one plan: shares by the seed, keys apart, what became of the rows of each."""

import io
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import Request

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from PIL import Image

from datasets.config import DataConfig, DataError
from datasets.fetching.download import download_shard
from datasets.formats import shards
from datasets.left_out import LeftOut
from datasets.planning import plan, plan_files, preview
from datasets.planning.mixture import quotas
from datasets.sources import table
from pipeline.settings import compose

SIZE = 32


def pictures(folder: Path, count: int, side: int = SIZE) -> dict[str, Any]:
    """Settings of a source that is a folder of pictures with captions, all called as in any other such folder."""
    folder.mkdir()
    for number in range(count):
        buffer = io.BytesIO()
        Image.new("RGB", (side, side), (number, 2 * number % 256, len(folder.name))).save(buffer, "PNG")
        (folder / f"{number}.png").write_bytes(buffer.getvalue())
        (folder / f"{number}.txt").write_text(f"number {number}")
    return {"name": folder.name, "source": "folder", "folder": {"path": str(folder)}}


def rows(folder: Path, count: int, **changes: Any) -> dict[str, Any]:
    """Settings of a source that is Parquet with LAION's columns."""
    columns = {
        "URL": [f"http://web.example/{number}.png" for number in range(count)],
        "TEXT": [f"of the web {number}" for number in range(count)],
        "WIDTH": [SIZE] * count,
        "HEIGHT": [SIZE] * count,
        "LICENSE": ["cc0"] * count,
    } | changes
    folder.mkdir()
    pq.write_table(pa.table(columns), folder / "part.parquet")
    none = dict.fromkeys(("min_aesthetic", "max_punsafe", "max_pwatermark"))
    return {"source": "laion_aesthetic", "metadata": str(folder), "filters": {"min_side": SIZE, **none}}


def mixed(*sources: dict[str, Any], **changes: Any) -> DataConfig:
    """A mixture as the command line would compose it."""
    words = {"sources": list(sources), "image.size": SIZE, "shard_rows": 8, **changes}
    tree = OmegaConf.create({"data": OmegaConf.load(compose.CONF / "data" / "mixture.yaml")})
    for key, value in words.items():
        OmegaConf.update(tree, f"data.{key}", value)
    compose._complete_sources(tree)
    found = OmegaConf.to_container(tree, resolve=True)
    assert isinstance(found, dict)
    return DataConfig.model_validate(found["data"])


def made(config: DataConfig, seed: int = 0) -> tuple[list[dict[str, Any]], plan.Counts]:
    parts: list[pa.Table] = []
    counts = plan.make(config, seed, parts.append)
    planned = pa.concat_tables(parts)
    assert counts.read == counts.captions + sum(counts.rejected.values())
    assert planned.num_rows == counts.planned == sum(tally.planned for tally in counts.sources)
    return planned.to_pylist(), counts


def test_pictures_of_one_name_in_two_folders_are_two(tmp_path):
    config = mixed(pictures(tmp_path / "one", 5), pictures(tmp_path / "other", 5))
    planned, _ = made(config)
    assert len({row["key"] for row in planned}) == 10
    assert Counter(row["source"] for row in planned) == {"one": 5, "other": 5}
    with table.hosts(config) as hosts:
        content = pa.Table.from_pylist(planned, plan.schema(config.image.frame, False, mixed=True))
        for shard, part in plan_files.shards(plan_files.parquet_bytes(content, config.shard_rows)):
            download_shard(
                part,
                shard=shard,
                folder=str(tmp_path / "out"),
                image=config.image.model_copy(update={"format": "png"}),
                download=config.download,
                hosts=hosts,
            )
    stored = [row for path in sorted((tmp_path / "out").glob("*.tar")) for row in shards.read_images(path.read_bytes())]
    blue = {row.key: int(row.pixels()[0, 0, 2]) for row in stored}
    assert {row["key"]: len(row["source"]) for row in planned} == blue, "each from its own folder"


FOREIGN = """
http://folder.invalid/0.png http://mine.folder.invalid/0.png http://MINE.Folder.INVALID/0.png
http://mine.folder.invalid:80/0.png http://mine.folder.invalid:8080/0.png https://mine.folder.invalid/0.png
http:\\\\mine.folder.invalid/0.png http://mine.folder.invalid./0.png http://mine.folder.invalid?/0.png
http://ｍine.folder。invalid/0.png http://mine.folder.%69nvalid/0.png http://x%40mine.folder.invalid/0.png
http://mine.folder.invalid%2fx.example/0.png http://a:b@mine.folder.invalid/0.png
"""


@pytest.mark.parametrize("order", [1, -1])
def test_no_spelling_of_another_source_names_a_picture_of_ones_own_folder(tmp_path, order):
    urls = FOREIGN.split()
    web = rows(tmp_path / "web", len(urls), URL=urls)
    config = mixed(*[pictures(tmp_path / "mine", 1), web][::order])
    planned, counts = made(config)
    assert Counter(row["source"] for row in planned)["mine"] == 1
    with table.hosts(config) as hosts:
        assert hosts.keys() == {"mine.folder.invalid"}
        asked = [Request(row["url"]).host for row in planned if row["source"] != "mine"]
        assert len(asked) + counts.rejected["url"] + counts.rejected["duplicate"] == len(urls)
        assert not {urlsplit(f"//{host}").hostname for host in asked} & hosts.keys()
        served = [row["url"] for row in planned if urlsplit(row["url"]).hostname in hosts]
    assert served == ["http://mine.folder.invalid/0.png"]


def test_shares_hold_to_within_a_row_and_are_drawn_by_the_seed(tmp_path):
    sources = (pictures(tmp_path / "few", 10) | {"weight": 1}, rows(tmp_path / "web", 200) | {"weight": 3.0})
    planned, counts = made(mixed(*sources))
    assert Counter(row["source"] for row in planned) == {"few": 10, "laion_aesthetic": 31}
    assert counts.rejected["share"] == 169
    assert counts.rejected["limit"] == 0
    limited, counts = made(mixed(*sources, limit=20))
    assert Counter(row["source"] for row in limited) == {"few": 5, "laion_aesthetic": 15}
    assert (counts.rejected["share"], counts.rejected["limit"]) == (169, 21)
    keys = [{row["key"] for row in found} for found in (planned, limited, made(mixed(*sources, limit=20), 1)[0])]
    assert keys[1] < keys[0], "a larger limit only adds rows"
    assert keys[1] != keys[2]
    assert [row["key"] for row in limited] == [row["key"] for row in made(mixed(*sources, limit=20))[0]]


def test_without_weights_every_row_is_taken_or_drawn_from_all(tmp_path):
    sources = (pictures(tmp_path / "few", 10), rows(tmp_path / "web", 30))
    assert Counter(row["source"] for row in made(mixed(*sources))[0]) == {"few": 10, "laion_aesthetic": 30}
    _, counts = made(mixed(*sources, limit=12))
    assert (counts.planned, counts.rejected["limit"]) == (12, 28)


@given(
    st.dictionaries(st.sampled_from("abcd"), st.tuples(st.integers(0, 50), st.floats(0.01, 100)), min_size=1),
    st.integers(1, 120),
)
def test_counts_are_as_the_weights_to_within_a_row_and_grow_with_the_limit(sources, limit):
    there, weights = ({name: pair[place] for name, pair in sources.items()} for place in (0, 1))
    every, taken, more = (quotas(there, weights, bound) for bound in (None, limit, limit + 1))
    assert sum(taken.values()) == min(limit, sum(every.values()))
    assert all(taken[name] <= more[name] <= every[name] <= there[name] for name in there)
    assert any(every[name] == there[name] for name in there), "one has no more"
    for found in (every, taken):
        moments = [(found[name] / weights[name], 0.5 / weights[name]) for name in there]
        assert max(at - half for at, half in moments) <= min(at + half for at, half in moments) + 1e-6


def test_each_source_has_filters_caps_and_losses_of_its_own(tmp_path):
    small = pictures(tmp_path / "small", 4, side=SIZE - 1)
    small["filters"] = {"min_side": 8}
    web = rows(tmp_path / "web", 6, TEXT=["the same"] * 6)
    web["filters"]["max_same_caption"] = 2
    config = mixed(small, pictures(tmp_path / "large", 4), web)
    planned, counts = made(config)
    assert Counter(row["source"] for row in planned) == {"small": 4, "large": 4, "laion_aesthetic": 2}
    assert [tally.left_out.counts.total() for tally in counts.sources] == [0, 0, 4]
    told = preview.told(config, counts)
    assert "laion_aesthetic: 2 of 6 used; left out: max_same_caption 4" in told
    assert any("data.sources.2.filters.max_same_caption" in sentence for sentence in told)
    assert preview.as_asked(config, counts) == ["small (folder): 4 of 4 used", "large (folder): 4 of 4 used"]
    (below,) = (sentence for sentence in told if "too_small" in sentence)
    assert below.startswith(f"small (folder): data.sources.0.filters.min_side is below data.image.size={SIZE}: ")
    assert [source["name"] for source in preview.document(counts)["sources"]] == ["small", "large", "laion_aesthetic"]


def test_a_row_that_two_sources_have_is_one_and_a_loss_of_the_second(tmp_path):
    planned, counts = made(mixed(rows(tmp_path / "a", 5), rows(tmp_path / "b", 7) | {"name": "again"}))
    assert Counter(row["source"] for row in planned) == {"laion_aesthetic": 5, "again": 2}
    assert [tally.left_out.counts["duplicate"] for tally in counts.sources] == [0, 5]


def test_a_picture_of_two_sources_has_the_captions_of_both(tmp_path):
    first = rows(tmp_path / "a", 3)
    second = rows(tmp_path / "b", 3, TEXT=["in other words"] * 3) | {"name": "again"}
    planned, counts = made(mixed(first, second, captions={"alt": 1}))
    assert [row["captions"][1] for row in planned] == ["in other words"] * 3
    assert [(tally.planned, tally.captions) for tally in counts.sources] == [(3, 3), (0, 3)]
    weighted = [source | {"weight": 1} for source in (first, second)]
    with pytest.raises(DataError, match=r"data\.sources\.1: each picture of again is of a source before it"):
        made(mixed(*weighted, captions={"alt": 1}))


def test_refusals_name_the_keys_of_the_source(tmp_path):
    wrong = [
        ({"source": "folder", "folder": {"path": str(tmp_path / "none")}}, r"data\.sources\.1\.folder\.path: "),
        (rows(tmp_path / "web", 3, WIDTH=[1] * 3), r"data\.sources\.1\.filters: none of 3 rows passes: min_side"),
        (rows(tmp_path / "empty", 0), r"data\.sources\.1\.metadata: .* holds no rows"),
    ]
    good = pictures(tmp_path / "good", 2)
    for source, told in wrong:
        with pytest.raises(DataError, match=told):
            made(mixed(good, source))
    assert LeftOut(mixed(good).parts[0].renamed).told() == ""


@pytest.mark.parametrize("place", [0, 1, 2])
def test_what_is_listed_ahead_is_named_by_its_place_among_all(tmp_path, place):
    """Those that are not listed ahead have a place too."""
    sources = [rows(tmp_path / "web", 3), rows(tmp_path / "more", 3) | {"name": "more"}]
    sources = [source | {"weight": 1} for source in sources]
    none = {"source": "folder", "folder": {"path": str(tmp_path / "none")}, "weight": 1}
    with pytest.raises(DataError, match=rf"^data\.sources\.{place}\.folder\.path: "):
        preview.ahead(mixed(*sources[:place], none, *sources[place:]), 0)
    mine = pictures(tmp_path / "mine", 4) | {"weight": 1}
    mine["folder"]["max_left_out"] = 0.1
    (tmp_path / "mine" / "0.png").write_bytes(b"no picture")
    counts = preview.ahead(mixed(*sources[:place], mine, *sources[place:], limit=1), 0)
    assert counts is not None
    assert [(tally.part.key, tally.planned) for tally in counts.sources] == [(f"data.sources.{place}", 3)]
    told = preview.beyond_budget(counts)
    assert told is not None
    assert told.startswith(f"data.sources.{place}.folder.max_left_out=0.1: 1 of 4 ")


def test_losses_of_a_download_are_those_of_their_sources(tmp_path):
    config = mixed(pictures(tmp_path / "one", 3), pictures(tmp_path / "other", 3))
    planned, _ = made(config)
    (tmp_path / "other" / "1.png").write_bytes(b"no picture")
    content = pa.Table.from_pylist(planned, plan.schema(config.image.frame, False, mixed=True))
    with table.hosts(config) as hosts:
        receipt = download_shard(
            content, shard=0, folder=str(tmp_path / "out"), image=config.image, download=config.download, hosts=hosts
        )
    assert receipt.counts == {"other: not_an_image": 1}
