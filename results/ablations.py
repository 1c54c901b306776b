"""The table of ablations from the runs in a folder: python results/ablations.py runs/ablations

Reads DIR/<variant>/<seed>/summary.json, log.csv and generator.csv, as the loop in the README leaves
them. Prints a Markdown table, writes DIR/raw.csv (a row per run) and DIR/convergence.png.
"""

import csv
import json
import statistics
import sys
from pathlib import Path


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def measure(run):
    """What the table shows of one run. CE: mean over the batches after the first, which is the
    generator's childhood, at the 5th, 10th and last step."""
    summary = json.loads((run / "summary.json").read_text())
    log, steps = read(run / "log.csv"), read(run / "generator.csv")
    steps = [row for row in steps if (row["epoch"], row["batch"]) != ("0", "0")]
    last = max(int(row["step"]) for row in steps)
    curve = [
        statistics.fmean(float(row["loss_ce"]) for row in steps if int(row["step"]) == step)
        for step in range(last + 1)
    ]
    return dict(
        accuracy=100 * summary["student_accuracy"],
        ce_5=curve[4],
        ce_10=curve[9],
        ce_20=curve[19] if last >= 19 else curve[-1],
        diversity=statistics.fmean(float(row["diversity"] or "nan") for row in log),
        seconds=summary["seconds_total"],
    ), curve


def draw(path, curves):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained", facecolor="white")
    axes = figure.subplots()
    for name, runs in curves.items():
        mean = [statistics.fmean(values) for values in zip(*runs)]
        axes.plot(range(1, len(mean) + 1), mean, ".-", label=name)
    axes.set(xlabel="generator step within a batch", ylabel="L_CE", yscale="log")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=100)


def main(folder):
    found, curves, raw = {}, {}, []
    for variant in sorted(path for path in folder.iterdir() if path.is_dir()):
        for run in sorted(path.parent for path in variant.glob("*/summary.json")):
            values, curve = measure(run)
            name = variant.name.replace("--", "")
            found.setdefault(name, []).append(values)
            curves.setdefault(name, []).append(curve)
            raw.append(dict(variant=name, seed=run.name) | values)
    if not raw:
        sys.exit(f"no finished runs in {folder}")
    with open(folder / "raw.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, raw[0])
        writer.writeheader()
        writer.writerows(
            {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()} for row in raw
        )
    print("| variant | accuracy, % | CE at step 5 | 10 | 20 | diversity | s | seeds |")
    print("|---|---|---|---|---|---|---|---|")
    order = sorted(found, key=lambda name: (not name.startswith("default"), name))
    for name in order:
        cells = []
        for key, digits in zip(found[name][0], (2, 3, 3, 3, 2, 1)):
            values = [row[key] for row in found[name]]
            spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.{digits}f}{spread}")
        print(f"| {name} | {' | '.join(cells)} | {len(found[name])} |")
    inputs = ("default", "label-input onehot", "label-input noise")
    names = ("LTE", "one-hot", "noise")
    draw(folder / "convergence.png", {n: curves[i] for n, i in zip(names, inputs) if i in curves})


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
