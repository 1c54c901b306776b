"""What each part of NAYER is worth: python results/ablations.py ACTION [--only VARIANT ...]

digits   every variant below on digits, 20 seeds, with a cut budget (results/ablations_20_seeds.csv)
cifar10  what Z reads, on JPEG CIFAR-10, five seeds (results/ablations_cifar10.csv)
mixing   --mix on JPEG CIFAR-10, ten seeds (results/ablations_mixing.csv)
scores   which number that needs no data ranks the students of the first two as their accuracy does:
         adds the candidates to both files, draws results/scores.png and results/convergence.png
report   the tables in Markdown: differences to the default, paired by seed

Each run is nayer.py's own `main`, in runs/ablations/<action>/<variant>/<seed>/. Two run at a time,
a core each. A run that is there already is not repeated, one that was cut short goes on.
"""

import argparse
import contextlib
import csv
import functools
import math
import multiprocessing
import os
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
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

CUT = "--warmup-epochs 1 --epochs 3 --generator-steps 20 --student-steps 24 --student-batch 128 "
CUT += "--reuse 1 --no-nesterov --weight-decay 1e-4"
DIGITS = {  # what follows a "+" is a patch, below
    "default": "",
    "label-input onehot": "--label-input onehot",
    "label-input noise": "--label-input noise",
    "LTE, rows shuffled": "+shuffled",
    "LTE, random of the same covariance": "+random",
    "no-lte-norm": "--no-lte-norm",
    "LTE centred, not scaled": "+centred",
    "LTE scaled, not centred": "+scaled",
    "noisy-layer fixed": "--noisy-layer fixed",
    "noisy-layer off": "--noisy-layer off",
    "images-per-matrix 1": "--images-per-matrix 1",
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
SMALL = "--dataset folder --teacher teachers/cifar10_wrn40_2.safetensors --student wrn16_1 "
SMALL += "--warmup-epochs 2 --warmup-batches 4 --epochs 6 --batches 1 --synthesis-batch 200 "
SMALL += "--generator-steps 10 --generator-life 100 --student-steps 160 --student-batch 64 "
SMALL += "--reuse 4 --lr 0.2 --nesterov --weight-decay 5e-4 --no-eval"
CIFAR10 = {
    "default": "",
    "LTE of CLIP": "+clip",
    "label-input onehot": "--label-input onehot",
    "label-input noise": "--label-input noise",
    "LTE, rows shuffled": "+shuffled",
    "LTE, random of the same covariance": "+random",
}
MIXING = {"default": "", "mix 0.5": "--mix 0.5"}
PLAN = dict(digits=(DIGITS, CUT, 20), cifar10=(CIFAR10, SMALL, 5), mixing=(MIXING, SMALL, 10))
STEPS = (5, 10, 20)  # of a batch, whose L_CE is a column, if a batch has so many
FILES = {
    "digits": "ablations_20_seeds.csv",
    "cifar10": "ablations_cifar10.csv",
    "mixing": "ablations_mixing.csv",
}
SCORED = ("digits", "cifar10")


# ---- Patches: variants that no flag of nayer.py makes --------------------------------------------
def embeddings(change, seed):
    """label_text_embeddings with its rows changed; the change is drawn from the seed."""
    original = nayer.label_text_embeddings

    def changed(*what):
        return change(original(*what), torch.Generator().manual_seed(seed))

    return patch.object(nayer, "label_text_embeddings", changed)


def shuffled(rows, generator):
    """The same vectors, each the name of another class: the geometry without the meaning."""
    while True:
        order = torch.randperm(len(rows), generator=generator)
        if (order != torch.arange(len(rows))).all():
            return rows[order]


def random(rows, generator):
    """Gaussian vectors with the mean and the covariance of the rows: not even their geometry."""
    mix = torch.randn(len(rows), len(rows), generator=generator) / (len(rows) - 1) ** 0.5
    return rows.mean(0) + mix @ (rows - rows.mean(0))


class Half(nn.Module):
    """Half of the BatchNorm on the LTE, with its weight and bias: centres only, or scales only."""

    def __init__(self, size, centre):
        super().__init__()
        self.centre = centre
        self.weight, self.bias = nn.Parameter(torch.ones(size)), nn.Parameter(torch.zeros(size))

    def forward(self, x):
        var, mean = torch.var_mean(x, 0, correction=0)
        x = x - mean if self.centre else x / (var + 1e-5).sqrt()
        return x * self.weight + self.bias


def normed(centre):
    class Layer(nayer.NoisyLayer):
        def __init__(self, embedding_size, *how):
            super().__init__(embedding_size, *how)
            self.norm = Half(embedding_size, centre)

    return patch.object(nayer, "NoisyLayer", Layer)


def instead(make):
    """A synthesize that makes images by make(generator, noisy_layer, inputs), without a loss."""

    @torch.no_grad()
    def synthesize(generator, noisy_layer, inputs, *rest, steps, **how):
        images = make(generator, noisy_layer, inputs)
        return (images * 255).round().byte(), torch.zeros(steps, 4)

    return patch.object(nayer, "synthesize", synthesize)


def gaussian(generator, noisy_layer, inputs):
    """Pixels with the mean and the deviation of the training digits, cut to [0, 1]."""
    (size, channels, mean, std), count = nayer.IMAGES["digits"], len(inputs)
    pixels = torch.randn(count, channels, size, size) * std[0] + mean[0]
    return pixels.clamp(0, 1)


def real(seed):
    """The training digits, none of them twice."""
    images = torch.stack([image for image, _ in train.training_images(train.parse_args([]))[0]])
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    batches = iter((images[order].float() / 255).split(100))
    return lambda generator, noisy_layer, inputs: next(batches)


def patched(name, seed, clip):
    """The context in which a variant runs."""
    if name == "clip":
        rows = nayer.read_safetensors(clip)[0]
        rows = rows[next(iter(rows))].float()
        return patch.object(nayer, "label_text_embeddings", lambda *what: rows)
    return dict(
        shuffled=lambda: embeddings(shuffled, seed),
        random=lambda: embeddings(random, seed),
        centred=lambda: normed(True),
        scaled=lambda: normed(False),
        gaussian=lambda: instead(gaussian),
        untrained=lambda: instead(lambda G, Z, inputs: G(Z(inputs))),
        real=lambda: instead(real(seed)),
    ).get(name, contextlib.nullcontext)()


def without_epoch_minus_1():
    """Run.resume that begins with epoch 0: the images for `agree` would take as long as the run."""
    resume = nayer.Run.resume

    def begin(self):
        channels, size = self.shape
        self.held = torch.zeros(2, channels, size, size, dtype=torch.uint8)
        return max(0, resume(self))

    return patch.object(nayer.Run, "resume", begin)


# ---- What is measured of a run -------------------------------------------------------------------
@torch.no_grad()
def diversity(action, run):
    """How much images of one class in a batch differ: the mean Euclidean distance between two of
    them, taken between the inputs of the teacher's last linear layer, mean over all batches."""
    (teacher, augment), seen, found = bring(action), [], []
    batch = int(figures.settings(run)["synthesis_batch"])
    linear = [layer for layer in teacher.modules() if isinstance(layer, nn.Linear)][-1]
    linear.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(1)))
    for epoch in figures.epochs(run):
        images, labels = (part.split(batch) for part in figures.made(run, epoch))
        for x, y in zip(images, labels):
            teacher(augment.normalize(x / 255))
            pairs = (y[:, None] == y).triu(1)
            if pairs.any():
                found.append(torch.cdist(seen[-1], seen[-1])[pairs].mean().item())
    return statistics.fmean(found) if found else float("nan")


