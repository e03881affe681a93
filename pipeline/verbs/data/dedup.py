"""`data dedup`: duplicates among the stored pictures are found."""

from datasets.files import storage
from pipeline.plan.wanted import planned_steps, wanted
from pipeline.run import invocation
from pipeline.settings.config import Config
from pipeline.settings.selection import Selection
from pipeline.settings.words import Words
from pipeline.store.artifacts import Look
from pipeline.terminal import out, print_json


def dedup(config: Config, root: str, words: Words, command: str) -> None:
    """Find duplicates among the stored pictures; a view with `duplicates: drop` leaves them out."""
    alone = config.model_copy(update={"targets": ("duplicates",)})
    look = Look(root)
    planned = planned_steps(alone, look, Selection())
    if any(item.state != "done" for item in planned):
        invocation.run(alone, words.required_conf(), look, planned, command)
    found = wanted(config, root, ["images", "duplicates"])
    pictures, duplicates = found["images"].manifest["rows"], found["duplicates"]
    counts = duplicates.manifest["notes"]["duplicates"]
    sheet = next((storage.join(duplicates.path, name) for name in duplicates.files if name.endswith(".png")), None)
    if words.json:
        print_json({"root": root, "pictures": pictures, "duplicates": counts, "sheet": sheet})
        return
    told = ", ".join(f"{kind} {count:,}" for kind, count in counts.items())
    out.print(f"duplicates among {pictures:,} pictures: {told}")
    if sheet:
        out.print(f"look at some: {sheet}")
    out.print("to train without them: data.views='{unique: {duplicates: drop}}', and view: unique in a phase")
