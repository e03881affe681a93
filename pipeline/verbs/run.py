"""`run`: build the targets and whatever is missing before them."""

import shlex

from pipeline.plan.wanted import planned_steps
from pipeline.run import invocation
from pipeline.run.last_screen import Summary, show_summary
from pipeline.settings.words import Words
from pipeline.store.artifacts import Look
from pipeline.terminal import console
from pipeline.tracking.mlflow_store import locate_store
from pipeline.verbs.configured import command, configured_run, print_json


def handle(words: Words) -> None:
    from pipeline.tracking.mlflow_runs import send_unsent

    loaded, root = configured_run(words)
    look = Look(root)
    planned = planned_steps(loaded, look, words.selection)
    todo = [item for item in planned if item.state != "done"]
    if not todo:
        console.print(f"nothing to do: all {len(planned)} steps of conf={words.conf} are done in {root}", markup=False)
        if told := send_unsent(locate_store(root, loaded.tracking.uri), loaded.tracking.experiment, root):
            console.print(told, markup=False)
        print_json(words, {"outcome": "nothing to do", "steps": [item.step.output for item in planned]})
        return
    summary = invocation.run(loaded, words.required_conf(), look, planned, command())
    summary.next_command = _next_command(words, summary)
    show_summary(summary)
    print_json(words, {"outcome": "done", "steps": [vars(step) for step in summary.steps]})


def _next_command(words: Words, summary: Summary) -> str:
    """What a person may want to do now, with the same conf, root and overrides."""
    if summary.caption:
        prompt = shlex.quote(f"prompt={summary.caption}")
        return f"python -m pipeline sample {words.same} {prompt} out=pictures"
    where = [word for word in words.overrides if word.partition("=")[0].startswith("tracking")]
    return shlex.join(["python", "-m", "pipeline", "ui", f"root={words.root}", *where])
