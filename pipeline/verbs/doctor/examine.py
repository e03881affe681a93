"""The verb: every check in turn, as a table or JSON. To add a check: write it beside its like, and name it here."""

from dataclasses import asdict
from typing import Any, TypeVar

from pydantic import ValidationError
from rich.table import Table

from datasets.config import DataError
from datasets.files import storage
from datasets.planning.plan import Counts
from pipeline.errors import UsageError
from pipeline.plan import cost, obstacles
from pipeline.plan.dag import Planned
from pipeline.plan.wanted import planned_steps
from pipeline.settings import compose
from pipeline.settings.config import Config
from pipeline.settings.resources import Cluster, Tracking
from pipeline.settings.selection import Selection
from pipeline.settings.words import Words
from pipeline.store.artifacts import Look
from pipeline.store.redact import redact
from pipeline.terminal import print_json, print_table
from pipeline.tracking.mlflow_store import locate_store
from pipeline.verbs.doctor import conf, machine, nodes
from pipeline.verbs.doctor.finding import Asked, Check, Finding
from settings import Settings

S = TypeVar("S", bound=Settings)

OF_DEVICES = (machine.device, machine.memory, machine.shared_memory, machine.disk, machine.ray_place, conf.cluster)
JOINED = ("cluster.address", "storage")  # what nodes can only be asked with
CHECKS: tuple[Check, ...] = (
    machine.python,
    machine.packages,
    machine.our_datasets,
    machine.device,
    machine.memory,
    machine.shared_memory,
    machine.disk,
    machine.takes_files,
    machine.clock,
    machine.ray_place,
    machine.token,
    conf.cluster,
    conf.tracking,
    conf.workers,
    conf.device_memory,
    conf.inputs,
)


def handle(words: Words) -> None:
    """Run every check; `UsageError` when one failed."""
    root = storage.absolute(words.root)
    if words.conf or words.overrides:
        asked, composed = _composed(words.required_conf(), words.overrides, root)
        findings = [composed]
    else:
        asked, findings = Asked(root), []
    checks = [check for check in CHECKS if words.devices or check not in OF_DEVICES]
    findings += [found for check in checks if (found := check(asked))]
    if words.devices and not [found for found in findings if found.state == "failed" and found.check in JOINED]:
        findings += nodes.every(asked)
    _show(findings, words.json)
    failed = [found.check for found in findings if found.state == "failed"]
    if failed:
        raise UsageError(f"doctor: {', '.join(failed)} failed, see above")


def _composed(name: str, overrides: list[str], root: str) -> tuple[Asked, Finding]:
    """What a conf wants, and whether it can be planned."""
    tree: dict[str, Any] = {}
    try:
        tree = compose.compose(name, overrides)
        config = compose.check(tree)
        locate_store(root, config.tracking.uri)  # before a remote root is asked
        planned = planned_steps(config, Look(root), Selection())
        counts = _listed(config, planned)
        costs = cost.estimates(planned, config, counts)
    except (UsageError, DataError, OSError) as error:  # the last: a remote root does not answer
        cluster, tracking = _section(Cluster, tree.get("cluster")), _section(Tracking, tree.get("tracking"))
        told = f"cannot be planned: {error}" if isinstance(error, OSError) else str(error)
        return Asked(root, name, None, cluster, tracking), Finding("config", "failed", told)
    known = cost.most_rows(planned, config, counts)[0] is not None
    stored = sum(one.bytes or 0 for item, one in zip(planned, costs, strict=True) if item.state != "done")
    asked = Asked(root, name, config, config.cluster, config.tracking, planned, stored if known else None)
    return asked, Finding("config", "ok", f"conf={name}: {len(asked.todo)} of {len(planned)} steps are to be done")


def _listed(config: Config, planned: list[Planned]) -> Counts | None:
    """What sources would give that are listed before a run, as far as they can be."""
    try:
        return obstacles.ahead(config, planned)
    except DataError:  # which the check of the inputs tells
        return None


def _section(kind: type[S], tree: object) -> S | None:
    """A section of the config, None where it is wrong too."""
    try:
        return kind.model_validate(tree)
    except ValidationError:
        return None


def _show(findings: list[Finding], as_json: bool) -> None:
    if as_json:
        print_json(redact({"findings": [asdict(found) for found in findings]}))
        return
    lines = Table("check", "state", "found", box=None, pad_edge=False)
    for found in findings:
        lines.add_row(found.check, found.state, found.found)
    print_table(lines)
