"""What each part of NAYER is worth: python results/ablations.py ACTION [--only VARIANT ...]

    digits         every variant below on digits, 20 seeds, with a cut budget
    cifar10        what Z takes as input, on JPEG CIFAR-10, five seeds
    cifar10_again  the same runs, on another machine
    mixing         --mix on JPEG CIFAR-10, ten seeds
    tiny_imagenet  what Z takes as input, on Tiny-ImageNet with its 200 classes, ten seeds
    draw           the pictures: convergence_ACTION.png of the actions whose runs are there, and
                   ablations_digits.png from its file
    report         the tables in Markdown from the files: differences to the default, paired by seed

The rows are in results/ablations_ACTION.csv, those of digits in ablations_20_seeds.csv.

Each run is nayer.py's own `main`, in runs/ablations/<action>/<variant>/<seed>/, without held-out
images for `agree`, which would take as long as the run. A run that is there already is not
repeated, one that was stopped goes on.
"""

import contextlib
import itertools
import multiprocessing
import os
import statistics
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache, partial
from math import isnan, nan
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import figures
import torch
import torch.nn as nn
import train
from matplotlib.figure import Figure

import nayer

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "runs/ablations"

# ---- The variants --------------------------------------------------------------------------------
CUT = (
    "--warmup-epochs 1 --epochs 3 --generator-steps 20 --student-steps 24 --student-batch 128 "
    "--reuse 1 --no-nesterov --weight-decay 1e-4"
)
DIGITS = {  # what follows a "+" is a patch, below
    "default": "",
    "label-input onehot": "--label-input onehot",
    "label-input noise": "--label-input noise",
    "LTE, rows shuffled": "+shuffled",
    "LTE, random of the same covariance": "+random",
    "no-lte-norm": "+no_norm",
    "LTE centred, not scaled": "+centred",
    "LTE scaled, not centred": "+scaled",
    "noisy-layer fixed": "--noisy-layer fixed",
    "noisy-layer off": "--noisy-layer off",
    "images-per-matrix 1": "+one_image_per_matrix",
    "alpha-bn 0": "--alpha-bn 0",
    "bn-momentum 0": "--bn-momentum 0",
    "bn-momentum 0, alpha-bn 0.3": "--bn-momentum 0 --alpha-bn 0.3",
    "alpha-adv 0": "--alpha-adv 0",
    "bank-size 300": "--bank-size 300",
    "bank-size 100": "--bank-size 100",
    "Gaussian noise": "--generator-steps 1 +gaussian",
    "untrained generator": "--generator-steps 1 +untrained",
    "real training digits": "--generator-steps 1 +real",
}
FLOOR_AND_CEILING = ("Gaussian noise", "untrained generator", "real training digits")
SMALL = (
    "--dataset folder --teacher teachers/cifar10_wrn40_2.safetensors --student wrn16_1 "
    "--warmup-epochs 2 --warmup-batches 4 --epochs 6 --batches 1 --synthesis-batch 200 "
    "--generator-steps 10 --generator-life 100 --student-steps 160 --student-batch 64 "
    "--reuse 4 --lr 0.2 --nesterov --weight-decay 5e-4 --no-eval"
)
CIFAR10 = {
    "default": "",
    "LTE of CLIP": "+clip",
    "label-input onehot": "--label-input onehot",
    "label-input noise": "--label-input noise",
    "LTE, rows shuffled": "+shuffled",
    "LTE, random of the same covariance": "+random",
}
MIXING = {"default": "", "mix 0.5": "--mix 0.5"}
TINY = (  # a student in three minutes on a core
    "--dataset tiny_imagenet --teacher results/tiny_imagenet/squeezenet.py:load "
    "--student results/tiny_imagenet/squeezenet.py:half "
    "--warmup-epochs 1 --warmup-batches 1 --epochs 2 --batches 1 --synthesis-batch 200 "
    "--generator-steps 30 --generator-life 100 --generator-width 32 --alpha-ce 1 --alpha-bn 1 "
    "--student-steps 300 --student-batch 64 --reuse 4 --lr 0.1 --nesterov --weight-decay 5e-4 "
    "--no-eval"
)


class Action(NamedTuple):
    variants: dict  # name: flags
    budget: str  # flags of all variants
    seeds: int


