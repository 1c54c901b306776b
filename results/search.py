"""Choose the settings of the preset `cpu` on images that are not test images.

    python results/search.py --data-root data/cifar10_jpeg --out runs/search

Each trial is a run of nayer.py; its row goes to results/search.csv as it ends, and a row that is
there already is not measured again. The first trial, "bank", is whole. Trials of the student's half
are handed its images in the place of a synthesis, so that they differ in nothing else; they have a
quarter of its student steps. All are scored on 5,000 JPEG *training* images (the first 500 of each
class), which the teacher has seen in its training and no student here.
"""

import argparse
import os
import shutil
import sys
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import figures
import torch

ROOT = Path(__file__).resolve().parent.parent
TABLE, TEACHER = ROOT / "results/search.csv", "teachers/cifar10_wrn40_2.safetensors"
sys.path.insert(0, str(ROOT))
import nayer  # noqa: E402

SUMS = "images seconds_synthesis seconds_distillation".split()
BANK = "--warmup-epochs 6 --warmup-batches 6 --epochs 25 --batches 2 --generator-steps 8 "
BANK += "--synthesis-batch 200 --reuse 4 --mix 0.5 --student-batch 64 --lr 0.2 --no-nesterov "
BANK += "--weight-decay 1e-4 --student-steps "
BETTER = "--nesterov --weight-decay 5e-4"
STUDENT = {  # trial: flags
    "as the bank's": "",
    "Nesterov": "--nesterov",
    "weight decay 5e-4": "--weight-decay 5e-4",
    "mixing fades with the rate": "",
    "half of each batch's images": "--synthesis-batch 100",
    "Nesterov, weight decay 5e-4": BETTER,
    "R = 8, equal time": "--reuse 8 --student-steps 172",
    "Nesterov, weight decay 1e-3": "--nesterov --weight-decay 1e-3",
    "Nesterov, weight decay 5e-4, no mixing": f"{BETTER} --mix 0",
    "Nesterov, weight decay 5e-4, R = 2, equal time": f"{BETTER} --reuse 2 --student-steps 108",
    "Nesterov, weight decay 5e-4, rate 0.1": f"{BETTER} --lr 0.1",
    "2.5 times as long, rate 0.1": f"{BETTER} --student-steps 360 --lr 0.1",
    "2.5 times as long, rate 0.2": f"{BETTER} --student-steps 360",
    "2.5 times as long, rate 0.05": f"{BETTER} --student-steps 360 --lr 0.05",
}


def validation(root, out):
    """out/data: a data set whose test images are links to 5,000 training images."""
    for folder in sorted((root / "train").iterdir()):
        place = out / "data/test" / folder.name
        place.mkdir(parents=True, exist_ok=True)
        for path in sorted(folder.iterdir())[:500]:
            if not (place / path.name).exists():
                os.symlink(path.resolve(), place / path.name)


def replay(run):
    """A stand-in for nayer.synthesize that hands out the images of a finished run, in order."""
    made = torch.cat([figures.made(run, epoch)[0] for epoch in (-1, *figures.epochs(run))])
    batches = iter(made.split(200))

    def synthesize(generator, noisy_layer, inputs, labels, *networks, steps, **how):
        return next(batches)[: len(labels)], torch.zeros(steps, 4)

    return synthesize


def trial(out, name, seed, flags, patches=()):
    """One row of the table, unless it is there."""
    rows = figures.read(TABLE) if TABLE.exists() else []
    if any((row["trial"], row["seed"]) == (name, str(seed)) for row in rows):
        return
    folder = out / f"{name} {seed}".replace(" ", "_")
    if patches:
        shutil.rmtree(folder, ignore_errors=True)  # the images handed out begin with the first
    common = ["--dataset", "folder", "--data-root", str(out / "data"), "--teacher", TEACHER]
    common += ["--preset", "cpu", "--seed", str(seed), "--out", str(folder), "--resume"]
    with ExitStack() as stack:
        for one in patches:
            stack.enter_context(one)
        summary = nayer.main([*common, *flags.split()])
    row = dict(trial=name, seed=seed, flags=flags)
    row |= {key: round(summary[key], 1) for key in SUMS}
    figures.add(TABLE, row | dict(accuracy=summary["student_accuracy"]))


def student(out, name):
    """A trial of the student's half, from its beginning."""
    distill, fade = nayer.distill, name == "mixing fades with the rate"

    def fading(teacher, student, memory, optimizer, *rest, mix, **how):
        mix *= optimizer.param_groups[0]["lr"] / 0.2 if fade else 1
        return distill(teacher, student, memory, optimizer, *rest, mix=mix, **how)

    patches = [patch.object(nayer, "synthesize", replay(out / "bank_0"))]
    patches += [patch.object(nayer, "distill", fading)]
    trial(out, name, 0, f"{BANK}144 {STUDENT[name]}", patches)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-root", type=Path, default=Path("data/cifar10_jpeg"))
    parser.add_argument("--out", type=Path, default=Path("runs/search"))
    args = parser.parse_args()
    args.out = args.out.resolve()
    validation(args.data_root, args.out)
    os.chdir(ROOT)
    trial(args.out, "bank", 0, f"{BANK}580")
    for name in STUDENT:
        student(args.out, name)


if __name__ == "__main__":
    nayer.run_script(main)
