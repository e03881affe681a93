"""What MLflow has of a root's steps: their curves, their pictures by step; and where a run keeps a report of itself."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.tracking.mlflow_store import MlflowStore, connect

PICTURE = re.compile(r"images/(?P<name>.+)\+step\+(?P<step>\d+)\+timestamp\+(?P<time>\d+)\+[^+]+\.png")
Point = tuple[int, float]  # step and value


@dataclass(frozen=True)
class Picture:
    """A picture that a step has shown: its name, after how many training steps, and how to read it."""

    name: str
    step: int
    read: Callable[[], bytes]


class History:
    """What one experiment of a store has; opens the store, and raises whatever MLflow raises.

    A step's newest run counts; older ones of the same fingerprint, of a resume by an earlier version, say what was
    before its first point.
    """

    def __init__(self, store: MlflowStore, experiment: str) -> None:
        self._client, self._experiment_id = connect(store, experiment)

    def curves(self, fingerprint: str, wanted: Callable[[str], bool]) -> dict[str, list[Point]]:
        """Points of each wanted metric of a step, by training step, each once."""
        found: dict[str, dict[int, float]] = {}
        for run in self._runs(fingerprint):
            for name in filter(wanted, sorted(run.data.metrics)):
                points = {one.step: one.value for one in self._client.get_metric_history(run.info.run_id, name)}
                known = found.setdefault(name, {})
                first = min(known, default=None)
                known |= {step: value for step, value in points.items() if first is None or step < first}
        return {name: sorted(points.items()) for name, points in found.items()}

    def pictures(self, fingerprint: str) -> list[Picture]:
        """The pictures of a step by name and training step, the last of each."""
        found: dict[tuple[str, int], tuple[int, Picture]] = {}
        for run in self._runs(fingerprint):
            for path in self._paths(run.info.run_id, "images"):
                if told := PICTURE.fullmatch(path):
                    name = told["name"].replace("~", "/").rpartition("/")[2]  # without its section
                    step, time = int(told["step"]), int(told["time"])
                    if time > found.get((name, step), (-1, None))[0]:
                        found[name, step] = time, Picture(name, step, self._reader(run.info.run_id, path))
        return [picture for _, (_, picture) in sorted(found.items(), key=lambda item: item[0])]

    def keep(self, invocation: str, texts: Mapping[str, str]) -> bool:
        """Put files into the run of a command; False where MLflow has none."""
        runs = self._search(f"tags.`wst.invocation` = '{invocation}'")
        for run in runs[:1]:
            for name, text in texts.items():
                self._client.log_text(run.info.run_id, text, name)
        return bool(runs)

    def _runs(self, fingerprint: str) -> list[Any]:
        """Runs of a step, the newest first."""
        return self._search(f"tags.`wst.fingerprint` = '{fingerprint}'")

    def _search(self, query: str) -> list[Any]:
        return list(self._client.search_runs([self._experiment_id], query, order_by=["attributes.start_time DESC"]))

    def _paths(self, run_id: str, folder: str) -> Iterable[str]:
        return [file.path for file in self._client.list_artifacts(run_id, folder)]

    def _reader(self, run_id: str, path: str) -> Callable[[], bytes]:
        return lambda: Path(self._client.download_artifacts(run_id, path)).read_bytes()


def opened(store: MlflowStore, experiment: str, tell: Callable[[str], None]) -> History | None:
    """What MLflow has; None, which is told with the reason, where there is no store, or it does not answer."""
    if store.artifacts is not None and not store.database.exists():
        tell(f"there is no MLflow store {store.database}")
        return None
    try:
        return History(store, experiment)
    except Exception as error:  # whatever a server, a proxy or an old database says: the rest can be told
        tell(f"MLflow at {store.uri} does not answer: {error}")
        return None
