"""What run folders tell: python results/figures.py ACTION ...

    plot RUN               RUN/curve.png: accuracy, agree and the losses against seconds
    parts OUT RUN ...      OUT: images of one class in the last epoch, a row per run
    samples RUN OUT        OUT: images of the last batch, a column for each class, with its name
    diagram RUN OUT        OUT: the method on one picture, with the images of RUN's last batches
    minutes OUT W=RUN ...  OUT: accuracy against minutes of several runs, each with a word W
    numbers RUN ...        a table: what the exercises speak of, and what is meant by it
    compare W=RUNS ...     tables of groups of runs, each with a word W: mean and deviation over the
                           seeds, and the difference to the first group, paired by seed. RUNS is a
                           pattern, such as "runs/lte-*", which the program expands
    counts                 a table: what each preset needs, counted

A run that was stopped, or is not at its end yet, will do.
"""

import argparse
import csv
import glob
import json
import statistics
import sys
from math import isnan, nan
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from scipy import stats
from torchvision.utils import make_grid

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "teachers")]
import train  # noqa: E402

import nayer  # noqa: E402


# ---- What lies in a run folder -------------------------------------------------------------------
# The older runs in results/ have a summary.json with the settings, a generator.csv with the losses,
# and in their log.csv an epoch -1, which stands for images that S never learns from.
def read(path):
    """The rows of a csv file, dicts of texts."""
    nayer.check(path.exists(), f"there is no {path}")
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def write(path, rows):
    """rows: dicts, whose keys are the columns. Numbers get five digits."""
    columns = dict.fromkeys(key for row in rows for key in row)
    with nayer.atomic_write(path) as temporary, open(temporary, "w", newline="") as file:
        table = csv.DictWriter(file, columns, lineterminator="\n")
        table.writeheader()
        for row in rows:
            cells = {k: f"{x:.5g}" if isinstance(x, float) else x for k, x in row.items()}
            table.writerow(cells)


def log_of(run):
    """The rows of log.csv, dicts of texts; "" for what was not measured."""
    return [row for row in read(run / "log.csv") if int(row["epoch"]) >= 0]


def info_of(run):
    """What the student's file says of itself."""
    _, metadata = nayer.read_safetensors(run / "student.safetensors")
    return {key: json.loads(text) for key, text in metadata.items()}


def settings_of(run):
    summary = run / "summary.json"
    if summary.exists():
        return json.loads(summary.read_text())["settings"]
    return info_of(run)["settings"]


def made(run, epoch):
    """What the run has made in an epoch: images, labels and losses, a dict of tensors."""
    return nayer.load_tensors(run / f"memory/epoch_{int(epoch):03d}.pt", "cpu")


def losses_of(run):
    """L_CE and the total loss of every batch in order: dicts of lists, a number for each step."""
    batches = []
    if (run / "generator.csv").exists():
        for row in read(run / "generator.csv"):
            if row["epoch"] == "-1":
                continue
            if row["step"] == "0":
                batches.append(dict(loss_ce=[], loss=[]))
            for name, values in batches[-1].items():
                values.append(float(row[name]))
        return batches
    settings = settings_of(run)
    for row in log_of(run):
        epoch = made(run, row["epoch"])
        total = 0.0
        for name in [name for name in epoch if name.startswith("loss_")]:
            total += settings[name.replace("loss_", "alpha_")] * epoch[name]  # (batches, steps)
        for loss_ce, loss in zip(epoch["loss_ce"].tolist(), total.tolist()):
            batches.append(dict(loss_ce=loss_ce, loss=loss))
    return batches


