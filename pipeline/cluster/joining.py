"""Starting a Ray of our own, or joining one that runs: which, and why not, in a sentence that `doctor` tells too.

A driver has to be on a node of the cluster: Ray hands objects over in that node's memory, and its client (`ray://`)
knows no trainings. From elsewhere a command is handed to a node, by `ray job submit` or the scripts of `infra render`.
"""

import contextlib
import logging
import os
import signal
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import psutil
import ray
import ray.exceptions

import pipeline
from datasets.files import retrying
from pipeline.environment import quiet_environment, ray_folder
from pipeline.errors import Interrupted, RetriesExhausted, UsageError
from pipeline.settings.resources import Cluster as ClusterConfig

FLAG = "--gcs-address="
FROM_ELSEWHERE = (
    "run on one of its nodes, or hand the command to it: "
    "ray job submit --address http://HOST:8265 --working-dir . -- python -m pipeline run ..."
)
ENDING_S = 10.0  # for the kernel to end what was killed
STARTS = 3  # tries to start a Ray of our own, which gives its processes half a minute in each
PACKAGES = ("pipeline", "stages", "datasets", "settings")


def rays_here() -> list[str]:
    """Addresses of the clusters that this machine is a node of: as Ray itself finds `auto`, by its processes."""
    found: set[str] = set()
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or [""]
        if os.path.basename(words[0]) == "raylet":
            found.update(word.removeprefix(FLAG) for word in words if word.startswith(FLAG))
    return sorted(found)


def asked(address: str) -> str | None:
    """The address that `cluster.address` names; None where any Ray of this machine will do."""
    named = os.environ.get("RAY_ADDRESS", "") if address == "auto" else address
    return None if named in ("", "auto") else named


def why_not(address: str, here: Sequence[str]) -> str | None:
    """Why nobody joins the Ray that `cluster.address` names from a machine with nodes of the Rays `here`; None: it can.

    Whether an address is one of a node's is not known: a machine may have several, or a name.
    """
    named = asked(address)
    if named and named.startswith("ray://"):
        return f"cluster.address={named}: no training runs through Ray's client; {FROM_ELSEWHERE}"
    if named and named.startswith(("http://", "https://")):
        return f"cluster.address={named}: there jobs are handed in, and no Ray is joined; {FROM_ELSEWHERE}"
    if named and not named.rpartition(":")[2].isdecimal():
        return f"{named} is no address; give auto, or HOST:PORT of Ray's head"
    if not here:
        start = "start one with `ray start --head`, or " if address == "auto" else ""
        return f"cluster.address={address}: no Ray runs on this machine; {start}{FROM_ELSEWHERE}"
    if named is None and len(here) > 1:
        return f"cluster.address=auto: several Rays run on this machine; name one of {', '.join(here)}"
    return None


def found(address: str, here: Sequence[str]) -> str:
    """The address of the Ray that is joined."""
    return asked(address) or here[0]


def code() -> list[str]:
    """Our packages, to be sent to nodes that do not have them."""
    checkout = Path(pipeline.__path__[0]).parent
    return [str(checkout / name) for name in PACKAGES]


def start(config: ClusterConfig, say: Callable[[str], object]) -> None:
    """Start or join Ray, from the main thread: its processes end with the thread that has started them.

    One of our own is tried again where it was late, which `say` tells.

    Raises:
        UsageError: nobody can join the one that is named.
        RetriesExhausted: none could be started.
        Interrupted: by SIGTERM, meanwhile.
    """
    for tried in range(1, STARTS + 1):
        try:
            return _start(config)
        except _NotStarted as error:
            if tried == STARTS:
                raise RetriesExhausted(
                    f"Ray did not start ({error}): the machine is very busy, or its memory or the disk of "
                    f"{ray_folder()} is full; start the same command again once it is not"
                ) from error
            say(f"Ray did not start ({error}): it is tried again, {tried} of {STARTS - 1}")


class _NotStarted(Exception):
    """No Ray of our own came up, and what was begun of it has ended; says what Ray said."""


def _start(config: ClusterConfig) -> None:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    address, others = _address(config), _children()
    # A signal to our whole process group must not end Ray before the workers have saved. Its processes inherit what
    # is blocked; for SIGINT Ray sees to this itself.
    unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGHUP})
    try:
        ray.init(
            address=address or "local",  # None would be any Ray that happens to run on this machine
            num_cpus=config.num_cpus if config.address is None else None,
            include_dashboard=False if config.address is None else None,
            logging_level=logging.WARNING,
            log_to_driver=False,
            _temp_dir=ray_folder() if config.address is None else None,
            runtime_env=_environment(config) if config.address else None,
        )
    except (ValueError, TypeError, AssertionError):  # ours
        raise
    except Exception as error:  # Ray raises a plain one where its processes do not answer in time
        raise (_not_joined(config.address, error) if config.address else _not_started(error, others)) from error
    except SystemExit as error:  # of the handler that Ray sets at first, which knows no clean end
        _end_half_started(others)
        raise Interrupted(signal.SIGTERM) from error
    except BaseException:  # somebody does not want to wait for it
        _end_half_started(others)
        raise
    finally:
        for number, handler in handlers.items():  # Ray takes SIGTERM for itself and would end without saving
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)


def _address(config: ClusterConfig) -> str | None:
    """The Ray that is joined; None: one of our own is started."""
    if config.address is None:
        return None
    here = rays_here()
    if told := why_not(config.address, here):
        raise UsageError(told)
    return found(config.address, here)


def _environment(config: ClusterConfig) -> dict[str, Any]:
    """What workers on other nodes find around them: switches, and our code, where it is not there."""
    sent = {"py_modules": code()} if config.code == "sent" else {}
    return {"env_vars": quiet_environment() | retrying.environment(), **sent}


def _not_joined(address: str, error: BaseException) -> UsageError:
    """Why a Ray that runs was not joined."""
    told = f"{type(error).__name__}: {error}" + (f" ({error.__cause__})" if error.__cause__ else "")
    if "authentication" in told.lower():
        return UsageError(
            f"cluster.address={address}: the Ray there has another token; give this process the cluster's, as "
            "RAY_AUTH_MODE=token with RAY_AUTH_TOKEN, or in ~/.ray/auth_token"
        )
    return UsageError(f"cluster.address={address}: no Ray answers there ({' '.join(told.split())})")


def _not_started(error: Exception, others: Collection[psutil.Process]) -> _NotStarted:
    """Why none was started; what was is ended."""
    _end_half_started(others)
    return _NotStarted((str(error).strip() or type(error).__name__).splitlines()[0])


def _end_half_started(others: Collection[psutil.Process]) -> None:
    """End the Ray that this process has begun to start, of which Ray itself may know nothing yet."""
    if ray.is_initialized():
        ray.shutdown()
    begun = _children().difference(others)
    for process in begun:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(begun, timeout=ENDING_S)


def _children() -> set[psutil.Process]:
    """The processes below this one."""
    return set(psutil.Process().children(recursive=True))
