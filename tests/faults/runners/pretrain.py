"""The runner of the same name, with the fault that the environment orders.

A launcher starts it in the runner's place; its name tells the supervisor which stage's status to read.
"""

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    here = Path(__file__).resolve()
    sys.path.insert(0, str(here.parents[2]))
    import injection

    injection.install()
    runpy.run_path(str(here.parents[3] / "runners" / here.name), run_name="__main__")
