"""What each part of NAYER is worth: python results/ablations.py ACTION [--only VARIANT ...]

digits   every variant below on digits, 20 seeds, with a cut budget (results/ablations_20_seeds.csv)
cifar10  what Z reads, on JPEG CIFAR-10, five seeds (results/ablations_cifar10.csv)
mixing   --mix on JPEG CIFAR-10, ten seeds (results/ablations_mixing.csv)
scores   which number that needs no data ranks the students of the first two as their accuracy does:
         adds the candidates to the files of those whose runs are there, draws their convergence
         (results/convergence_ACTION.png) and results/scores.png
report   the tables in Markdown: differences to the default, paired by seed

Each run is nayer.py's own `main`, in runs/ablations/<action>/<variant>/<seed>/, without images for
`agree`, which would take as long as the run. Two run at a time, a core each. A run that is there
already is not repeated, one that was cut short goes on.
"""

import argparse
import contextlib
import csv
import functools
import multiprocessing
import os
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from math import isnan, nan
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import figures
import torch
import torch.nn as nn
from matplotlib.figure import Figure
from scipy import stats

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "teachers")]
import train  # noqa: E402

import nayer  # noqa: E402

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


class Action(NamedTuple):
    variants: dict  # name: flags
    budget: str  # flags of all variants
    seeds: int


PLAN = dict(
    digits=Action(DIGITS, CUT, seeds=20),
    cifar10=Action(CIFAR10, SMALL, seeds=5),
    mixing=Action(MIXING, SMALL, seeds=10),
)
FILES = dict(
    digits="ablations_20_seeds.csv",
    cifar10="ablations_cifar10.csv",
    mixing="ablations_mixing.csv",
)
SCORED = ("digits", "cifar10")
MEASURED = ("accuracy", "ce_5", "ce_10", "ce_20", "diversity", "seconds")  # figures.NUMBERS


# ---- Patches: variants that no flag of nayer.py makes --------------------------------------------
def changed_embeddings(change, seed):
    """label_text_embeddings with its rows changed; the change is drawn from the seed."""
    original = nayer.label_text_embeddings

    def changed(class_names, encoder, prompt):
        rows = original(class_names, encoder, prompt)
        return change(rows, torch.Generator().manual_seed(seed))

    return patch.object(nayer, "label_text_embeddings", changed)


def shuffled(rows, generator):
    """The same vectors, each the name of another class: the geometry without the meaning."""
    in_order = torch.arange(len(rows))
    while True:
        order = torch.randperm(len(rows), generator=generator)
        if (order != in_order).all():
            return rows[order]


def random(rows, generator):
    """Gaussian vectors with the mean and the covariance of the rows: not even their geometry."""
    mix = torch.randn(len(rows), len(rows), generator=generator) / (len(rows) - 1) ** 0.5
    return rows.mean(0) + mix @ (rows - rows.mean(0))


def clip_embeddings(path):
    """label_text_embeddings that gives the rows in a file."""
    tensors, _ = nayer.read_safetensors(path)
    rows = next(iter(tensors.values())).float()

    def embeddings(class_names, encoder, prompt):
        return rows

    return patch.object(nayer, "label_text_embeddings", embeddings)


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


def with_norm(make):
    """A NoisyLayer whose norm is make(embedding_size)."""

    class Layer(nayer.NoisyLayer):
        def __init__(self, embedding_size, num_matrices, images_per_matrix, hidden_size=1000):
            super().__init__(embedding_size, num_matrices, images_per_matrix, hidden_size)
            self.norm = make(embedding_size)

    return patch.object(nayer, "NoisyLayer", Layer)


def one_image_per_matrix():
    """A NoisyLayer with a matrix for each image in the place of one for each set of classes."""

    class Layer(nayer.NoisyLayer):
        def __init__(self, embedding_size, num_matrices, images_per_matrix, hidden_size=1000):
            super().__init__(embedding_size, num_matrices * images_per_matrix, 1, hidden_size)

    return patch.object(nayer, "NoisyLayer", Layer)


