"""Is anything lost when a sweep is killed?  `make bench-killed` kills one of 60 trials 20 times, on either engine.

It compares the table with that of a sweep that nothing disturbed, and prints what it found.
"""

import argparse
import tempfile
import time
from pathlib import Path

import pandas as pd

from tests.integration.sweeps.test_sweep import killed, without_seconds, write_plan


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engines", nargs="+", default=["here", "ray"], choices=["here", "ray"])
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--kills", type=int, default=20)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tables = {}
        for name, engine, n_kills in (("calm", "here", 0), *((e, e, options.kills) for e in options.engines)):
            place = Path(folder) / name
            place.mkdir()
            write_plan(place, options.trials)
            began = time.monotonic()
            tables[name] = without_seconds(killed(place, n_kills, engine=engine))
            print(f"{name}: {n_kills} kills, {len(tables[name])} trials, {time.monotonic() - began:.0f} s", flush=True)
            pd.testing.assert_frame_equal(tables[name], tables["calm"])
    print("every table is that of the undisturbed sweep")


if __name__ == "__main__":
    main()