PLAN = dict(
    digits=Action(DIGITS, CUT, seeds=20),
    cifar10=Action(CIFAR10, SMALL, seeds=5),
    cifar10_again=Action(CIFAR10, SMALL, seeds=5),
    mixing=Action(MIXING, SMALL, seeds=10),
    tiny_imagenet=Action(CIFAR10, TINY, seeds=10),
)
FILES = dict(  # of the rows
    digits=ROOT / "results/ablations_20_seeds.csv",
    cifar10=ROOT / "results/ablations_cifar10.csv",
    cifar10_again=ROOT / "results/ablations_cifar10_again.csv",
    mixing=ROOT / "results/ablations_mixing.csv",
    tiny_imagenet=ROOT / "results/ablations_tiny_imagenet.csv",
)
FLOAT32 = torch.autocast("cpu", enabled=False)
SCORED = ("digits", "cifar10")
CONVERGENCE = ("digits", "cifar10", "tiny_imagenet")  # those that vary the input of Z
# What is measured of a run: figures.NUMBERS, and how often S predicts T's class on the test images.
MEASURED = ("accuracy", "as_teacher", "ce_5", "ce_10", "ce_20", "ce_30", "diversity", "seconds")


# ---- Patches: variants that no flag of nayer.py makes --------------------------------------------
# Each takes the seed and the file of CLIP's vectors, and returns the context of its runs.
def embeddings(change, seed, clip):
    """nayer.embeddings_of with its rows (C, D) changed."""
    embeddings_of = nayer.embeddings_of

    def changed(class_names, args):
        return change(embeddings_of(class_names, args), class_names, seed, clip)

    return patch.object(nayer, "embeddings_of", changed)


def shuffled(rows, class_names, seed, clip):
    """The same vectors, each that of another class: the geometry without the meaning."""
    generator = torch.Generator().manual_seed(seed)
    order = in_order = torch.arange(len(rows))
    while (order == in_order).any():
        order = torch.randperm(len(rows), generator=generator)
    return rows[order]


def random(rows, class_names, seed, clip):
    """Gaussian vectors with the mean and the covariance of the rows: not even their geometry."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(len(rows), len(rows), generator=generator) / (len(rows) - 1) ** 0.5
    return rows.mean(0) + mix @ (rows - rows.mean(0))


def of_clip(rows, class_names, seed, clip):
    """CLIP's vectors. The file has names of its own, in an order of its own."""
    tensors, about = nayer.read_safetensors(clip)
    (vectors,) = tensors.values()
    first_synonyms = [text.split(",")[0] for text in about["class_names"].splitlines()]
    return vectors[[first_synonyms.index(name) for name in class_names]].float()


class Half(nn.Module):
    """Half of the BatchNorm on the LTE, with its weight and bias: centres only, or scales only."""

    def __init__(self, size, centre):
        super().__init__()
        self.centre = centre
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))

    def forward(self, x):
        variance, mean = torch.var_mean(x, 0, correction=0)
        if self.centre:
            x = x - mean
        else:
            x = x / (variance + 1e-5).sqrt()
        return x * self.weight + self.bias


def noisy_layer(make, seed, clip):
    """A NoisyLayer whose norm is make(embedding_size)."""

    class Layer(nayer.NoisyLayer):
        def __init__(self, embedding_size, num_matrices, images_per_matrix):
            super().__init__(embedding_size, num_matrices, images_per_matrix)
            self.norm = make(embedding_size)

    return patch.object(nayer, "NoisyLayer", Layer)


def one_image_per_matrix(seed, clip):
    """A matrix for each image in the place of one for each set of classes."""

    class Layer(nayer.NoisyLayer):
        def __init__(self, embedding_size, num_matrices, images_per_matrix):
            super().__init__(embedding_size, num_matrices * images_per_matrix, 1)

    return patch.object(nayer, "NoisyLayer", Layer)


def synthesize(make, seed, clip):
    """A synthesize whose images (B, ch, H, W), in [0, 1], are made by make(generator, hidden, seed,
    number of the batch), without a loss."""
    numbers = itertools.count()

    @torch.no_grad()
    def changed(generator, noisy_layer, inputs, *others, steps, alphas, **settings):
        images = make(generator, noisy_layer(inputs), seed, next(numbers))
        losses = {name: torch.zeros(steps) for name in alphas}
        return (images * 255).round().byte(), losses

    return patch.object(nayer, "synthesize", changed)


