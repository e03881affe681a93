"""Errors of files: which may pass, and how each is told."""

import errno
import pickle

import pytest

from datasets.files import storage
from datasets.files.errors import (
    NothingThere,
    StorageError,
    StoreAway,
    StoreRefuses,
    may_pass,
    reason_of,
    refusal,
    told,
)

# As Arrow 25 tells them, of stores that were made to fail in each of these ways.
SAID = {
    "When uploading object with key 'x' in bucket 'b': AWS Error NETWORK_CONNECTION during PutObject operation: "
    "curlCode: 7, Could not connect to server; Details: Failed to connect to 127.0.0.1 port 1 after 0 ms: Could not "
    "connect to server": "Failed to connect to 127.0.0.1 port 1 after 0 ms: Could not connect to server",
    "AWS Error NETWORK_CONNECTION during GetObject operation: curlCode: 56, Failure when receiving data from the peer; "
    "Details: Recv failure: Connection reset by peer": "Recv failure: Connection reset by peer",
    "When reading information for key 'x' in bucket 'b': AWS Error NETWORK_CONNECTION during HeadObject operation: "
    "curlCode: 28, Timeout was reached; Details: Operation too slow. Less than 1 bytes/sec transferred the last 5 "
    "seconds": "Operation too slow. Less than 1 bytes/sec transferred the last 5 seconds",
    "When initiating multiple part upload for key 'x' in bucket 'b': AWS Error SLOW_DOWN during CreateMultipartUpload "
    "operation: Please reduce your request rate.": "SLOW_DOWN (Please reduce your request rate)",
    "When getting information for key 'x' in bucket 'b': AWS Error UNKNOWN (HTTP status 503) during HeadObject "
    "operation: No response body.": "UNKNOWN (HTTP status 503)",
    "When listing objects under key '' in bucket 'b': AWS Error INTERNAL_FAILURE during ListObjectsV2 operation: We "
    "encountered an internal error. (Request ID: H27p)": "INTERNAL_FAILURE (We encountered an internal error)",
    "google::cloud::Status(UNAVAILABLE: Permanent error, with a last message of connection refused)": None,
}
REFUSED = {
    "When initiating multiple part upload for key 'x' in bucket 'none': AWS Error NO_SUCH_BUCKET during "
    "CreateMultipartUpload operation: The specified bucket does not exist (Request ID: H27p)": "NO_SUCH_BUCKET "
    "(The specified bucket does not exist)",
    "When getting information for key 'x' in bucket 'b': AWS Error ACCESS_DENIED during HeadObject operation: No "
    "response body.": "ACCESS_DENIED",
    "When getting information for key 'x' in bucket 'b': AWS Error UNKNOWN (HTTP status 403) during HeadObject "
    "operation: No response body.": "UNKNOWN (HTTP status 403)",
}


@pytest.mark.parametrize("text", SAID)
def test_what_a_store_gets_over_may_pass(text):
    assert may_pass(OSError(text))
    assert reason_of(OSError(text)) == (SAID[text] or text)


@pytest.mark.parametrize("text", REFUSED)
def test_what_a_store_refuses_will_not_pass(text):
    assert not may_pass(OSError(text))
    error = told(OSError(text), "s3://b/x")
    assert isinstance(error, StoreRefuses)
    assert str(error).startswith(f"s3://b/x: the store refuses it: {REFUSED[text]}; ")
    assert "\n" not in str(error)


@pytest.mark.parametrize("kind", [StorageError, StoreAway, StoreRefuses, NothingThere])
def test_errors_come_back_from_workers_as_they_were(kind):
    error = pickle.loads(pickle.dumps(kind(errno.ENOSPC, "no space is left", "/root/x")))
    assert type(error) is kind
    assert (error.errno, error.strerror, error.filename) == (errno.ENOSPC, "no space is left", "/root/x")
    assert str(error) == "/root/x: no space is left"


def test_other_errors_keep_their_reason():
    error = told(OSError(errno.ELOOP, "Too many levels of symbolic links"), "/root/x")
    assert type(error) is StorageError
    assert str(error) == "/root/x: it cannot be read or written: too many levels of symbolic links"
    assert str(told(OSError("no\nreason"), "x")) == "x: it cannot be read or written: no"
    assert told(error, "another") is error


def test_what_the_system_refuses_outside_the_storage_is_told_with_its_place():
    assert str(refusal(PermissionError(errno.EACCES, "Permission denied", "/out"))).startswith(
        "/out: permission denied;"
    )
    for fault in (
        FileNotFoundError(errno.ENOENT, "No such file", "/out"),
        OSError(errno.EACCES, "no place"),
        OSError(),
    ):
        assert refusal(fault) is fault


@pytest.mark.parametrize("scheme", ["nonsense", "oci"])
def test_an_address_that_nobody_here_knows_is_refused_with_its_path(scheme):
    """No such scheme; and one whose library is not installed."""
    with pytest.raises(StoreRefuses, match=f"^{scheme}://b/x: this kind of address cannot be used: "):
        storage.read(f"{scheme}://b/x")
