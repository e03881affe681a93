"""Starting Ray where it does not start; that it does is in tests/whole."""

import signal

import pytest
import ray

from pipeline.cluster.ray_cluster import Cluster
from pipeline.errors import RetriesExhausted, exit_code
from pipeline.settings import compose


@pytest.mark.parametrize("kind", [Exception, RuntimeError, TimeoutError])
def test_a_ray_that_does_not_start_is_one_sentence(kind, monkeypatch):
    """As Ray raises it on a machine that is too busy; its processes cannot be made late on purpose."""

    def late(**_: object) -> None:
        raise kind("The current node timed out during startup.\nThis could happen because ...")

    monkeypatch.setattr(ray, "init", late)
    with pytest.raises(RetriesExhausted, match=r"^Ray did not start \(The current node timed out .*again") as caught:
        Cluster(compose.load("stage_c", ["scale=micro"]).cluster, 1)
    assert exit_code(caught.value) == 5
    assert "\n" not in str(caught.value)
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_an_error_of_ours_is_not_hidden(monkeypatch):
    def wrong(**_: object) -> None:
        raise TypeError("no such argument")

    monkeypatch.setattr(ray, "init", wrong)
    with pytest.raises(TypeError):
        Cluster(compose.load("stage_c", ["scale=micro"]).cluster, 1)
