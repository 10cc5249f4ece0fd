"""A rank of the tests of whole runs: trains one recipe after the other with the other ranks.

python runs_on_ranks.py RECIPES.json      with the environment that torchrun would give
"""

import json
import sys
from pathlib import Path

import onecard
from onecard.planner import measure


def main() -> None:
    measure._PEAK_SIZE["cpu"] = 64
    for folder, values in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")).items():
        onecard.train(onecard.load_recipe(values), output_dir=folder)


if __name__ == "__main__":
    main()
