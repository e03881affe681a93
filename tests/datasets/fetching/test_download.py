"""Downloads over real HTTP on loopback: every row ends in one outcome, equal pictures give equal bytes."""

import dataclasses
import http.client
import io
import json
import socket
import ssl
import urllib.error
import urllib.request

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from datasets import pictures
from datasets.fetching import web
from datasets.fetching.download import download_shard
from datasets.files import storage
from datasets.formats import shards
from datasets.formats.shards import INDEX
from datasets.outcomes import Outcome
from datasets.planning import plan
from datasets.source_settings import OpenMojiConfig
from datasets.sources import openmoji
from tests.datasets.fetching.servers import (
    DOWNLOAD,
    EXPECTED,
    HOST,
    IMAGE,
    PICTURE,
    RAW_EXPECTED,
    SIZE,
    download,
    index,
    planned,
)


def test_every_row_ends_in_the_outcome_of_its_cause(tmp_path, server):
    receipt = download(planned(*EXPECTED), tmp_path, server)
    rows = index(tmp_path)
    assert {name: row["status"] for name, row in zip(EXPECTED, rows, strict=True)} == EXPECTED
    assert [row["row"] for row in rows] == list(range(len(EXPECTED)))
    assert receipt.rows_in == len(EXPECTED)
    assert receipt.rows_out == 5
    assert receipt.dropped["http_error"] == 5
    assert receipt.rows_out + sum(receipt.dropped.values()) == receipt.rows_in
    assert shards.finished(str(tmp_path)) == {7: receipt}


def test_answers_that_lie_end_in_the_outcome_of_their_cause(tmp_path, server):
    once = DOWNLOAD.model_copy(update={"user_agent": "Test/1 (a@b.invalid)", "retries": 0})
    receipt = download(planned(*RAW_EXPECTED), tmp_path, server, download=once)
    found = {name: Outcome(row["status"]) for name, row in zip(RAW_EXPECTED, index(tmp_path), strict=True)}
    assert found == RAW_EXPECTED
    rows = shards.read_images((tmp_path / "00007.tar").read_bytes(), count=receipt.rows_out)
    assert len({row.picture for row in rows}) == 1


def test_a_silent_server_is_given_up(tmp_path, server):
    impatient = DOWNLOAD.model_copy(update={"timeout_s": 0.2, "retries": 0})
    assert download(planned("slow"), tmp_path, server, download=impatient).dropped == {"timeout": 1}


def test_only_passing_causes_are_tried_again(tmp_path, server):
    receipt = download(planned("good", "flaky", "missing", "down"), tmp_path, server)
    asked = server.RequestHandlerClass.seen
    assert {name: asked.count(name) for name in asked} == {"good": 1, "flaky": 2, "missing": 1, "down": 2}
    assert receipt.retried == 2
    assert receipt.dropped == {"gone": 1, "server_error": 1}


def test_the_tar_holds_what_was_kept_in_row_order(tmp_path, server):
    receipt = download(planned("missing", "good", "page", "good-too"), tmp_path, server)
    content = storage.read(str(tmp_path / "00007.tar"), expect=receipt.files["00007.tar"])
    rows = shards.read_images(content, count=2)
    assert [(row.row, row.caption) for row in rows] == [(1, "good"), (3, "good-too")]
    assert rows[0].url == f"http://{HOST}/good"
    assert rows[0].key == plan.key_of(rows[0].url, "good")
    assert all(row.pixels().shape == (SIZE, SIZE, 3) for row in rows)
    kept = index(tmp_path)[1]
    assert (kept["width"], kept["height"]) == (48, 40)
    assert len(kept["sha256"]) == 64
    assert pq.read_schema(tmp_path / "00007.parquet").remove_metadata().equals(INDEX)


def test_we_say_who_we_are(tmp_path, server):
    download(planned("good"), tmp_path, server)
    assert server.RequestHandlerClass.agents == {"test/1 (a@b.invalid)"}


def test_nobody_listening_is_a_lost_connection(tmp_path, server):
    with socket.socket() as taken:  # bound, so that nobody else gets the port, and deaf
        taken.bind(("127.0.0.1", 0))
        receipt = download(planned("good"), tmp_path, server, hosts={HOST: taken.getsockname()})
    assert receipt.dropped == {"connection": 1}
    assert shards.read_images((tmp_path / "00007.tar").read_bytes(), count=0) == []


