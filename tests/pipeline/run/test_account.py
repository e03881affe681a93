"""What a run costs while it goes on, which build it goes on with, and the end of its budget."""

import json
from types import SimpleNamespace
from typing import Any

import pytest

from datasets.files import storage
from pipeline.errors import BudgetSpent, Interrupted, exit_code
from pipeline.run.account import Account, Books
from pipeline.run.stopping import Stop
from pipeline.store import ledger
from pipeline.store.ledger import About, Held, Writer

KEY = ("train_c", "abc")


def planned(state: str, output: str = "stage_c") -> Any:
    step = SimpleNamespace(name="train_c", output=output)
    return SimpleNamespace(step=step, fingerprint=SimpleNamespace(digest="abc", parents={"images": "i"}), state=state)


def seconds(monkeypatch: pytest.MonkeyPatch, held: dict[str, float]) -> None:
    """Each lease of a kind has been held for so many seconds."""
    monkeypatch.setattr(Held, "seconds", property(lambda lease: held[lease.kind]))


def books(root: Any, run: str, budget: float | None = None) -> Books:
    return Books(str(root), run, About(where="here"), [KEY], budget, room=lambda: 8)


def test_a_build_that_goes_on_keeps_its_name_and_its_hours(tmp_path):
    first = books(tmp_path, "one")
    account = first.open(planned("run"))
    with pytest.raises(OSError, match="gone"), account.lease(2, "cpu"):
        raise OSError("gone")
    before = account.of_build()
    again = books(tmp_path, "two").open(planned("resume"))
    assert again.about.build == account.about.build
    assert again.of_build() == pytest.approx(before, abs=0.01)
    assert again.of_run() == 0
    anew = books(tmp_path, "three").open(planned("run"))
    assert anew.about.build != account.about.build
    assert anew.of_build() == 0
    (lease,) = ledger.read(str(tmp_path))[0]
    assert lease.about == About(account.about.build, "stage_c", {"images": "i"}, "here", 8)


def test_a_build_goes_on_with_its_own_of_those_of_its_step(tmp_path):
    """As one of several prompt sets does whose samples are drawn by one step."""
    begun = {}
    for output in ("a", "b"):
        account = books(tmp_path, f"first {output}").open(planned("run", output))
        with account.lease(2, "cpu"):
            begun[output] = account.about.build
    for output in ("b", "a"):
        assert books(tmp_path, f"again {output}").open(planned("resume", output)).about.build == begun[output]


def test_hours_of_gpus_count_where_there_are_any(tmp_path, monkeypatch):
    account = Account(Writer(str(tmp_path), "one"), *KEY, About())
    with account.lease(4, "cpu"), account.lease(2, "cuda:A100"):
        seconds(monkeypatch, {"cpu": 100.0, "cuda:A100": 10.0})
        assert account.of_run() == 20.0


def test_a_budget_ends_a_run_with_a_code_of_its_own(tmp_path, monkeypatch):
    own = books(tmp_path, "one", budget=2.0)
    stop = Stop(watch=own.over_budget)
    account = own.open(planned("run"))
    with account.lease(2, "cpu"):
        seconds(monkeypatch, {"cpu": 3599.0})
        stop.raise_if_asked()
        seconds(monkeypatch, {"cpu": 3600.0})
        with pytest.raises(
            BudgetSpent, match=r"budget.hours=2 is used up: 2 device-hours .* larger budget.hours="
        ) as end:
            stop.raise_if_asked()
    assert exit_code(end.value) == 6
    assert isinstance(end.value, Interrupted)  # so that the ledger, MLflow and the log take it for a clean end


def test_what_runs_before_have_spent_is_of_the_budget_too(tmp_path):
    text = ""
    for number, (fingerprint, devices) in enumerate((("abc", 2), ("of another conf", 1000))):
        common = {"lease": str(number), "attempt": "one/0", "time": 1e9}
        opening = {"step": "train_c", "fingerprint": fingerprint, "devices": devices, "kind": "cpu"}
        lines = [
            {**common, "event": "lease_open", "held_s": 0.0, **opening},
            {**common, "event": "lease_close", "held_s": 3600.0, "outcome": "done"},
        ]
        text += "".join(json.dumps(line) + "\n" for line in lines)
    storage.publish(text.encode(), f"{tmp_path}/ledger/one.jsonl")
    spent = books(tmp_path, "two", budget=2.0).over_budget()
    assert spent is not None
    assert "2 device-hours are spent" in str(spent)
    assert books(tmp_path, "two", budget=2.1).over_budget() is None
    assert books(tmp_path, "two").over_budget() is None


def test_a_signal_comes_before_the_budget(tmp_path):
    stop = Stop(number=2, watch=lambda: BudgetSpent(1, 1))
    assert exit_code(stop() or OSError()) == 130
