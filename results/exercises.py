"""The exercises that edit nayer.py (results/README.md): python results/exercises.py ACTION

edits      4 and 5, beside nayer.py as it is (results/exercises.csv)
gradients  2: how large those of L_CE and L_BN over the weights of G are, mean over the steps of all
           batches but the first (results/exercises_gradients.csv)

Each edit is made in a copy of nayer.py, in runs/exercises/, which distils the digits with seeds 0
to 2.
"""

import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import ablations
import figures

import nayer

ROOT = Path(__file__).resolve().parent.parent
KEEP = "torch.where(better, images.detach(), best_images)"
LOSS = "loss = alpha_ce * loss_ce + alpha_bn * loss_bn + alpha_adv * loss_adv"
VARIATION = "(images[..., 1:] - images[..., :-1]).abs().mean()"
GRADIENTS = """
        for term in (alpha_ce * loss_ce, alpha_bn * loss_bn):
            slopes = torch.autograd.grad(term, list(generator.parameters()), retain_graph=True)
            print("gradient", sum(slope.square().sum() for slope in slopes).sqrt().item())"""
EDITS = {  # exercise: (the text of nayer.py, what takes its place)
    "as it is": (KEEP, KEEP),
    "4: keep the last step's images": (KEEP, "images.detach()"),
    "5: add the total variation, weight 50": (LOSS, f"{LOSS} + 50 * {VARIATION}"),
}
SEEDS = range(3)
BALANCES = ("", "--bn-momentum 0", "--bn-momentum 0 --alpha-bn 0.3")


def edited_copy(folder, old, new):
    """folder/nayer.py with one text replaced, and folder/teachers/."""
    source = (ROOT / "nayer.py").read_text()
    assert source.count(old) == 1, f"nayer.py has changed: {old}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "nayer.py").write_text(source.replace(old, new))
    shutil.copytree(ROOT / "teachers", folder / "teachers", dirs_exist_ok=True)


def distil(folder, flags):
    """Run the nayer.py in `folder`. Returns what it printed."""
    command = [sys.executable, "nayer.py", *flags.split()]
    done = subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout


def edits():
    rows = []
    for number, (name, (old, new)) in enumerate(EDITS.items()):
        folder = ROOT / f"runs/exercises/{number}"
        edited_copy(folder, old, new)
        for seed in SEEDS:
            run = folder / str(seed)
            distil(folder, f"--seed {seed} --out {seed} --resume")
            accuracy = round(100 * figures.summary_of(run)["student_accuracy"], 2)
            count, batches = figures.best_is_last(figures.generator_rows(run))
            row = dict(exercise=name, seed=seed, accuracy=accuracy)
            rows.append(row | dict(best_is_last=count, batches=batches))
    nayer.write_table(ROOT / "results/exercises.csv", rows)


def gradients():
    folder = ROOT / "runs/exercises/gradients"
    shutil.rmtree(folder, ignore_errors=True)  # of a stopped run not all is printed
    edited_copy(folder, LOSS, LOSS + GRADIENTS)
    rows = []
    for number, flags in enumerate(BALANCES):
        for seed in SEEDS:
            out = f"--seed {seed} --out {number}_{seed} --agree-batches 0 --no-eval"
            printed = distil(folder, f"{ablations.CUT} {flags} {out}")
            sizes = [float(text) for text in re.findall("gradient (.*)", printed)]
            steps = 20  # of the first batch, for which L_BN has no average yet
            of_ce = statistics.fmean(sizes[2 * steps :: 2])
            of_bn = statistics.fmean(sizes[2 * steps + 1 :: 2])
            row = dict(flags=flags, seed=seed, ce=f"{of_ce:.4g}", bn=f"{of_bn:.4g}")
            rows.append(row | dict(ratio=f"{of_bn / of_ce:.4g}"))
            nayer.write_table(ROOT / "results/exercises_gradients.csv", rows)


if __name__ == "__main__":
    actions = dict(edits=edits, gradients=gradients)
    if len(sys.argv) != 2 or sys.argv[1] not in actions:
        sys.exit(__doc__)
    actions[sys.argv[1]]()
