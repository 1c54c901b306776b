"""Which number tells the accuracy without a real image? python results/scores.py ACTION [FLAGS]

    FAMILY      scores every student of a family of runs, see FAMILIES: its rows in scores.csv.
                FLAGS are nayer.py's, such as --data-root for an accuracy that no log has
    older       six scores of the runs of ablations.py: adds them to its files
    draw        scores.png from these files
    report      all tables in Markdown

A number is chosen on the students with an even seed, and reported on those with an odd one.
"""

import argparse
import contextlib
import copy
import inspect
import os
import statistics
import tempfile
from math import isnan, nan
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest.mock import patch

import ablations
import figures
import torch
from ablations import FLOOR_AND_CEILING, PLAN, RUNS, SCORED
from matplotlib.figure import Figure
from scipy import stats

import nayer

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "results/scores.csv"
SEED = 1000  # of the held-out images; no run has it


class Family(NamedTuple):
    flags: str  # of nayer.py: how its held-out images are made
    runs: str  # patterns of run folders
    other: str = ""  # the second student, where a variant has a single one


JPEG = "--dataset folder --teacher teachers/cifar10_wrn40_2.safetensors --student wrn16_1"
FAMILIES = dict(
    digits=Family(f"{ablations.CUT} --agree-batches 10", "runs/ablations/digits/*/*"),
    cifar10=Family(ablations.SMALL, "runs/ablations/cifar10_again/*/*"),
    seeds=Family("--agree-batches 10", "runs/seed*"),
    cpu=Family(
        f"{JPEG} --preset cpu", "results/cpu_recipe results/cpu_recipe/seed1 results/cpu_long"
    ),
    gpu=Family(
        f"{JPEG} --preset cifar10 --synthesis-batch 200 --agree-batches 4",
        "results/gpu",
        other="results/cpu_long",
    ),
    tiny_imagenet=Family(
        "--dataset tiny_imagenet --teacher results/tiny_imagenet/squeezenet.py:load "
        "--student results/tiny_imagenet/squeezenet.py:half --generator-steps 10 "
        "--generator-life 1000 --generator-width 32 --alpha-ce 1 --alpha-bn 1",
        "results/tiny_imagenet",
    ),
)
NUMBERS = dict(  # in %
    agree="`agree`: S predicts T's class on held-out images",
    blended="the same on held-out images blended in pairs, half of each",
    crops="the same on random crops, after padding by a quarter of the side",
    against="mean of `agree` and the same on images made against S, with L_adv",
    weighted="`agree`, each image weighted by T's confidence",
    probability="mean probability that S gives to T's class",
    two_students="S predicts the class of another S",
    matched="S predicts T's class in spite of noise that T withstands as often as it is right",
)
OLDER = {  # another run: the same variant with the next seed
    "agree_kept": "agreement on the last batch of another run's warm-up",
    "agree_new": "agreement on another run's last epoch, made with L_adv",
    "agree_fresh": "agreement on held-out images, as in `agree`",
    "kd_kept": "L_KD on the last batch of another run's warm-up",
    "kd_new": "L_KD on another run's last epoch",
    "kd_fresh": "L_KD on held-out images",
}


# ---- Held-out images -----------------------------------------------------------------------------
def parts_of(flags):
    """What nayer.main has when it is about to make held-out images: make_batch, its G and Z, and by
    their names there all that make_batch works on; and T's description."""
    found = {}

    class Stop(Exception):
        pass

    def stop(make_batch, pair, *others):
        found.update(inspect.getclosurevars(make_batch).nonlocals)
        found.update(make_batch=make_batch, pair=pair)
        raise Stop

    with tempfile.TemporaryDirectory() as out, contextlib.suppress(Stop):
        with patch.object(nayer, "held_out_images", stop):
            nayer.main([*flags, "--seed", str(SEED), "--device", "cpu", "--no-eval", "--out", out])
    _, found["info"] = nayer.load_teacher(found["args"])
    return SimpleNamespace(**found)


