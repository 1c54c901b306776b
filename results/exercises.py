"""The two exercises that edit nayer.py (results/README.md): python results/exercises.py

Each edit is made in a copy of nayer.py, which then distils the digits with seeds 0 to 2, beside the
copy without an edit. A row per run goes to results/exercises.csv.
"""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import figures

ROOT = Path(__file__).resolve().parent.parent
KEEP = "shown if best_images is None else torch.where(better, shown, best_images)"
LOSS = "loss = alpha_ce * loss_ce + alpha_bn * loss_bn + alpha_adv * loss_adv"
EDITS = {  # exercise: (the text of nayer.py, what takes its place)
    "as it is": (KEEP, KEEP),
    "4: keep the last step's images": (KEEP, "shown"),
    "5: add the total variation, weight 50": (
        LOSS,
        f"{LOSS} + 50 * (images[..., 1:] - images[..., :-1]).abs().mean()",
    ),
}


def best_is_last(run):
    """(batches in which the last step has the lowest loss, all batches)"""
    batches = {}
    for row in figures.learnt(run / "generator.csv"):
        batches.setdefault((row["epoch"], row["batch"]), []).append(float(row["loss"]))
    return sum(losses[-1] == min(losses) for losses in batches.values()), len(batches)


def main():
    rows = []
    for number, (name, (old, new)) in enumerate(EDITS.items()):
        folder = ROOT / f"runs/exercises/{number}"
        folder.mkdir(parents=True, exist_ok=True)
        source = (ROOT / "nayer.py").read_text()
        assert source.count(old) == 1, f"nayer.py has changed: {old}"
        (folder / "nayer.py").write_text(source.replace(old, new))
        shutil.copytree(ROOT / "teachers", folder / "teachers", dirs_exist_ok=True)
        for seed in range(3):
            out = folder / str(seed)
            command = [sys.executable, "nayer.py", "--seed", str(seed), "--out", str(out)]
            subprocess.run([*command, "--resume"], cwd=folder, check=True)
            accuracy = 100 * json.loads((out / "summary.json").read_text())["student_accuracy"]
            last, count = best_is_last(out)
            row = dict(exercise=name, seed=seed, accuracy=round(accuracy, 2))
            rows.append(row | dict(best_is_last=last, batches=count))
    with open(ROOT / "results/exercises.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