def curve(run):
    """L_CE by step: the mean over all batches but the run's first one."""
    steps = {}
    for row in figures.learnt(run / "generator.csv"):
        if (row["epoch"], row["batch"]) != ("0", "0"):
            steps.setdefault(int(row["step"]), []).append(float(row["loss_ce"]))
    return [statistics.fmean(steps[step]) for step in sorted(steps)]


@functools.cache
def test_images(data):
    """All of CIFAR-10's, decoded once for all runs, which have none themselves."""
    (teacher, augment), place = bring("cifar10"), ("folder", data)
    names, cpu = teacher.info["class_names"], torch.device("cpu")
    return nayer.test_batches(*place, names, 3, 32, cpu), augment


def measure(action, run, data):
    """A row of the table."""
    last, losses = figures.read(run / "log.csv")[-1], curve(run)
    if not last["accuracy"]:
        student = nayer.load_model(run / "student.safetensors")
        last["accuracy"] = nayer.accuracy(student, *test_images(data))
    row = dict(accuracy=100 * float(last["accuracy"]))
    row |= {f"ce_{step}": losses[step - 1] for step in STEPS if step <= len(losses)}
    return row | dict(diversity=diversity(action, run), seconds=float(last["seconds"]))


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
        command = f"{budget} {flags} --seed {seed} --resume".split()
        command += ["--data-root", str(data), "--out", str(out)]
        with open(out / "console.txt", "a") as console, contextlib.redirect_stdout(console):
            with patched(change, seed, clip), without_epoch_minus_1():
                nayer.main(command)
    return measure(action, out, data)