def test_reserved_hosts_are_no_business_of_a_proxy(tmp_path, server, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://proxy.invalid:3128")
    assert download(planned("good"), tmp_path, server).rows_out == 1


def test_a_row_that_img2dataset_loses_is_an_error(tmp_path, server, monkeypatch):
    monkeypatch.setattr("datasets.fetching.download.stored", lambda *_: 1 / 0)  # a bug of ours, say
    with pytest.raises(RuntimeError, match=r"shard 7.*rows \[1\]"):
        download(planned("missing", "good"), tmp_path, server)
    assert shards.finished(str(tmp_path)) == {}


def test_the_process_opens_urls_as_before_afterwards(tmp_path, server):
    download(planned("good"), tmp_path, server)
    address = f"http://127.0.0.1:{server.server_address[1]}/good"
    assert urllib.request.urlopen(address).read() == PICTURE


# ------------------------------------------------------------------------------------- the embedded source


def openmoji_rows() -> pa.Table:
    config = OpenMojiConfig(
        captions=("red heart", "blue circle", "fox"),
        size=SIZE,
        similarity=0.3,
        punsafe=0.0,
        pwatermark=0.0,
        aesthetic=6.0,
    )
    table = openmoji.metadata(config)
    texts = zip(table["URL"].to_pylist(), table["TEXT"].to_pylist(), strict=True)
    rows = [
        {"key": plan.key_of(url, text), "url": url, "caption": text, "shard": 7, "row": row}
        for row, (url, text) in enumerate(texts)
    ]
    return pa.Table.from_pylist(rows, schema=plan.SCHEMA)


@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_two_downloads_of_the_embedded_source_are_byte_equal(tmp_path, kind):
    image = IMAGE.model_copy(update={"format": kind})
    receipts = []
    for threads in (1, 8):  # another port each time, and another order of arrival
        with openmoji.serve(SIZE) as address:
            settings = DOWNLOAD.model_copy(update={"threads": threads})
            folder = str(tmp_path / str(threads))
            receipts.append(
                download_shard(
                    openmoji_rows(),
                    shard=7,
                    folder=folder,
                    image=image,
                    download=settings,
                    hosts={openmoji.HOST: address},
                )
            )
    assert receipts[0].files == receipts[1].files
    assert receipts[0].rows_out == 3


def test_the_embedded_server_draws_on_white_at_any_size():
    with openmoji.serve(96) as (host, port):
        body = urllib.request.urlopen(f"http://{host}:{port}/2764.png").read()
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"http://{host}:{port}/../../../etc/passwd")
    with Image.open(io.BytesIO(body)) as picture:
        assert picture.size == (96, 96)
    heart = pictures.pixels(body)
    assert heart[0, 0].tolist() == [255, 255, 255]
    red, green, blue = heart[40, 48].tolist()
    assert red > 180
    assert max(green, blue) < 80


# ------------------------------------------------------------------------------------------------- causes


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (urllib.error.URLError(socket.gaierror(-2, "Name or service not known")), Outcome.DNS),
        (urllib.error.URLError(ssl.SSLCertVerificationError("self-signed")), Outcome.TLS),
        (urllib.error.URLError(TimeoutError("timed out")), Outcome.TIMEOUT),
        (urllib.error.URLError(ConnectionRefusedError(111, "refused")), Outcome.CONNECTION),
        (urllib.error.URLError(OSError(113, "No route to host")), Outcome.CONNECTION),
        (urllib.error.URLError("unknown url type: file"), Outcome.HTTP_ERROR),
        (http.client.IncompleteRead(b"x"), Outcome.TRUNCATED),
        (http.client.RemoteDisconnected("bye"), Outcome.CONNECTION),
        (http.client.BadStatusLine("HTTP?"), Outcome.HTTP_ERROR),
        (UnicodeError("label too long"), Outcome.HTTP_ERROR),
    ],
)
def test_errors_are_told_apart(error, outcome):
    assert web.outcome_of(error) is outcome


def test_receipts_are_plain_json(tmp_path, server):
    receipt = download(planned("good", "missing"), tmp_path, server)
    found = json.loads((tmp_path / "receipts" / "00007.json").read_text())
    assert found == dataclasses.asdict(receipt)
    assert found["dropped"] == {"gone": 1}
