"""Checks of a conf: its Ray, its MLflow, and whether its trainings and inputs fit."""

import socket

from datasets.config import DataError
from pipeline.errors import UsageError
from pipeline.plan import obstacles, training_memory
from pipeline.settings.config import TRAININGS
from pipeline.tracking.mlflow_store import locate_store, why_silent
from pipeline.verbs.doctor.finding import Asked, Finding, finding
from pipeline.verbs.doctor.machine import on_our_cpus
from stages.anatomy.memory_estimate import GIB

PATIENCE_S = 3.0  # for a connection to Ray


def cluster(asked: Asked) -> Finding | None:
    """Whether something listens where a run would look for Ray; a run then joins it, with the token."""
    check = "cluster.address"
    if asked.cluster is None:
        return None
    wanted = asked.cluster.address
    if wanted is None:
        return Finding(check, "ok", "null: a run starts a Ray of its own here, for as long as it lasts")
    from pipeline.cluster import joining

    here = joining.rays_here()
    if told := joining.why_not(wanted, here):
        return Finding(check, "failed", told)
    address = joining.found(wanted, here)
    try:
        host, _, port = address.rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), PATIENCE_S).close()
    except OSError as error:
        return Finding(check, "failed", f"{wanted}: no Ray answers at {address} ({error})")
    return Finding(check, "ok", f"{wanted}: there is one at {address}")


def tracking(asked: Asked) -> Finding | None:
    """Whether an MLflow server answers; a run does not need it to."""
    if asked.tracking is None:
        return None
    try:
        store = locate_store(asked.root, asked.tracking.uri)
    except UsageError as error:
        return Finding("tracking", "failed", str(error))
    if store.artifacts is not None:
        return Finding("tracking", "ok", f"{store.uri}, made where it is missing")
    if reason := why_silent(store.uri):
        what_then = f"a run goes on without, keeps its records in {store.unsent}, and a later one sends them"
        return Finding("tracking", "warning", f"{store.uri}: no server answers ({reason}); {what_then}")
    return Finding("tracking", "ok", f"{store.uri} answers")


def workers(asked: Asked) -> Finding | None:
    """Rows of each rank; a config whose batches do not divide is refused before this."""
    if asked.config is None:
        return None
    config = asked.config
    ranks = {key: config.ranks_of(step) for step in asked.todo for key in TRAININGS.get(step, ())}
    rows = []
    for key, training in config.trainings().items():
        if key in ranks:
            each = ", ".join(str(phase.batch_size // ranks[key]) for phase in training.phases)
            rows.append(f"{key} {each}" + (f" on {ranks[key]} of them" if ranks[key] < config.workers else ""))
    told = f"rows of each a batch: {'; '.join(rows)}" if rows else "nothing is left to train"
    return Finding("workers", "ok", f"workers={config.workers}, {told}")


def device_memory(asked: Asked) -> Finding | None:
    """What a worker needs of each training's device, held against what is known of it."""
    if asked.config is None:
        return None
    config = asked.config
    needs = {step: training_memory.needed(step, config) for step in asked.todo}
    text = ", ".join(f"{name} {need.total / GIB:.1f}" for name, need in needs.items() if need)
    try:
        training_memory.check(asked.planned, config)
    except UsageError as error:
        return Finding("device memory", "failed", str(error))
    if not text:
        return Finding("device memory", "ok", "nothing is left to train")
    if on_our_cpus(config.cluster):
        return Finding("device memory", "ok", "none is needed: trainings run on this machine's CPUs")
    known = config.cluster.gpu_memory_gib is not None
    ask = "" if known else "; cluster.gpu_memory_gib=GIB holds them against what a GPU has"
    return finding("device memory", known or config.cluster.device == "cpu", f"GiB a worker: {text}{ask}", "warning")


def inputs(asked: Asked) -> Finding | None:
    """Whether something would stop a run at once."""
    if asked.config is None:
        return None
    try:
        found = obstacles.every(
            asked.config, asked.planned, obstacles.ahead(asked.config, asked.planned), ask_stores=True
        )
    except DataError as error:
        found = [str(error)]
    except OSError as error:
        found = [f"cannot be reached: {error}"]
    told = "metadata and weights are where the config says, batches fit the data, as far as can be told"
    return finding("inputs", not found, "; ".join(found) or told)