def run(action, args):
    variants, _, seeds = PLAN[action]
    names = args.only or [name for name in variants if args.clip or variants[name] != "+clip"]
    jobs = [(variant, seed) for seed in range(seeds) for variant in names]  # all of a seed first
    context, found = multiprocessing.get_context("spawn"), read(FILES[action])
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        started = {}
        for variant, seed in jobs:
            if (variant, str(seed)) not in found:
                job = pool.submit(work, action, variant, seed, args.data_root, args.clip)
                started[job] = variant, seed
        for job in as_completed(started):
            found[tuple(map(str, started[job]))] = job.result()
            write(FILES[action], found)
            print(*started[job], job.result(), flush=True)


def read(name):
    """{(variant, seed): values} of a file in results/."""
    path = ROOT / "results" / name
    rows = figures.read(path) if path.exists() else []
    return {(row.pop("variant"), row.pop("seed")): row for row in rows}


def write(name, found):
    columns = ["variant", "seed", *dict.fromkeys(key for row in found.values() for key in row)]

    def save(path):
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            for (variant, seed), row in sorted(found.items(), key=lambda one: one[0]):
                row = {key: f"{float(value):.5g}" for key, value in row.items() if value != ""}
                writer.writerow(dict(variant=variant, seed=seed) | row)

    nayer.write_atomically(ROOT / "results" / name, save)


def complete(action):
    """{variant: its rows, seed after seed} of the variants whose seeds are all measured."""
    found, (variants, _, seeds) = read(FILES[action]), PLAN[action]
    rows = {name: [found.get((name, str(seed))) for seed in range(seeds)] for name in variants}
    return {name: values for name, values in rows.items() if all(values)}


# ---- Scores without data -------------------------------------------------------------------------
def bring(action):
    """(teacher, augment) of the runs of an action."""
    teacher = nayer.load_teacher(nayer.parse_args(PLAN[action][1].split())).eval()
    return teacher, nayer.Augment(teacher.info["mean"], teacher.info["std"], 0, False)


