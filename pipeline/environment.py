"""What the libraries we use find around them: no way to report home, a quiet stdout, folders that they can work in."""

import getpass
import os
import secrets
import sys
import tempfile
from pathlib import Path

from pipeline.errors import UsageError

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_COLOR_PREFIX": "0",  # its notices of dead workers may go to a file
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # stdout belongs to --json
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",  # a bar for each small file
    "NO_ALBUMENTATIONS_UPDATE": "1",  # img2dataset's picture library looks for a newer release at import
    "WANDB_MODE": "disabled",  # imported, never used, by img2dataset
    "WANDB_ERROR_REPORTING": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_UPDATE_CHECK": "1",
    "DO_NOT_TRACK": "true",  # the common switch, for whatever comes in later
}

SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")
# A socket's path has 107 bytes (103 on macOS), of which Ray takes /ray/session_<time>_<pid>/sockets/plasma_store
SOCKET_ROOM = (103 if sys.platform == "darwin" else 107) - 68


def quiet_environment() -> dict[str, str]:
    """Set the switches for this process and its children; call it before any of these libraries is imported.

    Returns:
        The switches, for the environment of workers on other machines.
    """
    os.environ.update(QUIET)
    return dict(QUIET)


def private_ray() -> None:
    """Guard the Ray that this process is going to start by a secret of its own, which its workers inherit.

    Ray looks at these variables when it is imported. Without them it would keep a token file in the home
    directory.
    """
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def name_and_home() -> None:
    """Give this process what libraries take for granted, and a container's user may not have: a name and a home."""
    try:
        Path.home()
    except RuntimeError:
        home_folder().mkdir(mode=0o700, exist_ok=True)
        os.environ["HOME"] = str(home_folder())
    try:
        getpass.getuser()
    except (KeyError, OSError):  # the latter from Python 3.13 on
        os.environ["USER"] = f"user-{os.getuid()}"


def home_folder() -> Path:
    """The user's home, or a folder of theirs below the temporary one: a container's user may have no home, or one that
    belongs to somebody else."""
    try:
        home = Path.home()
    except RuntimeError:  # neither HOME nor an entry among the users
        home = None
    if home is not None and os.access(home, os.W_OK | os.X_OK):
        return home
    return Path(tempfile.gettempdir(), f"wuerstchen-home-{os.getuid()}")


def ray_folder() -> str:
    """Where a Ray of our own keeps logs and sockets: below RAY_TMPDIR or TMPDIR, as Ray would, if that is short enough.

    Raises:
        UsageError: it is not, and no other place can be written.
    """
    wanted = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or tempfile.gettempdir()
    places = [wanted, *SHORT_FOLDERS]
    for place in places:
        if len(os.fsencode(place)) <= SOCKET_ROOM and (place == wanted or os.access(place, os.W_OK | os.X_OK)):
            return str(Path(place, "ray"))
    raise UsageError(
        f"TMPDIR={wanted} is too long for the names of Ray's sockets ({SOCKET_ROOM} bytes at most), and "
        f"{' and '.join(SHORT_FOLDERS)} cannot be written; set RAY_TMPDIR to a shorter folder"
    )
