"""The table of weights and its verb, against a real server on loopback that can break off, corrupt and change files."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants, file_download, hf_api

from pipeline.__main__ import main
from pipeline.errors import RetriesExhausted
from pipeline.models import known_weights
from pipeline.models.known_weights import Hub, Row, Torchvision, Url, named, table
from pipeline.settings import compose, config
from pipeline.verbs.weights import get, put, verify
from stages.weights.pretrained import torchvision_url

CONTENT = bytes(range(256)) * 1200
SHA = hashlib.sha256(CONTENT).hexdigest()
COMMIT = "0" * 40


class Source:
    """A web server that is a file host, and the Hub as far as downloads go."""

    def __init__(self) -> None:
        self.content = CONTENT
        self.break_after: int | None = None  # bytes after which connections break off
        self.ranges: list[str | None] = []  # Range header of every GET
        source = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                if self.path.startswith("/api/"):
                    self.send(json.dumps(source.repository(self.path)).encode(), body=True)
                else:
                    source.ranges.append(self.headers["Range"])
                    self.answer(body=True)

            def answer(self, body: bool) -> None:
                if "missing" in self.path:
                    self.send_error(404)
                    return
                self.send(source.content, body)

            def send(self, content: bytes, body: bool) -> None:
                wanted = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
                start = int(wanted[1]) if wanted else 0
                self.send_response(206 if wanted else 200)
                self.send_header("Content-Length", str(len(content) - start))
                self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
                self.send_header("X-Repo-Commit", COMMIT)
                if wanted:
                    self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
                self.end_headers()
                if body and source.break_after is not None:
                    self.wfile.write(content[start : start + source.break_after])
                    self.wfile.flush()
                    self.close_connection = True
                elif body:
                    self.wfile.write(content[start:])

            def log_message(self, format: str, *args: object) -> None:
                """Say nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def repository(self, path: str) -> Any:
        names = ("config.json", "part/model.safetensors")
        if "/tree/" in path:
            return [{"type": "file", "path": name, "size": len(self.content), "oid": "1" * 40} for name in names]
        return {"id": "them/model", "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch) -> Iterator[Source]:
    """The server, in the Hub's place."""
    made = Source()
    for module in (constants, file_download, hf_api):
        for name, value in {
            "ENDPOINT": made.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": made.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
        }.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(hf_api.api, "endpoint", made.url)
    monkeypatch.setattr("time.sleep", lambda _: None)
    thread = threading.Thread(target=made.server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield made
    made.server.shutdown()
    thread.join()
    made.server.server_close()


def row(source: Source, kind: str = "url", sha256: str | None = None) -> Row:
    place: Hub | Url = Url(f"{source.url}/files/x.pth")
    if kind == "hub":
        place = Hub("them/model", "part/model.safetensors")
    if kind == "repository":
        place = Hub("them/model", None)
    return Row("x", "some.key", "x.pth", None, sha256, "MIT", place)


# ---------------------------------------------------------------------------------------------------- the table


def test_every_row_has_a_key_of_the_config_and_a_file_of_its_own() -> None:
    names, files = [row.name for row in table()], [row.file for row in table()]
    assert len(set(names)) == len(names)
    assert len(set(files)) == len(files)
    for row in table():
        assert re.fullmatch(r"[0-9a-f]{8}|[0-9a-f]{64}", row.sha256 or "0" * 8), row.name
        assert row.licence is None or row.licence in ("MIT", "BSD-2-Clause", "Apache-2.0")
        for key in row.use.split(", "):
            assert key.split(".")[0] in config.Config.model_fields, key


def test_the_paths_that_the_scales_name_are_in_the_table() -> None:
    named_in_yaml = {
        Path(path).name
        for file in compose.CONF.glob("scale/*.yaml")
        for path in re.findall(r"weights: (weights/\S+)", file.read_text())
    }
    assert len(named_in_yaml) >= 3
    assert named_in_yaml <= {row.file for row in table()}


@pytest.mark.parametrize("name", ["efficientnet_v2_s", "efficientnet_v2_l", "vgg16"])
def test_torchvision_knows_the_files_that_are_its(name: str) -> None:
    row = named(name)
    assert isinstance(row.source, Torchvision)
    url = torchvision_url(row.source.torchvision)
    assert url.rpartition("/")[2] == row.file
    assert url.endswith(f"-{row.sha256}.pth")


def test_licence_and_remedy_are_known_by_the_file_name() -> None:
    assert known_weights.licence("elsewhere/model_v2_stage_b.pt") == "MIT"
    assert known_weights.licence("my.pt") is None
    assert known_weights.how_to_get("weights/model_v2_stage_b.pt").endswith("weights get stage_b")
    assert known_weights.how_to_get("/data/wuerstchen-prior/prior").endswith("weights get diffusers_prior out=/data")
    assert known_weights.how_to_get("my.pt") == "put it there or change the key"
    several = known_weights.how_to_get("weights/model_v2_stage_b.pt", "my.pt", "weights/vqgan_f4_v1_500k.pt")
    assert several == "put my.pt there or change the key; get them with: python -m pipeline weights get stage_b vqgan"


# -------------------------------------------------------------------------------------------------- downloading


@pytest.mark.parametrize("kind", ["url", "hub"])
@pytest.mark.parametrize("sha256", [None, SHA, SHA[:8]])
def test_a_file_comes_whole_and_its_sum_is_kept(kind: str, sha256: str | None, source: Source, tmp_path: Path) -> None:
    wanted = row(source, kind, sha256)
    assert get(wanted, tmp_path) == tmp_path / "x.pth"
    assert (tmp_path / "x.pth").read_bytes() == CONTENT
    assert (tmp_path / "x.pth.sha256").read_text() == f"{SHA}  x.pth\n"
    assert sorted(file.name for file in tmp_path.rglob("*") if file.is_file()) == ["x.pth", "x.pth.sha256"]
    assert verify(wanted, tmp_path).state == "ok"
    seen = len(source.ranges)
    get(wanted, tmp_path)
    assert len(source.ranges) == seen, "what is there is not fetched again"


def test_a_whole_repository_comes_as_a_folder(source: Source, tmp_path: Path) -> None:
    wanted = row(source, "repository")
    assert get(wanted, tmp_path) == tmp_path / "x.pth"
    files = sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file())
    assert files == ["x.pth.sha256", "x.pth/config.json", "x.pth/part/model.safetensors"]
    assert verify(wanted, tmp_path).state == "ok"
    (tmp_path / "x.pth/config.json").unlink()
    assert verify(wanted, tmp_path).state == "changed"


@pytest.mark.parametrize("kind", ["url", "hub"])
def test_a_file_with_another_sum_than_published_is_deleted(kind: str, source: Source, tmp_path: Path) -> None:
    source.content = CONTENT[:-1] + b"x"
    with pytest.raises(ValueError, match=f"weights get x: x.pth has sha256 .*, published is {SHA}; what came was del"):
        get(row(source, kind, SHA), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_file_with_another_sum_than_the_first_time_is_refused(source: Source, tmp_path: Path) -> None:
    wanted = row(source)
    get(wanted, tmp_path).unlink()
    source.content = CONTENT[::-1]
    with pytest.raises(ValueError, match=f"at its first download it was {SHA}"):
        get(wanted, tmp_path)
    assert not (tmp_path / "x.pth").exists()
    source.content = CONTENT
    get(wanted, tmp_path)


def test_a_download_from_the_hub_goes_on_where_it_broke_off(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 50_000)
    source.break_after = 100_000
    assert get(row(source, "hub"), tmp_path).read_bytes() == CONTENT
    starts = [int(re.findall(r"\d+", asked or "0")[0]) for asked in source.ranges]
    assert starts == [0, 100_000, 200_000, 300_000]


@pytest.mark.parametrize(("kind", "path"), [("url", "missing.pth"), ("hub", "missing.safetensors")])
def test_what_cannot_be_reached_ends_with_a_sentence_and_leaves_nothing_that_looks_done(
    kind: str, path: str, source: Source, tmp_path: Path
) -> None:
    place = Url(f"{source.url}/{path}") if kind == "url" else Hub("them/model", path)
    gone = Row("x", "some.key", "x.pth", None, None, None, place)
    with pytest.raises(RetriesExhausted, match=r"weights get x: .* did not come .*; call it again"):
        get(gone, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["url", "hub", "repository"])
def test_without_a_network_one_sentence_says_so_and_nothing_is_left(
    kind: str, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source.server.socket.close()  # whoever connects now is refused
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    with pytest.raises(RetriesExhausted, match=r"^weights get x: .* cannot be reached .*; connect this .*again$"):
        get(row(source, kind), tmp_path / "new/weights")
    assert list(tmp_path.iterdir()) == []
    assert waits == [], "who is offline is told at once"
    if kind != "url":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(RetriesExhausted, match="is not asked while HF_HUB_OFFLINE is set; unset it and call"):
            get(row(source, kind), tmp_path / "new/weights")


def test_the_files_of_a_repository_that_have_come_are_kept_for_the_next_call(source: Source, tmp_path: Path) -> None:
    wanted, place = row(source, "repository"), tmp_path / ".partial/x/files"
    place.mkdir(parents=True)
    (place / "config.json").write_bytes(CONTENT)
    source.server.socket.close()
    with pytest.raises(RetriesExhausted):
        get(wanted, tmp_path)
    assert [str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*.json")] == [".partial/x/files/config.json"]


# ------------------------------------------------------------------------------------------------------ the verb


@pytest.fixture
def one_row(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(known_weights, "table", lambda: (row(source),))
    return tmp_path


def test_list_get_and_verify(one_row: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = f"out={one_row}"

    def document(*words: str, code: int = 0) -> Any:
        capsys.readouterr()
        assert main(["weights", *words, folder, "--json"]) == code
        return json.loads(capsys.readouterr().out)["weights"]

    assert document("list")[0]["present"] is False
    assert document("verify")[0]["state"] == "missing"
    assert document("verify", "x", code=2)[0]["state"] == "missing"
    assert [found["state"] for found in document("verify", "x", "x", code=2)] == ["missing", "missing"]
    assert main(["weights", "get", "x", folder]) == 0
    listed = document("list")[0]
    assert (listed["present"], listed["use"], listed["licence"]) == (True, "some.key", "MIT")
    assert listed["sha256"] == SHA, "of the first download, where none is published"
    assert document("verify", "x")[0]["state"] == "ok"
    (one_row / "x.pth").write_bytes(CONTENT[1:])
    assert document("verify", code=2)[0]["state"] == "changed"
    assert main(["weights", "get", "x", folder]) == 2
    assert "delete" in capsys.readouterr().err
    (one_row / "x.pth.sha256").unlink()
    (unrecorded,) = document("verify")
    assert (unrecorded["state"], unrecorded["detail"][:27]) == ("unrecorded", "its sha256 is not published")
    assert document("verify", "x")[0]["state"] == "pinned"  # who names it vouches for it
    assert document("verify", "x")[0]["state"] == "ok"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["get", "clip"], "weights: there is no 'clip'; there are vqgan, stage_b"),
        (["get"], "weights knows: list, get NAME..., verify [NAME...]"),
        ([], "weights knows: list, get NAME..., verify [NAME...]"),
        (["list", "conf=stage_c"], "weights takes no conf=; it takes root=, out="),
        (["get", "vqgan", "uot=w"], "weights takes no uot= (did you mean out?)"),
        (["list", "out="], "out= is empty"),
    ],
)
def test_other_words_are_refused(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["weights", *words]) == 2
    assert told in capsys.readouterr().err


def test_the_whole_table_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["weights", "list"]) == 0
    heads, *lines = capsys.readouterr().out.splitlines()
    begins = [number for number, line in enumerate(lines) if line[:1].strip()]
    for row, begin, end in zip(table(), begins, [*begins[1:], len(lines)], strict=True):
        assert lines[begin].split()[0] == row.name
        folded = "".join(line[heads.index("source") :].replace(" ", "") for line in lines[begin:end])
        assert folded == str(row.source).replace(" ", ""), "nothing is cut off"
        assert f"  {row.sha256[:8] if row.sha256 else '?'}  " in lines[begin]


def test_weights_are_put_into_a_store_once_with_their_sum_last(source: Source, tmp_path: Path) -> None:
    for kind in ("url", "repository"):
        store = tmp_path / kind
        uri = put(row(source, kind), f"file://{store}")
        assert uri == f"file://{store}/x.pth"
        files = {path.relative_to(store).as_posix() for path in store.rglob("*") if path.is_file()}
        wanted = {"x.pth"} if kind == "url" else {"x.pth/config.json", "x.pth/part/model.safetensors"}
        assert files == wanted | {"x.pth.sha256"}
        assert (store / "x.pth.sha256").read_text().startswith(SHA)
        asked = len(source.ranges)
        put(row(source, kind), f"file://{store}")
        assert len(source.ranges) == asked
        (store / "x.pth.sha256").unlink()  # as an interrupted call leaves it
        put(row(source, kind), f"file://{store}")
        assert len(source.ranges) > asked


@pytest.mark.parametrize("word", ["list", "verify"])
def test_what_lies_in_a_store_is_only_put_there(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["weights", word, "out=s3://bucket/weights"]) == 2
    assert "only get puts them into a store" in capsys.readouterr().err


def test_a_folder_that_is_called_like_weights_is_not_taken_for_them() -> None:
    path = "s3://bucket/wuerstchen/weights/CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors"
    told = "get it with: python -m pipeline weights get clip_h out=s3://bucket/wuerstchen/weights"
    assert known_weights.how_to_get(path) == told