def make_images(parts, pair, alpha_adv):
    """Those images of a new batch whose label T predicts: float32 (n, ch, h, w) in [0, 1]."""
    images, labels, _ = parts.make_batch(*pair, alpha_adv)
    right = nayer.predict(parts.teacher, images, parts.augment, parts.amp) == labels
    return images[right].float() / 255


def held_out_images(parts):
    """The later half of the batches, as in nayer.held_out_images, all in one tensor."""
    num_batches = parts.args.agree_batches
    made = [make_images(parts, parts.pair, alpha_adv=0.0) for _ in range(num_batches)]
    return torch.cat(made[num_batches // 2 :])


@torch.no_grad()
def logits_of(model, images, parts):
    """A network's logits (n, C) on images (n, ch, h, w) in [0, 1]."""
    with parts.amp:
        logits = [model(parts.augment.normalize(part)) for part in images.split(200)]
    return torch.cat(logits).float()


def same(one, other):
    """How often two networks predict the same class, in %. one, other: their logits (n, C)."""
    return 100 * (one.argmax(1) == other.argmax(1)).float().mean().item()


def with_noise(images, of_t, parts):
    """The images with Gaussian noise, as strong as can be if T is to keep its class as often as it
    is right on its real test images. That share comes with T."""
    noise = torch.randn_like(images)
    low, high = 0.0, 1.0  # deviation of the noise
    for _ in range(8):
        middle = (low + high) / 2
        kept = same(logits_of(parts.teacher, images + middle * noise, parts), of_t)
        if kept < 100 * parts.info["accuracy"]:
            high = middle
        else:
            low = middle
    return images + low * noise


def sets_of(parts):
    """{number: (images (n, ch, h, w), T's logits (n, C))} of the numbers that ask for T's class."""
    images = held_out_images(parts)
    channels, side = images.shape[1], images.shape[-1]
    crop = nayer.Augment([0.0] * channels, [1.0] * channels, side // 4, parts.args.flip)
    sets = dict(agree=images, blended=(images + images.roll(1, dims=0)) / 2, crops=crop(images))
    found = {key: (made, logits_of(parts.teacher, made, parts)) for key, made in sets.items()}
    if "accuracy" in parts.info:
        _, of_t = found["agree"]
        found["matched"] = (with_noise(images, of_t, parts), of_t)
    return found


def images_against(student, parts):
    """Images of a batch with L_adv, from G and Z as the held-out images left them."""
    torch.manual_seed(SEED)  # the same noise for all students
    average = parts.bn_loss.average
    parts.student.load_state_dict(student.state_dict())
    images = make_images(parts, copy.deepcopy(parts.pair), parts.args.alpha_adv)
    parts.bn_loss.average = average
    return images


# ---- A family's students -------------------------------------------------------------------------
def students_of(family):
    """{variant: [(seed, run folder)]}, in order, of the students that are there."""
    found = {}
    for pattern in FAMILIES[family].runs.split():
        for run in ROOT.glob(pattern):
            variant = run.parent.name if run.is_relative_to(RUNS) else ""
            if (run / "student.safetensors").exists() and variant not in FLOOR_AND_CEILING:
                seed = int(figures.settings_of(run)["seed"])
                found.setdefault(variant, []).append((seed, run))
    return {variant: sorted(found[variant]) for variant in sorted(found)}


def numbers_of(student, other, sets, parts):
    """NUMBERS of a student, those that can be measured. other: a second one, or None."""
    found = {}
    for key, (images, of_t) in sets.items():
        found[key] = same(logits_of(student, images, parts), of_t)
    images, of_t = sets["agree"]
    of_s = logits_of(student, images, parts)
    confidence, classes = of_t.softmax(1).max(1)
    agree = of_s.argmax(1) == classes
    found["weighted"] = 100 * (confidence[agree].sum() / confidence.sum()).item()
    found["probability"] = 100 * of_s.softmax(1).gather(1, classes[:, None]).mean().item()
    if other is not None:
        found["two_students"] = same(of_s, logits_of(other, images, parts))
    images = images_against(student, parts)
    hard = same(logits_of(student, images, parts), logits_of(parts.teacher, images, parts))
    found["against"] = (found["agree"] + hard) / 2
    return found


def measure(family, flags):
    """The rows of a family in FILE, in the place of its earlier ones."""
    plan, variants = FAMILIES[family], students_of(family)
    nayer.check(variants, f"there is no student in {plan.runs}")
    parts = parts_of([*plan.flags.split(), *flags])
    sets = sets_of(parts)
    test = []  # filled by the first run whose log has no accuracy

    def load(run):
        return nayer.load_model(run / "student.safetensors", copy.deepcopy(parts.student))

    earlier = figures.read(FILE) if FILE.exists() else []
    rows = [row for row in earlier if row["family"] != family]
    for runs in variants.values():
        others = [load(run) for _, run in runs[1:] + runs[:1]]
        if len(runs) == 1:
            others = [load(ROOT / plan.other) if plan.other else None]
        for (seed, run), other in zip(runs, others):
            student = load(run)
            accuracy = figures.percent(figures.log_of(run)[-1]["accuracy"])
            if isnan(accuracy):
                test = test or nayer.test_batches(parts.args, parts.info)[::5]
                accuracy = 100 * nayer.accuracy(student, test, parts.augment, parts.amp)
            row = dict(family=family, run=run.relative_to(ROOT), seed=seed, accuracy=accuracy)
            row |= numbers_of(student, other, sets, parts)
            rows.append(row)
            figures.write(FILE, rows)
            print(*row.values(), flush=True)


# ---- The older six, of the ablations -------------------------------------------------------------
@torch.no_grad()
def judge(student, teacher, views):
    """(how often S predicts T's class, in %; L_KD)"""
    of_t, of_s = teacher(views), student(views)
    return same(of_s, of_t), nayer.distillation_loss(of_s, of_t, 20.0).item()


def add_older(action):
    """Add OLDER to the file of an action."""
    parts = parts_of(FAMILIES[action].flags.split())
    args, fresh = parts.args, held_out_images(parts)
    rows = ablations.read(action)
    for row in rows:
        # Images made as the run's own, and none that its student has learned from.
        variant = RUNS / action / row["variant"]
        other = variant / str((row["seed"] + 1) % PLAN[action].seeds)
        kept = figures.made(other, args.warmup_epochs - 1)["images"][-args.synthesis_batch :]
        new = figures.made(other, args.warmup_epochs + args.epochs - 1)["images"]
        student = nayer.load_model(variant / str(row["seed"]) / "student.safetensors")
        for key, images in dict(new=new / 255, kept=kept / 255, fresh=fresh).items():
            views = parts.augment.normalize(images)
            row[f"agree_{key}"], row[f"kd_{key}"] = judge(student, parts.teacher, views)
    figures.write(ablations.FILES[action], rows)


def older():
    for action in SCORED:
        if (RUNS / action).exists():
            add_older(action)


def ranks(rows, key):
    """Spearman's rank correlation of a score with the accuracy; L_KD counts backwards."""
    accuracies = figures.column(rows, "accuracy")
    if len(set(accuracies)) == 1:
        return nan  # no ranks to compare
    correlation = stats.spearmanr(figures.column(rows, key), accuracies).statistic
    return -correlation if key.startswith("kd") else correlation


def draw():
    figure = Figure(figsize=(12, 8), layout="constrained")
    for line, action in zip(figure.subplots(2, 3), SCORED):
        students = ablations.read(action)
        for axes, key in zip(line, OLDER):  # the first three
            for number, (variant, rows) in enumerate(ablations.complete(action).items()):
                marker = "." if number < 10 else "x"
                accuracies = figures.column(rows, "accuracy")
                axes.plot(figures.column(rows, key), accuracies, marker, label=variant)
            axes.set_title(f"{action}: Spearman {ranks(students, key):.2f}")
            axes.set_xlabel(OLDER[key].replace(" on ", ", %, on\n"))
            axes.grid(alpha=0.3)
        line[0].set_ylabel("true accuracy, %")
        line[2].legend(fontsize=6)
    figure.savefig(ROOT / "results/scores.png", dpi=80)


# ---- Tables --------------------------------------------------------------------------------------
def off_by(rows, key):
    """(mean distance of a number from the accuracy in points, mean of the number less accuracy)"""
    pairs = zip(figures.column(rows, key), figures.column(rows, "accuracy"))
    signed = [number - accuracy for number, accuracy in pairs]
    return statistics.fmean(map(abs, signed)), statistics.fmean(signed)


def cells_of_older(action, key):
    """(rank correlation of a score with the accuracy over all students, mean of that within a
    variant; of an agreement, how many points it is off in the mean, without floor and ceiling)"""
    students = ablations.read(action)
    within = torch.tensor([ranks(rows, key) for rows in ablations.complete(action).values()])
    cells = [f"{ranks(students, key):.2f}", f"{within.nanmean():.2f}", ""]
    if key.startswith("agree"):
        rows = [row for row in students if row["variant"] not in FLOOR_AND_CEILING]
        cells[2] = f"{off_by(rows, key)[0]:.1f}"
    return cells


def halves():
    """{family: rows} twice: even seeds, and odd ones. A family of few is not divided, but reported
    as it is, with the odd ones."""
    even, odd = {}, {}
    for family in FAMILIES:
        rows = [row for row in figures.read(FILE) if row["family"] == family]
        if len(rows) > 4:
            even[family] = [row for row in rows if int(row["seed"]) % 2 == 0]
            rows = [row for row in rows if int(row["seed"]) % 2 == 1]
        if rows:
            odd[family] = rows
    return even, odd


def print_numbers(title, families):
    """A row for each number. For each family: its mean distance from the accuracy, the mean with
    its sign, and of ten students or more the rank correlation. Last, in how many families the
    number is nearer than `agree`."""
    heads = [f"{family}: {len(rows)}" for family, rows in families.items()]
    print()
    figures.print_row(title, *heads, "nearer")
    print("|---" * (len(heads) + 2) + "|")
    for key, words in NUMBERS.items():
        cells, nearer = [], 0
        for rows in families.values():
            distance, bias = off_by(rows, key)
            nearer += distance < off_by(rows, "agree")[0]
            cell = "" if isnan(distance) else f"{distance:.1f} ({bias:+.1f})"
            cells.append(f"{cell}, {ranks(rows, key):.2f}" if len(rows) >= 10 else cell)
        figures.print_row(words, *cells, f"{nearer} of {len(families)}")


def report():
    heads = ["digits: all", "within", "off by", "CIFAR-10: all", "within", "off by"]
    figures.print_row("score", *heads)
    print("|---" * (len(heads) + 1) + "|")
    for key, words in OLDER.items():
        cells = [cell for action in SCORED for cell in cells_of_older(action, key)]
        figures.print_row(words, *cells)
    even, odd = halves()
    print_numbers("even seeds", even)
    print_numbers("odd seeds, and families of few", odd)


def main():
    parser = figures.parser_of("scores.py", __doc__)
    parser.add_argument("action", choices=[*FAMILIES, "older", "draw", "report"])
    parser.add_argument("flags", nargs=argparse.REMAINDER)
    given = parser.parse_args()
    os.chdir(ROOT)
    if given.action in FAMILIES:
        measure(given.action, given.flags)
    else:
        dict(older=older, draw=draw, report=report)[given.action]()


if __name__ == "__main__":
    nayer.run_script(main)
