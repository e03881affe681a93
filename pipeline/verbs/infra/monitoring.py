"""What watches a run: rules for Prometheus and a board for Grafana, made of the one list of metrics.

To watch another figure: a row in `pipeline.cluster.metrics`, and a panel or an alert here that takes it.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from pipeline.cluster.metrics import (
    BACKLOG,
    CHECKPOINT,
    DATA_WAIT,
    DEVICE_HOURS,
    DONE,
    IMAGES,
    LOSS,
    LOST,
    MFU,
    PROGRESS,
    RANKS,
    SAVE_STALL,
)
from pipeline.settings.config import Config
from pipeline.settings.resources import Job

NAME = "wuerstchen"
LABEL = {"app.kubernetes.io/part-of": NAME}  # of all our pods
EVERY_S = 30
STEP = "by (run, step)"
SERVICE_DISCOVERY = "/tmp/ray/prom_metrics_service_discovery.json"  # which Ray's head keeps


@dataclass(frozen=True)
class Alert:
    """A rule: what it is called, when it speaks, for how long that must hold, and what it says."""

    name: str
    when: str
    holds: str
    says: str


@dataclass(frozen=True)
class Panel:
    """A graph of the board: a query, its unit as Grafana calls it, and what a line is called."""

    title: str
    query: str
    unit: str = "short"
    line: str = "{{step}}"


def alerts(config: Config, job: Job) -> list[Alert]:
    """The rules of a run."""
    stall_s, lost = 2 * config.cluster.stall_s, config.data.download.max_lost
    whole = f"sum {STEP} ({DONE.series} + {BACKLOG.series})"
    return [
        Alert(
            "Stalled",
            f"time() - max {STEP} ({PROGRESS.series}) > {stall_s:g}",
            "1m",
            f"{{{{ $labels.step }}}} has done nothing more for {stall_s / 60:g} minutes (twice cluster.stall_s)",
        ),
        Alert(
            "NoCheckpoint",
            f"time() - max {STEP} ({CHECKPOINT.series}) > {60 * job.alerts.checkpoint_minutes:g}",
            "1m",
            f"{{{{ $labels.step }}}} has saved no state for {job.alerts.checkpoint_minutes:g} minutes",
        ),
        Alert(
            "LosingPictures",
            f'sum {STEP} ({LOST.series}{{cause!="forgotten"}}) > {lost:g} * {whole}',
            "5m",
            f"{{{{ $labels.step }}}} has lost more than data.download.max_lost={lost:g} allows, and will end with 3",
        ),
        Alert(
            "Slow",
            f"max by (run, step, training) ({MFU.series}) < {job.alerts.mfu:g}",
            "30m",
            f"{{{{ $labels.training }}}} reaches less than {job.alerts.mfu:.0%} of its devices' peak",
        ),
    ]


def panels() -> list[Panel]:
    """The graphs of the board."""
    training = "{{training}}"
    return [
        Panel("Done", DONE.series, line="{{step}}: {{unit}}"),
        Panel("Left", BACKLOG.series, line="{{step}}: {{unit}}"),
        Panel("Done, a second", f"clamp_min(deriv({DONE.series}[5m]), 0)", line="{{step}}: {{unit}}"),
        Panel("Since more was done", f"time() - max {STEP} ({PROGRESS.series})", "s"),
        Panel("Loss", LOSS.series, line=training),
        Panel(
            "Images a second, all ranks",
            f"{IMAGES.series} * on (run, step) group_left max {STEP} ({RANKS.series})",
            line=training,
        ),
        Panel("MFU", MFU.series, "percentunit", training),
        Panel("Waiting for data", DATA_WAIT.series, "percentunit", training),
        Panel("Waiting for a save", SAVE_STALL.series, "percentunit", training),
        Panel("Age of the newest checkpoint", f"time() - max {STEP} ({CHECKPOINT.series})", "s"),
        Panel("Lost pictures", f"sum by (run, step, cause) ({LOST.series}) > 0", line="{{cause}}"),
        Panel("Ranks", RANKS.series),
        Panel("Device-hours", DEVICE_HOURS.series, "h"),
    ]


def files(config: Config, job: Job, name: str) -> Iterator[tuple[str, str]]:
    """Rules and board, as KubeRay's neighbours or a Prometheus of one's own take them: name and text of each."""
    about = f"# What watches `{name}`. Rendered by `infra render`: change conf/cluster, and render again.\n"
    every = f"{EVERY_S}s"
    rules = {"groups": [{"name": name, "interval": every, "rules": [_rule(one) for one in alerts(config, job)]}]}
    board = json.dumps(_board(), indent=1, ensure_ascii=False) + "\n"
    if job.platform == "kuberay":
        yield "monitoring.yaml", about + "---\n".join(map(_yaml, _manifests(name, rules, board)))
        return
    found = {"job_name": name, "file_sd_configs": [{"files": [SERVICE_DISCOVERY], "refresh_interval": every}]}
    own = {"global": {"scrape_interval": every}, "rule_files": ["rules.yaml"], "scrape_configs": [found]}
    yield "prometheus.yaml", about + _yaml(own)
    yield "rules.yaml", about + _yaml(rules)
    yield "board.json", board


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as such."""


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def _yaml(tree: dict[str, Any]) -> str:
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)


def _rule(alert: Alert) -> dict[str, Any]:
    return {
        "alert": f"Wuerstchen{alert.name}",
        "expr": alert.when,
        "for": alert.holds,
        "labels": {"severity": "warning"},
        "annotations": {"summary": f"run {{{{ $labels.run }}}}: {alert.says}"},
    }


def _board() -> dict[str, Any]:
    """The board, as Grafana imports it."""
    source = {"type": "prometheus", "uid": "${source}"}
    return {
        "uid": NAME,
        "title": "Würstchen",
        "schemaVersion": 39,
        "refresh": f"{EVERY_S}s",
        "time": {"from": "now-6h", "to": "now"},
        "templating": {"list": [{"name": "source", "type": "datasource", "query": "prometheus"}]},
        "panels": [
            {
                "id": number + 1,
                "type": "timeseries",
                "title": panel.title,
                "datasource": source,
                "gridPos": {"h": 8, "w": 8, "x": 8 * (number % 3), "y": 8 * (number // 3)},
                "fieldConfig": {"defaults": {"unit": panel.unit}, "overrides": []},
                "targets": [{"refId": "A", "datasource": source, "expr": panel.query, "legendFormat": panel.line}],
            }
            for number, panel in enumerate(panels())
        ],
    }


def _manifests(name: str, rules: dict[str, Any], board: str) -> list[dict[str, Any]]:
    """For the operators of Prometheus and Grafana: who is scraped, the rules, the board."""
    monitoring = "monitoring.coreos.com/v1"
    return [
        {
            "apiVersion": monitoring,
            "kind": "PodMonitor",
            "metadata": {"name": name},
            "spec": {
                "selector": {"matchLabels": LABEL},
                "podMetricsEndpoints": [{"port": "metrics", "interval": f"{EVERY_S}s"}],  # KubeRay's name, 8080
            },
        },
        {"apiVersion": monitoring, "kind": "PrometheusRule", "metadata": {"name": name}, "spec": rules},
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": f"{name}-board", "labels": {"grafana_dashboard": "1"}},
            "data": {"board.json": board},
        },
    ]
