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
KEEP = "torch.where(better, images.detach(), best_images)"
LOSS = "loss = alpha_ce * loss_ce + alpha_bn * loss_bn + alpha_adv * loss_adv"
VARIATION = "(images[..., 1:] - images[..., :-1]).abs().mean()"
EDITS = {  # exercise: (the text of nayer.py, what takes its place)
    "as it is": (KEEP, KEEP),
    "4: keep the last step's images": (KEEP, "images.detach()"),
    "5: add the total variation, weight 50": (LOSS, f"{LOSS} + 50 * {VARIATION}"),
}


def edited_copy(folder, old, new):
    """folder/nayer.py with one text replaced, and folder/teachers/."""
    source = (ROOT / "nayer.py").read_text()
    assert source.count(old) == 1, f"nayer.py has changed: {old}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "nayer.py").write_text(source.replace(old, new))
    shutil.copytree(ROOT / "teachers", folder / "teachers", dirs_exist_ok=True)


def best_is_last(run):
    """(batches in which the last step has the lowest loss, all batches)"""
    batches = {}
    for row in figures.learnt(run / "generator.csv"):
        batch = (row["epoch"], row["batch"])
        batches.setdefault(batch, []).append(float(row["loss"]))
    count = 0
    for losses in batches.values():
        if losses[-1] == min(losses):
            count += 1
    return count, len(batches)


def measure(folder, seed):
    """What the table shows of one run of the nayer.py in `folder`."""
    out = folder / str(seed)
    command = [sys.executable, "nayer.py", "--seed", str(seed), "--out", str(out), "--resume"]
    subprocess.run(command, cwd=folder, check=True)
    summary = json.loads((out / "summary.json").read_text())
    count, batches = best_is_last(out)
    return dict(
        accuracy=round(100 * summary["student_accuracy"], 2),
        best_is_last=count,
        batches=batches,
    )


def main():
    rows = []
    for number, (name, (old, new)) in enumerate(EDITS.items()):
        folder = ROOT / f"runs/exercises/{number}"
        edited_copy(folder, old, new)
        for seed in range(3):
            rows.append(dict(exercise=name, seed=seed) | measure(folder, seed))
    with open(ROOT / "results/exercises.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