def instead(make):
    """A synthesize that makes images by make(generator, noisy_layer, inputs), without a loss."""

    @torch.no_grad()
    def synthesize(generator, noisy_layer, inputs, *others, steps, **settings):
        images = make(generator, noisy_layer, inputs)
        return (images * 255).round().byte(), torch.zeros(steps, 4)

    return patch.object(nayer, "synthesize", synthesize)


def gaussian(generator, noisy_layer, inputs):
    """Pixels with the mean and the deviation of the training digits, cut to [0, 1]."""
    known = nayer.parse_args(nayer.IMAGES["digits"].split())
    size = known.image_size
    pixels = torch.randn(len(inputs), 1, size, size) * known.std[0] + known.mean[0]
    return pixels.clamp(0, 1)


def untrained(generator, noisy_layer, inputs):
    return generator(noisy_layer(inputs))


def real(seed):
    """The training digits, none of them twice."""
    pairs, _ = train.training_images(train.parse_args([]))
    images, _ = train.stack(pairs)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    batches = iter((images[order].float() / 255).split(100))

    def make(generator, noisy_layer, inputs):
        return next(batches)

    return make


def patched(name, seed, clip):
    """The context in which a variant runs."""
    if name == "clip":
        return clip_embeddings(clip)
    if name == "shuffled":
        return changed_embeddings(shuffled, seed)
    if name == "random":
        return changed_embeddings(random, seed)
    if name == "no_norm":
        return with_norm(nn.Identity)
    if name == "centred":
        return with_norm(functools.partial(Half, centre=True))
    if name == "scaled":
        return with_norm(functools.partial(Half, centre=False))
    if name == "one_image_per_matrix":
        return one_image_per_matrix()
    if name == "gaussian":
        return instead(gaussian)
    if name == "untrained":
        return instead(untrained)
    if name == "real":
        return instead(real(seed))
    nayer.check(name == "", f"there is no patch {name}")
    return contextlib.nullcontext()


# ---- What is measured of a run -------------------------------------------------------------------
@functools.cache
def test_images(data):
    """All of CIFAR-10's, decoded once for all runs, which have none themselves."""
    teacher, augment = bring("cifar10")
    names = teacher.info["class_names"]
    return nayer.test_batches("folder", data, names, 3, 32, torch.device("cpu")), augment


def measure(run, data):
    """A row of the table. What was not measured is left out."""
    found = figures.measured(run)
    if isnan(found["accuracy"]):
        batches, augment = test_images(data)
        student = nayer.load_model(run / "student.safetensors")
        found["accuracy"] = 100 * nayer.accuracy(student, batches, augment)
    return {key: found[key] for key in MEASURED if not isnan(found[key])}


# ---- The runs ------------------------------------------------------------------------------------
def place(action, variant, seed):
    return ROOT / "runs/ablations" / action / variant / str(seed)


def work(action, variant, seed, data, clip):
    """One run, unless it is there, and what is measured of it."""
    torch.set_num_threads(1)
    variants, budget, _ = PLAN[action]
    flags, _, change = variants[variant].partition("+")
    out = place(action, variant, seed)
    if not (out / "summary.json").exists():
        out.mkdir(parents=True, exist_ok=True)
        command = f"{budget} {flags} --seed {seed} --agree-batches 0 --resume".split()
        command += ["--data-root", str(data), "--out", str(out)]
        with open(out / "console.txt", "a") as console, contextlib.redirect_stdout(console):
            with patched(change, seed, clip):
                nayer.main(command)
    return measure(out, data)


def run_all(action, args):
    """All runs of an action that are not in its file yet. Each writes its row as it ends."""
    variants, _, seeds = PLAN[action]
    names = args.only
    if names is None:
        names = [name for name in variants if args.clip or variants[name] != "+clip"]
    found = read(FILES[action])
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        started = {}
        for seed in range(seeds):  # all variants of a seed first
            for variant in names:
                if (variant, str(seed)) not in found:
                    job = pool.submit(work, action, variant, seed, args.data_root, args.clip)
                    started[job] = (variant, str(seed))
        for job in as_completed(started):
            variant, seed = started[job]
            found[variant, seed] = job.result()
            write(FILES[action], found)
            print(variant, seed, job.result(), flush=True)