# ---- Images --------------------------------------------------------------------------------------
def parts(out, *runs):
    """Eight images of the class that has most in the last epoch of the first run, a row per run."""
    runs = [Path(run) for run in runs]
    last = [made(run, log_of(run)[-1]["epoch"]) for run in runs]
    chosen = last[0]["labels"].mode().values
    cells = []
    for epoch in last:
        cells += list(epoch["images"][epoch["labels"] == chosen][:8])
    columns = min(8, len(cells) // len(runs))
    axes, side = draw_grid(cells, columns)
    names = [run.parent.name for run in runs]  # of the variants
    axes.set_yticks([side * (k + 0.5) for k in range(len(runs))], names)
    axes.set_xticks([])
    axes.figure.savefig(out, dpi=100, bbox_inches="tight")


def samples(run, out):
    """Eight images of each class, of the last batch, a column for each class."""
    run = Path(run)
    names = info_of(run)["class_names"]
    last = made(run, log_of(run)[-1]["epoch"])["images"][-settings_of(run)["synthesis_batch"] :]
    axes, side = draw_grid(list(last[: 8 * len(names)]), len(names))
    axes.set_xticks([side * (k + 0.5) for k in range(len(names))], names)
    axes.xaxis.tick_top()
    axes.set_yticks([])
    axes.figure.savefig(out, dpi=100, bbox_inches="tight")


def draw_grid(cells, columns):
    """(axes with the images of a list, row after row; pixels from one to the next)"""
    grid = make_grid(torch.stack(cells), columns, padding=1, pad_value=255)
    rows = len(cells) // columns
    axes = Figure(figsize=(0.7 * columns + 1.5, 0.7 * rows + 0.5)).subplots()
    axes.imshow(grid.permute(1, 2, 0).numpy(), interpolation="nearest")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return axes, cells[0].shape[-1] + 1  # with a line between two


# ---- The method on one picture -------------------------------------------------------------------
RED = "#c0392b"  # the way of the generator step
GREEN = "#2e7d32"  # of the student step
BOXES = [  # left, bottom, width, height; text; colour
    (20, 33, 11, 8, "text\nencoder", "#eeeeee"),
    (70, 38, 5, 8, "G", "#cfe3f5"),
    (70, 24, 5, 8, "G", "#cfe3f5"),
    (121, 37, 9, 6, "T, frozen", "#dddddd"),
    (121, 29, 9, 6, "S", "#d8efd3"),
    (134, 41, 15, 4, "$L_{CE}$: T predicts y", "white"),
    (134, 36, 15, 4, "$L_{BN}$: T's statistics", "white"),
    (134, 29, 15, 6, "$L_{adv}$: T's class, but\nother probabilities", "white"),
    (78, 8, 38, 8, "M: memory of all images\n(those of each batch's best step)", "#fff3d6"),
    (121, 13, 9, 6, "T, frozen", "#dddddd"),
    (121, 4, 9, 6, "S", "#d8efd3"),
    (134, 8, 15, 6, "$L_{KD}$: distance\nof S from T", "white"),
]
ARROWS = [  # from, to; colour
    *[((16, 37), (20, 37)), ((31, 37), (34, 37)), ((42, 37), (45, 37))],  # to the BatchNorm
    *[((53, 37), (58, 42)), ((66, 42), (70, 42)), ((75, 42), (78, 42))],  # first batch
    *[((53, 37), (58, 28)), ((66, 28), (70, 28)), ((75, 28), (78, 28))],  # second batch
    *[((116.5, 42), (121, 40)), ((116.5, 42), (121, 33))],  # images to T and S
    *[((116.5, 28), (121, 38)), ((116.5, 28), (121, 31))],
    *[((130, 41), (134, 43)), ((130, 40), (134, 38))],  # T and S to the losses
    *[((130, 38), (134, 33)), ((130, 32), (134, 32))],
    *[((97, 24), (97, 16)), ((116, 12), (121, 15)), ((116, 12), (121, 8))],  # over M to T and S
    *[((130, 16), (134, 12)), ((130, 7), (134, 10))],
]
LINES = [  # corners; the last part is an arrow
    (RED, (141, 45), (141, 53), (72, 53), (72, 46)),
    (RED, (72, 53), (62, 53), (62, 49)),
    (GREEN, (141, 8), (141, 1.2), (125.5, 1.2), (125.5, 4)),
]
NOTES = [  # left, middle; text; colour
    (31.5, 43, "$e_y$, {D} numbers", "black"),
    (45, 43, "BatchNorm", "black"),
    (58.5, 47.3, "Z, draw 1", "black"),
    (58.5, 33.3, "Z, draw 2", "black"),
    (82, 48.3, "images: two batches of the same labels y", "black"),
    (88, 54.5, "generator step: lowers the three losses over Z and G", RED),
    (96, 1.2, "student step: lowers it over S", GREEN),
    (2, 21, "For every batch:", "black"),
    (2, 18, "1. draw Z anew, N(0, 1), one matrix for each set of classes", "black"),
    (2, 15, "2. {generator_steps} generator steps on it, then its images go to M", "black"),
    (2, 12, "After the batches of an epoch:", "black"),
    (2, 9, "3. {student_steps} student steps on M", "black"),
]


def diagram(run, out):
    """What is drawn is real but for the two draws of Z: e_y and its BatchNorm as the run's own, and
    its last two batches, whose labels are the same and for which Z was drawn anew."""
    run = Path(run)
    settings, names = settings_of(run), info_of(run)["class_names"]
    e_y = nayer.embeddings_of(names, SimpleNamespace(**settings))  # (C, D)
    normalised = F.batch_norm(e_y, None, None, training=True)
    y = 3  # the class whose prompt is shown
    prompt = settings["prompt"].replace("{class}", names[y]).replace("of ", "of\n")

    axes = Figure(figsize=(15, 5.6)).add_axes((0, 0, 1, 1))  # ten units to the inch
    axes.set(xlim=(0, 150), ylim=(0, 56))
    axes.axis("off")

    def picture(x, y, side, values, **look):
        axes.imshow(values, extent=(x, x + side, y, y + side), aspect="auto", **look)

    for x, y_low, width, height, text, color in [*BOXES, (1, 33, 15, 8, f"“{prompt}”", "white")]:
        axes.add_patch(Rectangle((x, y_low), width, height, facecolor=color, edgecolor="black"))
        axes.text(x + width / 2, y_low + height / 2, text, ha="center", va="center")
    for start, end in ARROWS:
        axes.annotate("", end, start, arrowprops=dict(arrowstyle="->", linewidth=1.5))
    for color, *corners in LINES:
        axes.plot(*zip(*corners[:-1]), color=color, linewidth=1.5)
        look = dict(arrowstyle="->", color=color, linewidth=1.5)
        axes.annotate("", corners[-1], corners[-2], arrowprops=look)
    for x, y_middle, text, color in NOTES:
        axes.text(x, y_middle, text.format(D=e_y.shape[1], **settings), color=color, va="center")
    picture(34, 33, 8, e_y[y].view(16, -1), cmap="RdBu", vmin=-0.6, vmax=0.6)
    picture(45, 33, 8, normalised[y].view(16, -1), cmap="RdBu", vmin=-2, vmax=2)
    for low, row in ((38, log_of(run)[-2]), (24, log_of(run)[-1])):
        torch.manual_seed(low)
        picture(58, low, 8, torch.randn(20, 20), cmap="gray")
        images = made(run, row["epoch"])["images"][-len(names) :]  # the last set of classes
        for k, name in enumerate(names):
            picture(78 + 3.8 * k, low + 2.2, 3.6, images[k].permute(1, 2, 0), cmap="gray")
            axes.text(79.8 + 3.8 * k, low + 1, name, ha="center", va="center", fontsize=8)
    axes.figure.savefig(out, dpi=80)


# ---- Curves --------------------------------------------------------------------------------------
def minutes(out, *runs):
    axes = Figure(figsize=(8, 4), layout="constrained").subplots()
    for words_and_run in runs:
        words, run = words_and_run.rsplit("=", 1)
        log = [row for row in log_of(Path(run)) if row["accuracy"]]
        times = [float(row["seconds"]) / 60 for row in log]
        accuracies = [100 * float(row["accuracy"]) for row in log]
        axes.plot(times, accuracies, ".-", label=f"{words}: {accuracies[-1]:.2f} %")
    axes.set(xlabel="minutes", ylabel="accuracy on the test images, %", ylim=(40, None))
    axes.grid(alpha=0.3)
    axes.legend()
    axes.figure.savefig(out, dpi=100)


def plot(run):
    rows = log_of(Path(run))
    losses = [name for name in rows[0] if name.startswith("loss_")]
    figure = Figure(figsize=(12, 4), layout="constrained")
    panels = figure.subplots(1, 3)
    for axes, names in zip(panels, (["accuracy"], ["agree"], losses)):
        for name in names:
            known = [row for row in rows if row[name]]
            heights = [abs(float(row[name])) for row in known]
            label = "-loss_adv" if name == "loss_adv" else name
            axes.plot([float(row["seconds"]) for row in known], heights, ".-", label=label)
        axes.legend()
        axes.set_xlabel("seconds")
    panels[2].set_yscale("log", nonpositive="mask")  # L_adv is 0 in the warm-up
    figure.savefig(Path(run) / "curve.png", dpi=100)
    print(f"{run}/curve.png is written")


# ---- Numbers of one run --------------------------------------------------------------------------
STEPS = (5, 10, 20, 30)  # of a batch, counted from 1, whose L_CE is shown if a batch has so many
NUMBERS = dict(  # head of the column, format, meaning
    accuracy=("accuracy, %", ".2f", "of S on the real test images, after the last epoch"),
    agree=("agree, %", ".2f", "how often S predicts T's class on held-out synthetic images"),
    ce_5=("L_CE at step 5", ".3g", "of a batch; mean over the batches, without the first one"),
    ce_10=("at step 10", ".3g", "the same"),
    ce_20=("at step 20", ".3g", "the same"),
    ce_30=("at step 30", ".3g", "the same"),
    diversity=("diversity", ".3g", "distance of two images of a class, at T's last layer"),
    best_is_last=("best is last", ".0f", "number of batches whose last step has the lowest loss"),
    batches=("batches", ".0f", "number of all batches, without the held-out ones"),
    images=("images", ".0f", "in M at the end"),
    seconds=("seconds", ".1f", "of the run, without imports"),
)


def curve(batches):
    """L_CE by step: the mean over all batches but the run's first one, for which L_BN has no
    average yet. batches: as of `losses_of`."""
    steps = zip(*[batch["loss_ce"] for batch in batches[1:]])
    return [statistics.fmean(values) for values in steps]


def best_is_last(batches):
    """In how many batches the last step has the lowest loss. batches: as of `losses_of`."""
    return sum(batch["loss"][-1] == min(batch["loss"]) for batch in batches)


@torch.no_grad()
def diversity(run):
    """How much images of one class in a batch differ: the mean Euclidean distance of two of them,
    taken between the inputs of T's last linear layer, mean over all batches."""
    settings = settings_of(run)
    name = info_of(run)["trained_on"].removeprefix("images made from ")
    args = nayer.parse_args(["--dataset", settings["dataset"], "--teacher", name])
    teacher, info = nayer.load_teacher(args)
    augment = nayer.Augment(info["mean"], info["std"], padding=0, flip=False)
    features = []  # of T's last pass

    def read_features(layer, inputs):
        features[:] = [inputs[0].flatten(1)]

    linear = [layer for layer in teacher.modules() if isinstance(layer, nn.Linear)]
    if not linear:
        return nan
    linear[-1].register_forward_pre_hook(read_features)
    distances = []
    for row in log_of(run):
        epoch = made(run, row["epoch"])
        batches = [epoch[key].split(settings["synthesis_batch"]) for key in ("images", "labels")]
        for images, labels in zip(*batches):
            teacher(augment.normalize(images.float() / 255))
            pairs = (labels[:, None] == labels).triu(1)  # each pair of one class once
            if pairs.any():
                distances.append(torch.cdist(features[0], features[0])[pairs].mean().item())
    return statistics.fmean(distances) if distances else nan


def percent(cell):
    return 100 * float(cell) if cell else nan


def measured(run):
    """All NUMBERS of a run by their keys, nan for what was not measured, and its seed."""
    last = log_of(run)[-1]
    batches = losses_of(run)
    losses = curve(batches)
    row = dict.fromkeys(NUMBERS, nan)
    row["seed"] = int(settings_of(run)["seed"])
    row["accuracy"] = percent(last["accuracy"])
    row["agree"] = percent(last["agree"])
    for step in STEPS:
        if step <= len(losses):
            row[f"ce_{step}"] = losses[step - 1]
    if (run / "memory").exists():  # the runs in results/ have none
        row["diversity"] = diversity(run)
    row["best_is_last"] = best_is_last(batches)
    row["batches"] = len(batches)
    row["images"] = int(last["images"])
    row["seconds"] = float(last["seconds"])
    return row


def print_row(*cells):
    print("|", " | ".join(cells), "|")


def numbers(*runs):
    """A row for each run, and what each column means."""
    heads = []
    for head, _, meaning in NUMBERS.values():
        print(f"{head}: {meaning}")
        heads.append(head)
    print()
    print_row("run", *heads)
    print("|---" * (len(heads) + 1) + "|")
    for run in runs:
        row = measured(Path(run))
        cells = []
        for key, (_, form, _) in NUMBERS.items():
            cells.append("" if isnan(row[key]) else format(row[key], form))
        print_row(run, *cells)


# ---- Groups of runs, compared --------------------------------------------------------------------
# In what follows, `groups` is {word: its rows, seed after seed}, all of the same seeds. The first
# one is what the others are compared with; `first` is what a heading calls it.
def column(rows, key):
    """Floats; nan for an empty cell."""
    return [float(row[key]) if row.get(key, "") != "" else nan for row in rows]


def mean_and_deviation(values, mean_form=".1f", form=".1f"):
    """As text; nothing where something was not measured."""
    mean = statistics.fmean(values)
    if isnan(mean):
        return ""
    if len(values) == 1:
        return f"{mean:{mean_form}}"
    return f"{mean:{mean_form}} ± {statistics.stdev(values):{form}}"


def difference(values, reference, form):
    """(the ends of the 95 % confidence interval of the mean paired difference, by Student's t; mean
    and interval as text). A single pair has no interval: its ends are nan."""
    pairs = [a - b for a, b in zip(values, reference)]
    mean, n = statistics.fmean(pairs), len(pairs)
    if isnan(mean):
        return nan, nan, ""
    if n == 1:
        return nan, nan, f"{mean:{form}}"
    half = stats.t.ppf(0.975, n - 1) * statistics.stdev(pairs) / n**0.5
    low, high = mean - half, mean + half
    return low, high, f"{mean:{form}} [{low:{form}}, {high:{form}}]"


def verdict(low, high):
    """What may be said of a difference whose interval is this."""
    if isnan(low):
        return ""
    if high < 0:
        return "worse"
    if low > 0:
        return "better"
    return f"no difference seen, smaller than {max(-low, high):.1f}"


def print_accuracies(title, groups, first, key="accuracy", head="accuracy, %"):
    print()
    print_row(title, head, f"difference to {first}", "verdict")
    print("|---" * 4 + "|")
    reference = column(next(iter(groups.values())), key)
    for number, (word, rows) in enumerate(groups.items()):
        values = column(rows, key)
        low, high, words = difference(values, reference, "+.1f")
        cells = [words, verdict(low, high)] if number else ["", ""]
        print_row(word, mean_and_deviation(values), *cells)


def print_convergence(groups, first):
    reference = next(iter(groups.values()))
    known = not isnan(column(reference, "diversity")[0])
    steps = [step for step in STEPS if not isnan(column(reference, f"ce_{step}")[0])]
    heads = ["diversity"] if known else []
    for step in steps:
        heads += [f"L_CE at step {step}", f"minus {first}"]
    print()
    print_row("variant", *heads)
    print("|---" * (len(heads) + 1) + "|")
    for word, rows in groups.items():
        cells = [mean_and_deviation(column(rows, "diversity"), ".3g", ".2g")] if known else []
        for step in steps:
            values = column(rows, f"ce_{step}")
            cells.append(mean_and_deviation(values, ".3g", ".2g"))
            _, _, words = difference(values, column(reference, f"ce_{step}"), "+.2f")
            cells.append("" if rows is reference else words)
        print_row(word, *cells)


def by_seed(text):
    """(word, {seed: the numbers of a run}) of "word=pattern"."""
    word, _, pattern = text.partition("=")
    paths = sorted(glob.glob(pattern))
    nayer.check(paths, f"no run folder matches {pattern}")
    rows = {}
    for path in paths:
        row = measured(Path(path))
        nayer.check(row["seed"] not in rows, f"{word}: {path} is a second run of its seed")
        rows[row["seed"]] = row
    return word, rows


def compare(*texts):
    """Tables of groups of runs, in which only the seeds count that all groups have."""
    found = dict(by_seed(text) for text in texts)
    shared = set.intersection(*(set(rows) for rows in found.values()))
    nayer.check(shared, "there is no seed of which all groups have a run")
    seeds = sorted(shared)
    groups = {}
    for word, rows in found.items():
        groups[word] = [rows[seed] for seed in seeds]
        left = sorted(set(rows) - shared)
        if left:
            print(f"{word}: seeds {left} are left out, since not all groups have them")
    first = next(iter(groups))
    print_accuracies(f"seeds {' '.join(map(str, seeds))}", groups, first)
    print_convergence(groups, first)
    print(f"\n±: standard deviation over the seeds. Difference: variant minus {first} for each")
    print("seed; then the mean, and its 95 % confidence interval.")
    if len(seeds) < 3:
        print(f"Seeds: {len(seeds)}. At least three are needed.")


# ---- What a preset needs, counted ----------------------------------------------------------------
def count_bytes(*modules):
    """Of their weights and buffers."""
    tensors = [tensor for module in modules for tensor in module.state_dict().values()]
    return sum(tensor.nbytes for tensor in tensors)


def counts():
    """A row for each preset: what M, the folder memory/ and the checkpoint hold, in MB, but for the
    frames of the files, and the number of steps."""
    print_row("preset", "images", "M, MB", "memory/, MB", "checkpoint, MB", "steps of G", "of S")
    print("|---" * 7 + "|")
    for name in ("digits", "cpu", "cifar10", "cifar10, E = 300", "cifar100", "tiny_imagenet"):
        args = nayer.parse_args(f"--preset {name.replace(', E =', ' --epochs')}".split())
        looks, names = train.IMAGES[args.dataset], train.names_by_label(args.dataset)
        C, channels, size = len(names), len(looks["mean"]), looks["image_size"]
        batches = args.warmup_epochs * args.warmup_batches + args.epochs * args.batches
        images = batches * args.synthesis_batch
        bank = images * channels * size**2
        losses = 3 * 4 * batches * args.generator_steps
        K = min(C, args.synthesis_batch)
        Z = nayer.NoisyLayer(384, -(-args.synthesis_batch // K), K)
        G = nayer.Generator(nayer.HIDDEN_SIZE, channels, size, args.generator_width)
        S = nayer.build_model(args.student, C, channels, size)
        momentum = sum(weight.nbytes for weight in S.parameters())
        files = (bank, bank + 8 * images + losses, count_bytes(S, Z, G) + momentum)
        steps = (batches * args.generator_steps, args.epochs * args.student_steps)
        cells = [f"{size / 1e6:,.1f}" for size in files] + [f"{count:,}" for count in steps]
        print_row(name, f"{images:,}", *cells)


# ---- The command line ----------------------------------------------------------------------------
def parser_of(name, about):
    """An ArgumentParser whose errors are one line."""
    return argparse.ArgumentParser(
        name,
        usage=argparse.SUPPRESS,
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def group(text):
    """An argparse type: WORD=RUNS, left as it is."""
    if "=" not in text:
        raise argparse.ArgumentTypeError(f"{text!r}: write WORD=RUNS, such as lte='runs/lte-*'")
    return text


def main():
    parser = parser_of("figures.py", __doc__)
    actions = parser.add_subparsers(metavar="ACTION", required=True)

    def add(action, *words):
        """words: what is to be given for the action; with three dots, one or more of it."""
        name = action.__name__
        one = actions.add_parser(name, prog=f"figures.py {name}", usage=argparse.SUPPRESS)
        one.set_defaults(action=action)
        for word in words:
            kind = group if "=" in word else str
            one.add_argument(word, nargs="+" if word.endswith("...") else 1, type=kind)

    add(plot, "RUN")
    add(parts, "OUT", "RUN...")
    add(samples, "RUN", "OUT")
    add(diagram, "RUN", "OUT")
    add(minutes, "OUT", "W=RUN...")
    add(numbers, "RUN...")
    add(compare, "W=RUNS...")
    add(counts)
    given = vars(parser.parse_args())
    action = given.pop("action")
    action(*[word for words in given.values() for word in words])


if __name__ == "__main__":
    nayer.run_script(main)
