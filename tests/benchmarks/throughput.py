"""How much more do two workers do than one?  One plan is run in four ways, with a thread in each worker.

The ways are one process, two processes that share a folder by shards, and Ray with one worker and with two. Every way
runs the same trials and must end with the same table. What counts is the rate of finished trials after each worker has
finished its first one, so that loading libraries and models is left out; the whole time stands beside it.

`make bench-throughput` writes results-throughput.json, with the number of processes that wanted a core before each way
began: on a machine that others use, the factors are too low.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import yaml

import melbo_lens as ml
from tests.integration.sweeps.test_sweep import command, without_seconds

RESULTS = Path(__file__).parent / "results-throughput.json"
WAYS = {"one process": (1, "here"), "two shards": (2, "here"), "Ray, one": (1, "ray"), "Ray, two": (2, "ray")}
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"}


def write_plan(folder, n):
    """Trials of a second or so, since files and locks cost milliseconds."""
    text = ml.organisms.load("modes").prompts["clean"][0]
    entry = {"kind": "vectors", "source_layer": 0, "target_layer": 4, "radius": 12.0, "n_vectors": 32}
    entry |= {"orthogonal": False, "seed": list(range(n)), "n_steps": 12}
    said = {"model": "modes", "prompts": [text], "max_new_tokens": 16, "trials": [entry]}
    (folder / "plan.yaml").write_text(yaml.safe_dump(said))


def run(folder, n_workers, engine):
    """Runs the plan of a folder, and returns the whole seconds and the trials that were finished in a second."""
    asked = command(folder, engine)
    if engine == "ray":
        commands = [[*asked, "--workers", str(n_workers)]]
    else:
        commands = [[*asked, "--shard", f"{i + 1}/{n_workers}"] for i in range(n_workers)]
    began, environment = time.monotonic(), {**os.environ, **ENVIRONMENT}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    processes = [subprocess.Popen(one, env=environment, **quiet) for one in commands]
    for process in processes:
        if process.wait():
            sys.exit(f"{process.args} ended with {process.returncode}")
    seconds = time.monotonic() - began
    ended = sorted(path.stat().st_mtime for path in (folder / "out").glob("*.safetensors"))
    return seconds, (len(ended) - n_workers) / (ended[-1] - ended[n_workers - 1])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    options = parser.parse_args()
    ways, tables = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.ways:
            n_workers, engine = WAYS[name]
            place = Path(folder) / name.replace(",", "").replace(" ", "-")
            place.mkdir()
            write_plan(place, options.trials)
            load = os.getloadavg()[0]
            seconds, rate = run(place, n_workers, engine)
            ways[name] = {"workers": n_workers, "seconds": round(seconds, 1), "trials_per_second": round(rate, 3)}
            ways[name]["load_before"] = round(load, 2)
            tables[name] = without_seconds(ml.merge(place / "out"))
            pd.testing.assert_frame_equal(tables[name], tables[options.ways[0]])
            print(f"{name}: {seconds:.0f} s, {rate:.2f} trials a second (load before: {load:.1f})", flush=True)
    factors = {
        label: round(ways[two]["trials_per_second"] / ways[one]["trials_per_second"], 2)
        for label, one, two in (("shards", "one process", "two shards"), ("Ray", "Ray, one", "Ray, two"))
        if one in ways and two in ways
    }
    print("two workers against one:", factors)
    results = {"trials": options.trials, "cores": os.cpu_count(), "ways": ways, "factors": factors}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