def read(name):
    """{(variant, seed): values} of a file in results/."""
    path = ROOT / "results" / name
    if not path.exists():
        return {}
    found = {}
    for row in figures.read(path):
        variant = row.pop("variant")
        seed = row.pop("seed")
        found[variant, seed] = row
    return found


def write(name, found):
    columns = ["variant", "seed"]
    for row in found.values():
        columns += [key for key in row if key not in columns]
    path = ROOT / "results" / name
    with nayer.replaced(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for variant, seed in sorted(found):
            cells = dict(variant=variant, seed=seed)
            for key, value in found[variant, seed].items():
                if value != "":
                    cells[key] = f"{float(value):.5g}"
            writer.writerow(cells)


def complete(action):
    """{variant: its rows, seed after seed} of the variants whose seeds are all measured."""
    found = read(FILES[action])
    variants, _, seeds = PLAN[action]
    there = {}
    for variant in variants:
        rows = [found.get((variant, str(seed))) for seed in range(seeds)]
        if all(rows):
            there[variant] = rows
    return there


# ---- Scores without data -------------------------------------------------------------------------
def bring(action):
    """(teacher, augment) of the runs of an action."""
    teacher = nayer.load_teacher(nayer.parse_args(PLAN[action].budget.split()))
    augment = nayer.Augment(teacher.info["mean"], teacher.info["std"], 0, False)
    return teacher, augment


def fresh_images(action):
    """What a run with the default settings makes for its column `agree`: images of a generator that
    no student here has met."""
    path = ROOT / "runs/ablations" / f"{action}_fresh"
    if not (path / "summary.json").exists():
        command = f"{PLAN[action].budget} --seed 1000 --warmup-epochs 0 --epochs 1 --batches 1"
        command += f" --student-steps 1 --no-eval --resume --out {path}"
        nayer.main(command.split())
    images, _ = nayer.load_tensors(path / "agree.pt", "cpu")[0]
    return images


@torch.no_grad()
def ask(teacher, augment, images):
    """(what the networks see of the images, the teacher's logits)"""
    views = augment.normalize(images.float() / 255)
    return views, teacher(views)


@torch.no_grad()
def judge(student, views, answers):
    """(how often the student names the class that the teacher names, in %; L_KD)"""
    logits = student(views)
    same = (logits.argmax(1) == answers.argmax(1)).float().mean().item()
    return 100 * same, nayer.distillation_loss(logits, answers, 20.0).item()


def score(action):
    """Add the candidates to the file of an action."""
    _, budget, seeds = PLAN[action]
    about = nayer.parse_args(budget.split())
    last_warmup = about.warmup_epochs - 1
    last = about.warmup_epochs + about.epochs - 1
    teacher, augment = bring(action)
    fresh = ask(teacher, augment, fresh_images(action))
    found = read(FILES[action])
    for (variant, seed), row in found.items():
        # Images of the same variant's next seed: made as the run's own, and none that its student
        # has learnt from.
        other = place(action, variant, (int(seed) + 1) % seeds)
        kept, _ = figures.made(other, last_warmup)
        kept = kept[-about.synthesis_batch :]
        new, _ = figures.made(other, last)
        asked = dict(
            new=ask(teacher, augment, new),
            kept=ask(teacher, augment, kept),
            fresh=fresh,
        )
        student = nayer.load_model(place(action, variant, seed) / "student.safetensors")
        for key, (views, answers) in asked.items():
            agree, loss_kd = judge(student, views, answers)
            row[f"agree_{key}"] = agree
            row[f"kd_{key}"] = loss_kd
    write(FILES[action], found)


SCORES = {
    "agree_kept": "agreement on the warm-up's last batch, kept back",
    "agree_new": "agreement on new images of the last epoch, made with L_adv",
    "agree_fresh": "agreement on images by the default settings, without L_adv (column agree)",
    "kd_kept": "L_KD on the warm-up's last batch, kept back",
    "kd_new": "L_KD on new images of the last epoch",
    "kd_fresh": "L_KD on images by the default settings, without L_adv",
}


def ranks(rows, key):
    """Spearman's rank correlation of a score with the accuracy; L_KD counts backwards."""
    accuracies = figures.column(rows, "accuracy")
    if len(set(accuracies)) == 1:
        return nan  # no ranks to compare
    correlation = stats.spearmanr(figures.column(rows, key), accuracies).statistic
    if key.startswith("kd"):
        return -correlation
    return correlation


def draw_scores():
    figure = Figure(figsize=(12, 8), layout="constrained")
    for line, action in zip(figure.subplots(2, 3), SCORED):
        found = read(FILES[action])
        for axes, key in zip(line, SCORES):  # the first three
            for number, (variant, rows) in enumerate(complete(action).items()):
                marker = "." if number < 10 else "x"
                accuracies = figures.column(rows, "accuracy")
                axes.plot(figures.column(rows, key), accuracies, marker, label=variant)
            rho = ranks(found.values(), key)
            axes.set_title(f"{action}: Spearman {rho:.2f}")
            axes.set_xlabel(SCORES[key].replace(" on ", ", %, on\n").replace(" (column agree)", ""))
            axes.grid(alpha=0.3)
        line[0].set_ylabel("true accuracy, %")
        line[2].legend(fontsize=6)
    figure.savefig(ROOT / "results/scores.png", dpi=80)


def draw_convergence(action):
    """The paper's measure: L_CE against the step of a batch, mean over seeds."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    there = complete(action)
    for variant in CIFAR10:  # what Z reads
        if variant not in there:
            continue
        runs = [place(action, variant, seed) for seed in range(len(there[variant]))]
        curves = [figures.curve(figures.generator_rows(run)) for run in runs]
        mean = [statistics.fmean(values) for values in zip(*curves)]
        axes.plot(range(1, len(mean) + 1), mean, ".-", label=variant)
    axes.set(xlabel="generator step within a batch", ylabel="L_CE", yscale="log", title=action)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.savefig(ROOT / f"results/convergence_{action}.png", dpi=90)


def scores(args):
    for action in SCORED:
        if (ROOT / "runs/ablations" / action).exists():
            score(action)
            draw_convergence(action)
    draw_scores()


# ---- Tables --------------------------------------------------------------------------------------
def report_scores(action, variants):
    found = read(FILES[action])
    students = list(found.values())
    usual = [row for (variant, _), row in found.items() if variant not in FLOOR_AND_CEILING]
    heads = ("all runs", "without floor and ceiling", "within a variant", "off by, points")
    print()
    figures.print_row("score without data", *heads)
    print("|---" * 5 + "|")
    for key, words in SCORES.items():
        inside = torch.tensor([ranks(rows, key) for rows in variants.values()])
        inside = inside.nanmean()  # nan: all seeds of a variant are equally accurate
        off = ""
        if key.startswith("agree"):
            pairs = zip(figures.column(usual, key), figures.column(usual, "accuracy"))
            off = f"{statistics.fmean(abs(agree - accuracy) for agree, accuracy in pairs):.1f}"
        correlations = (ranks(students, key), ranks(usual, key), inside)
        figures.print_row(words, *(f"{value:.2f}" for value in correlations), off)


def report(args):
    for action in PLAN:
        variants = complete(action)
        nayer.check("default" in variants, f"first run: python results/ablations.py {action}")
        title = f"{action}, {PLAN[action].seeds} seeds"
        figures.print_accuracies(title, variants, "the default")
        if action in SCORED:  # mixing leaves the generator as it is
            figures.print_convergence(variants, "the default")
            if "agree_fresh" in variants["default"][0]:
                report_scores(action, variants)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("action", choices=[*PLAN, "scores", "report"])
    parser.add_argument("--only", nargs="+", help="variants (default: all)")
    parser.add_argument("--data-root", type=Path, default=Path("data/cifar10_jpeg"))
    parser.add_argument("--clip", type=Path, help="file of CLIP's embeddings; else it is left out")
    args = parser.parse_args()
    args.data_root = args.data_root.resolve()
    if args.clip:
        args.clip = args.clip.resolve()
    os.chdir(ROOT)
    if args.action == "scores":
        scores(args)
    elif args.action == "report":
        report(args)
    else:
        run_all(args.action, args)


if __name__ == "__main__":
    nayer.run_script(main)
