"""Orchestration: command line, configuration, DAG, artifacts, Ray, MLflow, device-hours.

A run reads a conf, derives the steps that its targets need, gives each a fingerprint (what it does, with which
settings, on which inputs), skips every step whose artifact with that fingerprint exists, and builds the rest in order.
An artifact is a folder under the root whose `manifest.json` is written last; without it the artifact does not exist.
This package is the only one that knows Ray, MLflow and Hydra. `plan` and a run with nothing to do import none of
them, nor torch, so both answer at once.
"""

__version__ = "0.1.0"
