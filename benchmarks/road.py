"""The road of R1 over seeds: what every stage was worth, as one table.

    for seed in 0 1 2; do trivet run configs/r1/tiny.toml seed=$seed --out runs/r1-$seed; done
    python benchmarks/road.py runs/r1-0 runs/r1-1 runs/r1-2

A cell is the mean over the runs with its 95% interval (Student's t over runs). Below: accuracy and length of thought over the
steps of R1-Zero and of RL after a cold start, what sampling kept, the reward model, and the seconds of every stage.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}  # of Student's t, by number of runs


def cell(values: list[float], form: str = ".3f") -> str:
    if len(values) < 2:
        return f"{values[0]:{form}}"
    half = T95[len(values)] * stdev(values) / math.sqrt(len(values))
    return f"{mean(values):{form}} ± {half:{form}}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    runs: list[Path] = parser.parse_args().runs
    points = [json.loads((run / "results.json").read_text())["points"] for run in runs]
    probes = list(next(iter(points[0].values())))
    print("| stage | " + " | ".join(probes) + " | thinks | thought | in digits |")
    print("|---" * (len(probes) + 4) + "|")
    for stage in points[0]:

        def over(pick: Callable[[dict[str, Any]], float], stage: str = stage) -> list[float]:
            return [pick(found[stage]) for found in points]

        row = [cell(over(lambda r, p=probe: r[p]["accuracy"]["mean"])) for probe in probes]  # type: ignore[misc]
        row += [
            cell(over(lambda r: r["chain"]["thinks"]), ".2f"),
            cell(over(lambda r: r["chain"]["mean_reasoning_tokens"]), ".1f"),
            cell(over(lambda r: r["chain"]["parts"]["alphabet"]), ".3f"),
        ]
        print(f"| {stage} | " + " | ".join(row) + " |")
    for stage in ("zero", "reason"):
        lines = [[json.loads(x) for x in (run / stage / "metrics.jsonl").read_text().splitlines()] for run in runs]
        print(f"\n{stage}: step, accuracy on chains, tokens of their thoughts (means of ten steps)")
        for start in range(0, len(lines[0]), 10):
            part = [rows[start : start + 10] for rows in lines]
            columns = [
                [mean(row[key] for row in rows) for rows in part]
                for key in ("accuracy/chain", "reasoning_tokens/chain")
            ]
            print(f"  {start + 1:3d} to {start + 10:3d}  {cell(columns[0])}  {cell(columns[1], '.1f')}")
    for stage in ("select", "pairs", "teach", "likes"):
        found = [json.loads((run / stage / "done.json").read_text()) for run in runs]
        keys = ["eval/accuracy"] if stage == "likes" else sorted({key for done in found for key in done})
        print(
            f"\n{stage}: "
            + "; ".join(f"{key} {cell([float(done.get(key, 0)) for done in found], '.3g')}" for key in keys)
        )
    seconds = {
        stage: [json.loads((run / stage / "done.json").read_text()).get("seconds") for run in runs]
        for stage in json.loads((runs[0] / "results.json").read_text())["points"]
    }
    print("\nseconds: " + "; ".join(f"{s} {cell([x for x in v if x is not None], '.0f')}" for s, v in seconds.items()))


if __name__ == "__main__":
    main()
