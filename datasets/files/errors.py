"""What can go wrong with stored files, told in one sentence that names the path."""

import errno
import os
import re

PASSING_ERRNOS = frozenset(
    {
        errno.EIO,  # of a network file system that did not answer in time; of a disk it means the end, somewhat later
        errno.ESTALE,
        errno.EAGAIN,
        errno.EINTR,
        errno.ETIMEDOUT,
        errno.ECONNREFUSED,
        errno.ECONNRESET,
        errno.ECONNABORTED,
        errno.EPIPE,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.ENETRESET,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        getattr(errno, "EREMOTEIO", errno.EIO),  # which macOS has not
    }
)
REMEDIES = {
    errno.ENOSPC: "no space is left there; make some and start the same command again",
    errno.EDQUOT: "the quota there is used up; make room and start the same command again",
    errno.EFBIG: "files there may not be so large; raise the limit (ulimit -f) or take another place",
    errno.EROFS: "the file system is read-only; mount it writable or take another place",
    errno.EACCES: "permission denied; change the rights or take another place",
    errno.EPERM: "permission denied; change the rights or take another place",
    errno.ENAMETOOLONG: "the name is too long; take a shorter place",
    errno.ENOTDIR: "a part of it is a file, not a folder; take another place",
    errno.EMFILE: "too many files are open; raise the limit (ulimit -n)",
    errno.ENFILE: "too many files are open on this machine",
}
NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})  # told by a write, which knows no name
_PASSING = re.compile(  # names of S3's and Google's errors, as Arrow tells them; an HTTP status where they have no name
    r"AWS Error (NETWORK_CONNECTION|SLOW_DOWN|THROTTLING|SERVICE_UNAVAILABLE|INTERNAL_FAILURE|REQUEST_TIMEOUT"
    r"|REQUEST_EXPIRED|BANDWIDTH_LIMIT_EXCEEDED|UNKNOWN \(HTTP status (429|5\d\d)\))"
    r"|google::cloud::Status\((UNAVAILABLE|DEADLINE_EXCEEDED|INTERNAL|RESOURCE_EXHAUSTED|ABORTED)"
)
ENDPOINTS = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")  # where S3 is not Amazon's
_CURL = re.compile(r"curlCode: \d+, (.*?)(?:; Details: (.*))?$")
_AWS = re.compile(
    r"AWS Error (?P<code>\w+(?: \(HTTP status \d+\))?) during \w+ operation: (?P<said>.*?)\.?(?: \(Req.*)?$"
)


class StorageError(OSError):
    """A file or store cannot be read or written. Made of errno (or None), the reason, and the path."""

    def __str__(self) -> str:
        return f"{self.filename}: {self.strerror}"


class StoreAway(StorageError):
    """A store did not answer, or failed in ways that may pass, for as long as one waits for it."""


class StoreRefuses(StorageError):
    """A store cannot take or give the file, and will not before somebody changes something: room, rights, a name."""


class NothingThere(StorageError, FileNotFoundError):
    """There is no such file."""


def may_pass(error: BaseException) -> bool:
    """Whether the same request may succeed later though nobody has done anything."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in PASSING_ERRNOS
    return isinstance(error, TimeoutError | ConnectionError) or bool(_PASSING.search(str(error)))


def reason_of(error: BaseException) -> str:
    """What went wrong, in a few words without the path."""
    if isinstance(error, OSError) and error.errno is not None:
        return REMEDIES.get(error.errno) or os.strerror(error.errno).lower()
    text = str(error).strip() or type(error).__name__
    if found := _CURL.search(text):
        return (found[2] or found[1]).strip(". ")
    if found := _AWS.search(text):
        said = found["said"].strip()
        return found["code"] if said in ("", "No response body") else f"{found['code']} ({said})"
    return text.splitlines()[0].strip(". ")


def whose(path: str) -> str:
    """A hint at whose store was asked, where nothing in the environment says so, and Amazon's may be the wrong one."""
    if not path.startswith("s3://") or any(map(os.environ.get, ENDPOINTS)):
        return ""
    return (
        "; Amazon's S3 was asked, since AWS_ENDPOINT_URL is not set: where the bucket is another's, set that, and the "
        "keys (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)"
    )


def told(error: BaseException, path: str) -> StorageError:
    """An error of a file system that will not pass, as one sentence with the path."""
    if isinstance(error, StorageError):
        return error
    number = getattr(error, "errno", None)
    if isinstance(error, FileNotFoundError):
        return NothingThere(errno.ENOENT, "there is no such file", path)
    if number in REMEDIES:
        return StoreRefuses(number, reason_of(error), path)
    if "AWS Error" in str(error) or "google::cloud" in str(error):
        look = f"look at the bucket's name, its rights, the keys{whose(path)}"
        return StoreRefuses(number, f"the store refuses it: {reason_of(error)}; {look}", path)
    return StorageError(number, f"it cannot be read or written: {reason_of(error)}", path)


def refusal(error: OSError) -> OSError:
    """An error from outside the storage, as one of the storage where it names a place that the system refuses.

    Others, such as a missing file, may be a fault of the program: they stay as they are.
    """
    if isinstance(error, StorageError) or error.errno not in REMEDIES:
        return error
    if isinstance(error.filename, str):
        return told(error, error.filename)
    return told(error, "a file, or stdout") if error.errno in NO_ROOM else error
