"""What a search for a learning rate leaves behind.

find-lr/<recipe>-<time>/{recipe.yaml, settings.json, trials.jsonl, result.json}
"""

import contextlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from onecard.errors import InputError
from onecard.run.folder import RunFolder
from onecard.spec import Plan, Recipe, recipe_to_yaml
from onecard.spec.paths import make_absolute
from onecard.trials.short_runs import Trial

_TRIALS = "trials.jsonl"
# Not plan.json, which makes a folder that of a run.
_PLAN = "settings.json"


class Evidence:
    """The folder of one search. Each run is written down when it has ended."""

    def __init__(self, root: Path, made: Sequence[Path] = ()) -> None:
        self.root = root
        self._made = made

    @staticmethod
    def refuse_taken(root: Path) -> None:
        """Refuses a folder that holds anything.

        Raises:
            InputError: nothing is overwritten.
        """
        RunFolder.refuse_taken(root)

    @classmethod
    def create(cls, root: Path, recipe: Recipe, plan: Plan) -> "Evidence":
        """Makes the folder and writes down what is tried.

        Raises:
            InputError: it cannot be made.
        """
        cls.refuse_taken(root)
        try:
            made = [folder for folder in (root, *root.parents) if not folder.exists()]
            root.mkdir(parents=True, exist_ok=True)
            (root / "recipe.yaml").write_text(recipe_to_yaml(make_absolute(recipe)), encoding="utf-8")
            (root / _PLAN).write_text(plan.model_dump_json(indent=1), encoding="utf-8")
            (root / _TRIALS).touch()
        except OSError as error:
            raise InputError(f"folder {root} cannot be made: {error}. Give another --output-dir") from error
        return cls(root, made)

    def add(self, trial: Trial) -> None:
        """Appends a run as a line of JSON, its training losses included; what is not finite is null."""
        losses = [loss if math.isfinite(loss) else None for loss in trial.losses]
        document = asdict(trial) | {"losses": losses}
        with (self.root / _TRIALS).open("a", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(document, allow_nan=False) + "\n")

    def discard_if_empty(self) -> None:
        """Removes what `create` has made where no run has ended."""
        if (self.root / _TRIALS).stat().st_size:
            return
        for name in (_TRIALS, _PLAN, "recipe.yaml"):
            (self.root / name).unlink()
        with contextlib.suppress(OSError):  # another search has begun beside this one
            for folder in self._made:
                folder.rmdir()