def gaussian(generator, hidden, seed, number):
    """Pixels with the mean and the deviation of the training digits, cut to [0, 1]."""
    mean, std = train.IMAGES["digits"]["mean"][0], train.IMAGES["digits"]["std"][0]
    size = generator.image_size
    pixels = torch.randn(len(hidden), 1, size, size) * std + mean
    return pixels.clamp(0, 1)


def untrained(generator, hidden, seed, number):
    return generator(hidden)


def real(generator, hidden, seed, number):
    """The training digits, none of them twice."""
    images, _ = train.stack(train.training_digits(generator.image_size))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return images[order].split(len(hidden))[number].float() / 255


PATCHES = dict(
    shuffled=partial(embeddings, shuffled),
    random=partial(embeddings, random),
    clip=partial(embeddings, of_clip),
    no_norm=partial(noisy_layer, nn.Identity),
    centred=partial(noisy_layer, partial(Half, centre=True)),
    scaled=partial(noisy_layer, partial(Half, centre=False)),
    one_image_per_matrix=one_image_per_matrix,
    gaussian=partial(synthesize, gaussian),
    untrained=partial(synthesize, untrained),
    real=partial(synthesize, real),
)


# ---- The runs ------------------------------------------------------------------------------------
@cache
def bring(action):
    """(teacher, its description, augment) of the runs of an action."""
    teacher, info = nayer.load_teacher(nayer.parse_args(PLAN[action].budget.split()))
    return teacher, info, nayer.Augment(info["mean"], info["std"], padding=0, flip=False)


def labelled_by(teacher, batches, augment, amp):
    """The batches (images, labels) with what T predicts as their labels."""
    return [(images, nayer.predict(teacher, images, augment, amp)) for images, _ in batches]


@cache
def test_images(action, data):
    """(batches, the same labelled by T), read once for all runs, which have no images."""
    teacher, info, augment = bring(action)
    args = nayer.parse_args(["--dataset", "folder", "--data-root", str(data)])
    batches = nayer.test_batches(args, info)
    return batches, labelled_by(teacher, batches, augment, FLOAT32)


def student_of(run, action):
    args = nayer.parse_args(PLAN[action].budget.split())
    _, info, _ = bring(action)
    classes = len(info["class_names"])
    network = nayer.load_student(args.student, classes, info["channels"], info["image_size"])
    return nayer.load_model(run / "student.safetensors", network)


def measure(action, run, data):
    """A row of the table. What was not measured is left out."""
    found = figures.measured(run) | dict(as_teacher=nan)
    if isnan(found["accuracy"]):
        batches, of_teacher = test_images(action, data)
        student = student_of(run, action)
        _, _, augment = bring(action)
        found["accuracy"] = 100 * nayer.accuracy(student, batches, augment, FLOAT32)
        found["as_teacher"] = 100 * nayer.accuracy(student, of_teacher, augment, FLOAT32)
    return {key: found[key] for key in MEASURED if not isnan(found[key])}


def work(action, variant, seed, data, clip):
    """One run, unless it is there, and what is measured of it."""
    torch.set_num_threads(1)
    plan = PLAN[action]
    flags, _, change = plan.variants[variant].partition("+")
    run = RUNS / action / variant / str(seed)
    run.mkdir(parents=True, exist_ok=True)
    command = f"{plan.budget} {flags} --seed {seed} --agree-batches 0 --resume".split()
    command += ["--data-root", str(data), "--out", str(run)]
    changed = PATCHES[change](seed, clip) if change else contextlib.nullcontext()
    with open(run / "console.txt", "a") as console, contextlib.redirect_stdout(console), changed:
        nayer.main(command)
    return dict(variant=variant, seed=seed) | measure(action, run, data)


def run_all(action, args):
    """All runs of an action that are not in its file yet. Each writes its row as it ends."""
    plan = PLAN[action]
    names = args.only
    if names is None:
        names = [name for name in plan.variants if args.clip or plan.variants[name] != "+clip"]
    rows = read(action)
    there = {(row["variant"], row["seed"]) for row in rows}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.processes, mp_context=context) as pool:
        jobs = []
        for seed in range(plan.seeds):  # all variants of a seed first
            for variant in names:
                if (variant, seed) not in there:
                    job = (work, action, variant, seed, args.data_root, args.clip)
                    jobs.append(pool.submit(*job))
        for job in as_completed(jobs):
            rows.append(job.result())
            rows.sort(key=itemgetter("variant", "seed"))
            figures.write(FILES[action], rows)
            print(*job.result().values(), flush=True)


