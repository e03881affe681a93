"""Requests to S3 that we make ourselves, against a real server: one for what is small, parts for what is large."""

import os
import re
from collections import Counter
from collections.abc import Iterator

import pytest
from botocore.exceptions import ConnectionClosedError

from datasets.files import filesystems, notices, s3, storage
from datasets.files.errors import NothingThere, StoreRefuses
from datasets.files.notices import Notice
from datasets.files.retrying import PATIENCE
from tests.faulty_store import FaultyStore, some


@pytest.fixture
def store(s3: FaultyStore, monkeypatch: pytest.MonkeyPatch) -> FaultyStore:
    monkeypatch.setenv(PATIENCE, "120")
    return s3


def methods(store: FaultyStore, since: int = 0) -> Counter[str]:
    return Counter(method for method, _ in store.asked[since:])


@pytest.mark.parametrize("size", [0, 1, 999, 1000, 1001, 3000, 9999])
def test_an_object_of_any_size_is_read_whole_in_as_many_requests_as_it_has_parts(store, s3_root, monkeypatch, size):
    monkeypatch.setattr(s3, "PART", 1000)
    content = os.urandom(size)
    storage.publish(content, f"{s3_root}/x")
    before = len(store.asked)
    assert storage.read(f"{s3_root}/x") == content
    assert methods(store, before) == {"GET": max(1, -(-size // 1000))}


@pytest.mark.parametrize("kind", ["slow", "lost", "cut"])
def test_a_part_that_fails_is_read_again_and_no_other(store, s3_root, monkeypatch, kind):
    monkeypatch.setattr(s3, "PART", 1000)
    content = os.urandom(20_000)
    storage.publish(content, f"{s3_root}/x")
    before, store.fault = len(store.asked), some(0.2, kind, seed=4)
    assert storage.read(f"{s3_root}/x") == content
    failed = store.requests(kind)
    assert failed > 1
    assert methods(store, before) == {"GET": 20 + failed}


@pytest.mark.parametrize(("start", "size"), [(0, 10), (3, 4), (7, 3), (7, 9), (9, 1), (10, 1), (99, 5), (0, 99)])
def test_a_part_is_what_a_file_has_there_in_one_request(store, s3_root, start, size):
    storage.publish(b"0123456789", f"{s3_root}/x")
    before = len(store.asked)
    assert s3.part(f"{s3_root}/x", start, size) == b"0123456789"[start : start + size]
    assert methods(store, before) == {"GET": 1}


def test_a_part_that_did_not_come_whole_is_no_shorter_one(store, s3_root):
    content = os.urandom(5000)
    storage.publish(content, f"{s3_root}/x")
    store.fault = some(0.5, "cut", seed=1)
    assert [s3.part(f"{s3_root}/x", start, 1000) for start in range(0, 5000, 1000)] == [
        content[start : start + 1000] for start in range(0, 5000, 1000)
    ]
    assert store.requests("cut") > 0


def test_what_is_written_anew_while_it_is_read_is_read_anew(store, s3_root, monkeypatch):
    """No reader gets the beginning of one and the end of another."""
    monkeypatch.setattr(s3, "PART", 1000)
    heard: list[Notice] = []
    old, new = os.urandom(5000), os.urandom(6000)
    storage.publish(old, f"{s3_root}/x")
    fill = s3._fill

    def late(part: memoryview, uri: str, start: int, tag: str) -> None:
        if start == 3000 and not heard:
            storage.publish(new, uri)
        fill(part, uri, start, tag)

    monkeypatch.setattr(s3, "_fill", late)
    with notices.heard_by(heard.append):
        assert storage.read(f"{s3_root}/x") == new
    assert {notice.reason for notice in heard} == {"it was written anew while it was read"}


def test_what_s3_refuses_is_told_as_arrow_tells_it(store, s3_root):
    with pytest.raises(NothingThere, match=f"{s3_root}/x: there is no such file"):
        storage.read(f"{s3_root}/x")
    with pytest.raises(StoreRefuses, match="s3://nobody/x: the store refuses it: NO_SUCH_BUCKET"):
        storage.read("s3://nobody/x")


def test_a_file_goes_and_its_neighbours_of_a_longer_name_stay(store, s3_root):
    for name in ("a", "a.json", "a/b", "a/c/d", "ab"):
        storage.publish(b"content", f"{s3_root}/{name}")
    storage.remove(f"{s3_root}/a")
    storage.remove(f"{s3_root}/never")
    assert storage.listing(s3_root) == ["a.json", "ab"]
    storage.remove_all([f"{s3_root}/a.json", f"{s3_root}/ab", f"{s3_root}/never"])
    assert storage.listing(s3_root) == []


@pytest.mark.parametrize("kind", ["slow", "lost"])
def test_a_folder_of_many_goes_whole_whatever_fails_meanwhile(store, s3_root, monkeypatch, kind):
    monkeypatch.setattr(s3, "AT_ONCE", 7)
    for number in range(20):
        storage.publish(b"content", f"{s3_root}/a/{number // 5}/{number}")
    storage.publish(b"content", f"{s3_root}/ab")
    store.fault = some(0.3, kind, seed=1)
    storage.remove(f"{s3_root}/a")
    assert storage.listing(s3_root) == ["ab"]
    assert store.requests(kind) > 0


def test_what_a_store_cannot_delete_of_many_is_told(store, s3_root, monkeypatch):
    """Its answer to a request for many is 200 all the same; what may pass is asked for again."""
    for name in "ab":
        storage.publish(b"content", f"{s3_root}/{name}")
    answers = iter([{"Code": "SlowDown"}, {"Code": "AccessDenied", "Message": "not yours"}])
    monkeypatch.setattr(filesystems.s3_client(), "delete_objects", lambda **_: {"Errors": [next(answers)]})
    heard: list[Notice] = []
    with notices.heard_by(heard.append), pytest.raises(StoreRefuses, match=f"{s3_root}/a: .*ACCESS_DENIED"):
        storage.remove_all([f"{s3_root}/a", f"{s3_root}/b"])
    assert len(heard) == 1


def test_a_client_is_made_for_each_endpoint_once_and_asks_once(store, monkeypatch):
    one = filesystems.s3_client()
    assert one is filesystems.s3_client()
    assert one.meta.endpoint_url == store.url
    assert one.meta.config.retries["total_max_attempts"] == 1
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    assert one is not filesystems.s3_client()


def test_what_everybody_may_read_needs_no_keys(store, s3_root, monkeypatch, tmp_path):
    storage.publish(b"content", f"{s3_root}/x")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    filesystems.forget_clients()
    assert storage.read(f"{s3_root}/x") == b"content"


# ---------------------------------------------------------------------------------------------- how many requests


def test_a_small_object_is_one_request(store, s3_root):
    """At most 1.2 on average, whatever comes first: a client's first request, a folder's first file."""
    names = [f"{s3_root}/{folder}/{number}" for folder in ("a", "b/c") for number in range(20)]
    for name in names:
        storage.publish(b"content", name)
    assert methods(store) == {"PUT": len(names)}
    before = len(store.asked)
    assert storage.read_all(names) == [b"content"] * len(names)
    assert methods(store, before) == {"GET": len(names)}
    before = len(store.asked)
    storage.remove_all(names)
    assert methods(store, before) == {"POST": 1}
    assert storage.listing(s3_root) == []


@pytest.mark.parametrize(
    ("what", "most"),
    [
        (lambda root: storage.exists(f"{root}/a/1"), {"HEAD": 1}),
        (lambda root: storage.exists(f"{root}/a"), {"HEAD": 1, "GET": 1}),
        (lambda root: storage.exists(f"{root}/none"), {"HEAD": 1, "GET": 1}),
        (lambda root: storage.listing(root), {"GET": 1}),
        (lambda root: storage.children(root), {"GET": 1}),
        (lambda root: storage.listing(f"{root}/none"), {"GET": 1, "HEAD": 1}),
        (lambda root: storage.sizes(root), {"GET": 1}),
        (lambda root: storage.content_tag(f"{root}/a/1"), {"HEAD": 1}),
        (lambda root: storage.remove(f"{root}/a/1"), {"DELETE": 1, "GET": 1}),
        (lambda root: storage.remove(f"{root}/a"), {"DELETE": 1, "GET": 1, "POST": 1}),
        (lambda root: storage.create(b"mine", f"{root}/claim"), {"HEAD": 1, "GET": 1, "PUT": 2}),
        (lambda root: storage.create(b"mine", f"{root}/a/1"), {"HEAD": 1}),
        (lambda root: storage.move(f"{root}/a/1", f"{root}/b"), {"HEAD": 1, "PUT": 1, "DELETE": 1}),
    ],
)
def test_questions_take_few_requests(store, s3_root, what, most):
    for number in range(3):
        storage.publish(b"content", f"{s3_root}/a/{number}")
    before = len(store.asked)
    what(s3_root)
    assert methods(store, before) <= Counter(most), store.asked[before:]


def test_a_large_object_is_written_in_parts_and_hashed_on_the_way(store, s3_root):
    content = os.urandom(25 << 20)
    before = len(store.asked)
    storage.publish(content, f"{s3_root}/large")
    parts = [path for method, path in store.asked[before:] if method == "PUT"]
    assert all(re.search("partNumber", path) for path in parts)
    assert len(store.asked) - before <= len(parts) + 2  # its begin and its end


class Interrupted:
    """Content in pieces of which the last but few never come, as after a Ctrl-C."""

    def __len__(self) -> int:
        return 40 << 20

    def __iter__(self) -> Iterator[memoryview]:
        for number in range(40):
            if number == 30:
                raise KeyboardInterrupt
            yield memoryview(bytes(1 << 20))


def test_what_is_interrupted_leaves_what_was_there_and_no_upload(store, s3_root):
    storage.publish(b"old", f"{s3_root}/x")
    with pytest.raises(KeyboardInterrupt):
        storage.publish(Interrupted(), f"{s3_root}/x")
    assert storage.read(f"{s3_root}/x") == b"old"
    bucket = s3_root.removeprefix("s3://").partition("/")[0]
    assert not filesystems.s3_client().list_multipart_uploads(Bucket=bucket).get("Uploads")


def test_a_last_request_whose_answer_is_lost_is_not_taken_for_a_failure(store, s3_root, monkeypatch):
    client, content = filesystems.s3_client(), os.urandom(20 << 20)
    complete, answers = client.complete_multipart_upload, [ConnectionClosedError(endpoint_url="s3")]

    def unheard(**about: object) -> object:
        answer = complete(**about)
        if answers:
            raise answers.pop()
        return answer

    monkeypatch.setattr(client, "complete_multipart_upload", unheard)
    storage.publish(content, f"{s3_root}/x")
    assert storage.read(f"{s3_root}/x") == content