def fresh_images(action):
    """What a run with the default settings makes for its column `agree`: images of a generator that
    no student here has met."""
    path = ROOT / "runs/ablations" / f"{action}_fresh"
    if not (path / "summary.json").exists():
        command = f"{PLAN[action][1]} --seed 1000 --warmup-epochs 0 --epochs 1 --batches 1"
        command += f" --student-steps 1 --no-eval --resume --out {path}"
        nayer.main(command.split())
    images = figures.made(path, -1)[0]
    return images[len(images) // 2 :]


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


def scores(args):
    for action in SCORED:
        found, (teacher, augment) = read(FILES[action]), bring(action)
        about = nayer.parse_args(PLAN[action][1].split())
        last = about.warmup_epochs + about.epochs - 1
        fresh = ask(teacher, augment, fresh_images(action))
        for (variant, seed), row in found.items():
            # Images of the same variant's next seed: made as the run's own, and none that its
            # student has learnt from.
            other = place(action, variant, (int(seed) + 1) % PLAN[action][2])
            kept = figures.made(other, about.warmup_epochs - 1)[0][-about.synthesis_batch :]
            sets = dict(new=figures.made(other, last)[0], kept=kept)
            sets = {key: ask(teacher, augment, images) for key, images in sets.items()}
            student = nayer.load_model(place(action, variant, seed) / "student.safetensors")
            for key, asked in (sets | dict(fresh=fresh)).items():
                row[f"agree_{key}"], row[f"kd_{key}"] = judge(student, *asked)
        write(FILES[action], found)
    draw_scores()
    draw_convergence()


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
    sign = -1 if key.startswith("kd") else 1
    values = [(sign * float(row[key]), float(row["accuracy"])) for row in rows]
    if len({accuracy for _, accuracy in values}) == 1:
        return float("nan")  # no ranks to compare
    return stats.spearmanr(*zip(*values)).statistic


def draw_scores():
    figure = Figure(figsize=(12, 8), layout="constrained")
    for line, action in zip(figure.subplots(2, 3), SCORED):
        found = read(FILES[action])
        for axes, key in zip(line, SCORES):
            for number, (variant, rows) in enumerate(complete(action).items()):
                points = [(float(row[key]), float(row["accuracy"])) for row in rows]
                axes.plot(*zip(*points), ".x"[number // 10], label=variant)
            rho = ranks(found.values(), key)
            axes.set_title(f"{action}: Spearman {rho:.2f}")
            axes.set_xlabel(SCORES[key].replace(" on ", ", %, on\n").replace(" (column agree)", ""))
            axes.grid(alpha=0.3)
        line[0].set_ylabel("true accuracy, %")
        line[2].legend(fontsize=6)
    figure.savefig(ROOT / "results/scores.png", dpi=80)


def draw_convergence():
    """The paper's measure: L_CE against the step of a batch, mean over seeds."""
    inputs = ["default", "LTE of CLIP", "label-input onehot", "label-input noise"]
    inputs += ["LTE, rows shuffled", "LTE, random of the same covariance"]
    figure = Figure(figsize=(11, 4), layout="constrained")
    for axes, action in zip(figure.subplots(1, 2), SCORED):
        there = complete(action)
        for variant in filter(there.__contains__, inputs):
            curves = [curve(place(action, variant, seed)) for seed in range(len(there[variant]))]
            mean = [statistics.fmean(values) for values in zip(*curves)]
            axes.plot(range(1, len(mean) + 1), mean, ".-", label=variant)
        axes.set(xlabel="generator step within a batch", ylabel="L_CE", yscale="log", title=action)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.savefig(ROOT / "results/convergence.png", dpi=90)


# ---- Tables --------------------------------------------------------------------------------------
def interval(values):
    """(mean, half of the 95 % confidence interval of the mean) by Student's t."""
    n = len(values)
    return statistics.fmean(values), stats.t.ppf(0.975, n - 1) * statistics.stdev(values) / n**0.5


def report(args):
    for action, name in FILES.items():
        found, variants, (chosen, _, seeds) = read(name), complete(action), PLAN[action]
        nayer.check("default" in variants, f"first run: python results/ablations.py {action}")
        steps = [f"ce_{step}" for step in STEPS if found["default", "0"].get(f"ce_{step}")]
        column = {
            (variant, key): [float(row[key] or "nan") for row in rows]
            for variant, rows in variants.items()
            for key in ("accuracy", "diversity", *steps)
        }
        print(f"\n| {action}, {seeds} seeds | accuracy, % | difference to the default | verdict |")
        print("|---|---|---|---|")
        for variant in variants:
            values = column[variant, "accuracy"]
            cells = [f"{statistics.fmean(values):.1f} ± {statistics.stdev(values):.1f}"]
            same = variant == "default"
            cells += ["", ""] if same else difference(values, column["default", "accuracy"])
            print(f"| {variant} | {' | '.join(cells)} |")
        head = " | ".join(f"L_CE at step {step.removeprefix('ce_')}" for step in steps)
        print(f"\n| variant | diversity | {head} | at 10, less the default's |")
        print("|---" * (len(steps) + 3) + "|")
        for variant in variants:
            keys = [key for key in ("diversity", *steps) if not math.isnan(column[variant, key][0])]
            cells = ["{:.3g} ± {:.2g}".format(*interval(column[variant, key])) for key in keys]
            if variant != "default" and len(keys) > 1:
                values = (column[name, "ce_10"] for name in (variant, "default"))
                cells += difference(*values, "+.2f")[:1]
            cells += [""] * (len(steps) + 2 - len(cells))
            print(f"| {variant} | {' | '.join(cells)} |")
        if "agree_fresh" not in found["default", "0"]:
            continue
        usual = [row for (variant, _), row in found.items() if "steps 1 +" not in chosen[variant]]
        head = "score without data", "all runs", "without floor and ceiling", "within a variant"
        print(f"\n| {' | '.join(head)} | off by, points |\n|---|---|---|---|---|")
        for key, words in SCORES.items():
            inside = torch.tensor([ranks(rows, key) for rows in variants.values()])
            inside = inside.nanmean()  # nan: all seeds of a variant are equally accurate
            found_in = (ranks(found.values(), key), ranks(usual, key), inside)
            cells = [f"{cell:.2f}" for cell in found_in]
            off = statistics.fmean(abs(float(row[key]) - float(row["accuracy"])) for row in usual)
            print(f"| {words} | {' | '.join(cells)} | {f'{off:.1f}' * key.startswith('agree')} |")


def difference(values, default, form="+.1f"):
    """[mean and interval of the paired differences, what may be said of it]"""
    mean, half = interval([a - b for a, b in zip(values, default)])
    low, high = mean - half, mean + half
    verdict = "worse" if high < 0 else "better" if low > 0 else None
    verdict = verdict or f"no difference seen, smaller than {max(-low, high):.1f}"
    return [f"{mean:{form}} [{low:{form}}, {high:{form}}]", verdict]


def main():
    actions = [*PLAN, "scores", "report"]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("action", choices=actions)
    parser.add_argument("--only", nargs="+", help="variants (default: all)")
    parser.add_argument("--data-root", type=Path, default=Path("data/cifar10_jpeg"))
    parser.add_argument("--clip", type=Path, help="file of CLIP's embeddings; else it is left out")
    args = parser.parse_args()
    args.data_root, args.clip = args.data_root.resolve(), args.clip and args.clip.resolve()
    os.chdir(ROOT)
    steps = {action: functools.partial(run, action) for action in PLAN}
    (steps | dict(scores=scores, report=report))[args.action](args)


if __name__ == "__main__":
    nayer.run_script(main)