def read(action):
    """The rows of an action, dicts; none if nothing was measured yet."""
    rows = figures.read(FILES[action]) if FILES[action].exists() else []
    return [row | dict(seed=int(row["seed"])) for row in rows]


def complete(action):
    """{variant: its rows, seed after seed} of the variants whose seeds are all measured."""
    there = {}
    for variant in PLAN[action].variants:
        rows = [row for row in read(action) if row["variant"] == variant]
        if len(rows) == PLAN[action].seeds:
            there[variant] = sorted(rows, key=itemgetter("seed"))
    return there


# ---- Pictures ------------------------------------------------------------------------------------
def draw_convergence(action):
    """The paper's measure: L_CE against the step of a batch, mean over the seeds whose runs are
    there."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for variant in CIFAR10:  # what Z takes as input
        if variant not in complete(action):
            continue
        curves = []
        for run in sorted((RUNS / action / variant).iterdir()):
            curves.append(figures.curve(figures.losses_of(run)))
        mean = [statistics.fmean(values) for values in zip(*curves)]
        axes.plot(range(1, len(mean) + 1), mean, ".-", label=variant)
    axes.set(xlabel="generator step within a batch", ylabel="L_CE", yscale="log")
    axes.set_title(f"{action}, {len(curves)} seeds")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.savefig(ROOT / f"results/convergence_{action}.png", dpi=90)


def draw():
    for action in CONVERGENCE:
        if (RUNS / action).exists() and complete(action):
            draw_convergence(action)
    draw_differences("digits")


# ---- Tables --------------------------------------------------------------------------------------
def draw_differences(action):
    """Each variant's difference to the default in points, with its interval, sorted; without floor
    and ceiling, which lie far off."""
    variants = complete(action)
    reference = figures.column(variants.pop("default"), "accuracy")
    found = []
    for name in variants.keys() - set(FLOOR_AND_CEILING):
        values = figures.column(variants[name], "accuracy")
        low, high, _ = figures.difference(values, reference, "")
        found.append(((low + high) / 2, (high - low) / 2, name))
    means, halves, names = zip(*sorted(found))
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.errorbar(means, names, xerr=halves, fmt="o", capsize=3)
    axes.axvline(0, color="gray")
    axes.set_xlabel("accuracy less the default's, points, with its 95 % confidence interval")
    axes.grid(alpha=0.3)
    figure.savefig(ROOT / f"results/ablations_{action}.png", dpi=80)


def report():
    tables = {}
    for action in PLAN:
        tables[action] = complete(action)
        known = "default" in tables[action]
        nayer.check(known, f"first run: python results/ablations.py {action}")
    again = tables.pop("cifar10_again")
    for action, variants in tables.items():
        title = f"{action}, {PLAN[action].seeds} seeds"
        if action == "cifar10":  # one table of both; a pair is of one machine
            title += ", twice"
            variants = {name: variants[name] + again[name] for name in variants}
        figures.print_accuracies(title, variants, "the default")
        if action == "tiny_imagenet":
            head = "predicts T's class, %"
            figures.print_accuracies(title, variants, "the default", "as_teacher", head)
        if action in CONVERGENCE:
            figures.print_convergence(variants, "the default")


def main():
    parser = figures.parser_of("ablations.py", __doc__)
    parser.add_argument("action", choices=[*PLAN, "draw", "report"])
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="(default: all)")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, a core each")
    parser.add_argument("--data-root", type=Path, default=Path("data/cifar10_jpeg"))
    parser.add_argument("--clip", type=Path, help="file of CLIP's embeddings; else it is left out")
    args = parser.parse_args()
    args.data_root = args.data_root.resolve()
    args.clip = args.clip and args.clip.resolve()
    os.chdir(ROOT)
    if args.action in PLAN:
        unknown = set(args.only or []) - set(PLAN[args.action].variants)
        if unknown:
            parser.error(f"{args.action} has no variant {sorted(unknown)}")
        run_all(args.action, args)
    else:
        dict(draw=draw, report=report)[args.action]()


if __name__ == "__main__":
    nayer.run_script(main)
