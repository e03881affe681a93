"""What a run tells of itself in MLflow: its card and few figures, and those of its steps, also where they failed."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from datasets.files import storage
from pipeline.hours.paper import hours_unit
from pipeline.hours.spent import spent
from pipeline.plan.dag import Planned
from pipeline.run.last_screen import SHEETS, Summary
from pipeline.store.artifacts import Artifact
from pipeline.store.ledger import Lease
from pipeline.store.redact import redact_line
from pipeline.tracking import card, names
from pipeline.tracking.card import Story
from pipeline.tracking.mlflow_runs import StepRun, Tracking


def of_run(
    tracking: Tracking,
    summary: Summary,
    record: Mapping[str, Any],
    artifacts: Mapping[str, Artifact],
    leases: Sequence[Lease],
    error: BaseException | None,
) -> None:
    """Describe a run that ends; `leases` are its own, `record` is the one that `status` reads."""
    held = {artifact: 0.0 for artifact in record["steps"]}
    for lease in leases:
        if lease.counts and lease.about.output in held:
            held[lease.about.output] += sum(lease.phases.values()) / 3600
    steps = []
    for output, step in record["steps"].items():
        state = {"done": "built"}.get(step["state"], step["state"])
        steps.append(card.StepLine(step["step"], output, state, held[output], step["artifact"]))
    scores, images = artifacts.get("scores"), artifacts.get("images")
    story = Story(
        unit=hours_unit(summary.devices),
        cost=spent(leases),
        steps=steps,
        scores=card.headlines(scores.manifest["metrics"]) if scores else [],
        data=f"{images.manifest['rows']:,} pictures, content {images.manifest['content'][:12]}" if images else "",
        error=_sentence(error),
        warnings=list(map(redact_line, summary.warnings)),
        pictures=[path for artifact in artifacts.values() for path in _sheets(artifact)],
        command=record["command"],
    )
    tracking.describe(card.of_command(story), card.verdict(story) | _learned(artifacts))


@contextmanager
def step_run(
    tracking: Tracking,
    item: Planned,
    label: str,
    build: str | None,
    lines: Collection[str],
    kind: str,
    leases: Callable[[], list[Lease]],
) -> Iterator[StepRun]:
    """The run of a step's build in MLflow, which tells in the end what became of it.

    It is called by its `label`. The ledger has its `leases`; `lines` are the last ones of its log by then.
    """
    step = item.step.name, item.step.output, item.fingerprint.digest
    with tracking.step(*step, label=label, build=build, settings=item.fingerprint.settings) as tracked:
        try:
            yield tracked
        except BaseException as error:
            tracked.end = error
            raise
        finally:
            try:
                _describe(tracked, [lease for lease in leases() if lease.about.build == build], kind, lines)
            except Exception as failure:  # what is told of a step changes nothing about how it ends
                tracking.warnings.append(f"MLflow has no description of {item.step.name}: {failure}")


def _describe(run: StepRun, leases: Sequence[Lease], kind: str, lines: Collection[str]) -> None:
    end, cost, unit = run.end, spent(leases), hours_unit(kind)
    if isinstance(end, Artifact):
        time = timedelta(seconds=round(end.manifest["seconds"]))
        run.describe(card.of_end(f"{end.manifest['rows']:,} rows in {time}", [], cost, unit))
    else:
        run.describe(card.of_end(_sentence(end) or "", [*lines], cost, unit))


def _sentence(error: BaseException | None) -> str | None:
    return None if error is None else redact_line(str(error)) or type(error).__name__


def _learned(artifacts: Mapping[str, Artifact]) -> dict[str, float]:
    """Images that each training has seen, and its losses in the end, beside which commands are compared."""
    found: dict[str, float] = {}
    for artifact in artifacts.values():
        metrics = artifact.manifest.get("metrics", {})
        seen = {name: value for name, value in metrics.items() if name.endswith("/images")}
        found |= {f"images/{name.removesuffix('/images')}": value for name, value in seen.items()}
        found |= names.seen_first(metrics)
    return found


def _sheets(artifact: Artifact) -> list[str]:
    return [storage.join(artifact.path, name) for name in SHEETS if name in artifact.manifest["files"]]
