"""What run folders tell afterwards: python results/figures.py ACTION ...

plot RUN            RUN/curve.png: accuracy, `agree` and the losses against seconds
strip RUN           RUN/training.png: one image of each class, a row per epoch
similarities RUN    RUN/label_embeddings.png: cosine similarity of the class names' embeddings,
                    before and after the BatchNorm of the noisy layer
parts OUT RUN ...   OUT: one class's images in the last epoch of each run, a row per run
diagram RUN OUT     OUT: the method on one picture, with the images of RUN's last two batches
minutes OUT W=RUN ...  OUT: accuracy against minutes of several runs, each with words W
numbers RUN ...     what the tables and exercises speak of, and what is meant by it
compare W=RUNS ...  the same for groups of runs, each with a word W: mean and deviation over seeds,
                    and the difference to the first group, paired by seed. RUNS is a pattern, such
                    as "runs/lte-*", which the program expands
counts              what each preset needs, counted: images, bytes, steps, operations
"""

import contextlib
import csv
import glob
import io
import json
import statistics
import sys
import tempfile
from math import isnan, nan
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from scipy import stats
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.utils import make_grid

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import nayer  # noqa: E402


# ---- What lies in a run folder -------------------------------------------------------------------
def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def summary_of(run):
    path = run / "summary.json"
    nayer.check(path.exists(), f"{run} holds no finished run: there is no {path}")
    return json.loads(path.read_text())


def settings(run):
    return summary_of(run)["settings"]


def class_names(run):
    return nayer.load_model(run / "student.safetensors").info["class_names"]


def label_embeddings(run):
    """e_y as the run read them (C, D), and what the BatchNorm of the noisy layer makes of them."""
    about = settings(run)
    names = class_names(run)
    words = nayer.label_text_embeddings(names, about["text_encoder"], about["prompt"])
    return words, F.batch_norm(words, None, None, training=True)


def saved(run, epoch):
    """Images, labels and losses of an epoch, a dict."""
    return nayer.load_tensors(run / "memory" / f"epoch_{epoch:03d}.pt", "cpu")


def made(run, epoch):
    """(images uint8, labels) of an epoch."""
    file = saved(run, epoch)
    return file["images"], file["labels"]


def learnt(path):
    """Rows of a log.csv or generator.csv without those of epoch -1, which some of the files in this
    folder have: it stands for images that S never meets."""
    return [row for row in read(path) if int(row["epoch"]) >= 0]


def generator_rows(run):
    """A row for each generator step: epoch, batch, step, those of nayer.LOSSES and their sum. The
    runs in this folder have them in a table, others beside their images."""
    if (run / "generator.csv").exists():
        return learnt(run / "generator.csv")
    rows = []
    for epoch in epochs(run):
        for batch, steps in enumerate(saved(run, epoch)["losses"].tolist()):
            for step, values in enumerate(steps):
                row = dict(epoch=epoch, batch=batch, step=step)
                row.update(zip((*nayer.LOSSES, "loss"), values))
                rows.append(row)
    return rows


def epochs(run):
    """Numbers of the epochs whose images S has learnt from."""
    return [int(row["epoch"]) for row in learnt(run / "log.csv")]


# ---- Images --------------------------------------------------------------------------------------
def show(path, cells, columns, rows, names):
    """cells: images uint8 (ch, H, W), row after row; rows, names: words beside and above them."""
    grid = make_grid(torch.stack(cells), columns, padding=1, pad_value=255)
    side = cells[0].shape[-1] + 1  # of a cell, with a line between two
    axes = Figure(figsize=(0.7 * columns + 1.5, 0.7 * len(rows) + 0.5)).subplots()
    axes.imshow(grid.permute(1, 2, 0).numpy(), interpolation="nearest")
    centres = [side * (k + 0.5) for k in range(max(len(names), len(rows)))]
    axes.set_xticks(centres[: len(names)], names, fontsize=8)
    axes.set_yticks(centres[: len(rows)], rows)
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)
    axes.figure.savefig(path, dpi=100, bbox_inches="tight")


def strip(run, most=8):
    """At most so many epochs, evenly spread, and at most 20 classes."""
    run = Path(run)
    count = len(epochs(run))
    shown = torch.linspace(0, count - 1, min(most, count)).round().long().tolist()
    names = class_names(run)
    every = -(-len(names) // 20)  # rounded up
    classes = range(0, len(names), every)
    cells = []
    for epoch in shown:
        images, labels = made(run, epoch)
        for k in classes:
            of_class = images[labels == k]
            white = torch.full_like(images[0], 255)
            cells.append(of_class[0] if len(of_class) else white)
    rows = [f"epoch {epoch}" for epoch in shown]
    show(run / "training.png", cells, len(classes), rows, [names[k] for k in classes])


def parts(out, *runs):
    """The class that has most images in the last epoch of the first run."""
    runs = [Path(run) for run in runs]
    _, labels = made(runs[0], epochs(runs[0])[-1])
    chosen = labels.mode().values
    cells = []
    for run in runs:
        images, labels = made(run, epochs(run)[-1])
        cells += list(images[labels == chosen][:8])
    columns = min(8, len(cells) // len(runs))
    show(out, cells, columns, [run.parent.name for run in runs], [])


def similarities(run):
    run = Path(run)
    names = class_names(run)
    words, normalised = label_embeddings(run)
    figure = Figure(figsize=(10, 5.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_similarity(left, words, names, "Label-text embeddings")
    picture = draw_similarity(right, normalised, names, "After the BatchNorm of the noisy layer")
    figure.colorbar(picture, ax=figure.axes, label="cosine similarity", shrink=0.8)
    figure.savefig(run / "label_embeddings.png", dpi=100)


def draw_similarity(axes, rows, names, title):
    rows = F.normalize(rows)
    cosine = rows @ rows.T
    picture = axes.imshow(cosine.numpy(), vmin=-1, vmax=1, cmap="RdBu_r")
    C = len(names)
    pairs = max(1, C * (C - 1))
    others = (cosine.sum() - C) / pairs  # without the diagonal
    axes.set_title(f"{title}\n(mean between classes: {others:.2f})", fontsize=11)
    if C <= 40:
        axes.set_xticks(range(C), names, rotation=90, fontsize=8)
        axes.set_yticks(range(C), names, fontsize=8)
    return picture


# ---- The method on one picture -------------------------------------------------------------------
class Place(NamedTuple):
    """A rectangle on the canvas. Its methods give the middles of its edges, moved by some units."""

    x: float  # of the lower left corner
    y: float
    width: float
    height: float

    def left(self, up=0):
        return self.x, self.y + self.height / 2 + up

    def right(self, up=0):
        return self.x + self.width, self.y + self.height / 2 + up

    def top(self, along=0):
        return self.x + self.width / 2 + along, self.y + self.height

    def bottom(self, along=0):
        return self.x + self.width / 2 + along, self.y


class Canvas:
    """150 x 56 units, ten to the inch; (0, 0) is the lower left corner."""

    def __init__(self):
        self.axes = Figure(figsize=(15, 5.6)).add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, 150), ylim=(0, 56))
        self.axes.axis("off")

    def box(self, place, text, color="white"):
        x, y, width, height = place
        frame = Rectangle((x, y), width, height, facecolor=color, edgecolor="black")
        self.axes.add_patch(frame)
        self.note(x + width / 2, y + height / 2, text)

    def picture(self, place, values, **look):
        x, y, width, height = place
        extent = (x, x + width, y, y + height)
        self.axes.imshow(values, extent=extent, aspect="auto", **look)

    def note(self, x, y, text, ha="center", fontsize=10, **look):
        self.axes.text(x, y, text, ha=ha, va="center", fontsize=fontsize, **look)

    def arrow(self, start, end, color="black"):
        look = dict(arrowstyle="->", color=color, linewidth=1.5)
        self.axes.annotate("", end, start, arrowprops=look)

    def line(self, *points, color):
        xs, ys = zip(*points)
        self.axes.plot(xs, ys, color=color, linewidth=1.5)


GRAY = "#eeeeee"
TEACHER = "#dddddd"
STUDENT = "#d8efd3"
GENERATOR = "#cfe3f5"
MEMORY = "#fff3d6"
RED = "#c0392b"  # the way of the generator step
GREEN = "#2e7d32"  # of the student step
FIRST, SECOND = 38, 24  # lower edges of the two rows that show a batch each
IMAGES_LEFT = 78  # where their images begin
IMAGES_STEP = 3.8  # from one image to the next


def draw_inputs(canvas, prompt, e_y, normalised):
    """From the prompt to what Z reads. Returns the place of the last picture."""
    prompt_place = Place(1, 33, 15, 8)
    encoder_place = Place(20, 33, 11, 8)
    e_y_place = Place(34, 33, 8, 8)
    norm_place = Place(45, 33, 8, 8)
    canvas.box(prompt_place, f"“{prompt}”")
    canvas.arrow(prompt_place.right(), encoder_place.left())
    canvas.box(encoder_place, "text\nencoder", GRAY)
    canvas.arrow(encoder_place.right(), e_y_place.left())
    canvas.picture(e_y_place, e_y.view(16, -1), cmap="RdBu", vmin=-0.6, vmax=0.6)
    canvas.note(38, 43, f"$e_y$, {len(e_y)} numbers")
    canvas.arrow(e_y_place.right(), norm_place.left())
    canvas.picture(norm_place, normalised.view(16, -1), cmap="RdBu", vmin=-2, vmax=2)
    canvas.note(49, 43, "BatchNorm")
    return norm_place


def draw_batch(canvas, low, draw, norm_place, images, labels, names):
    """A row: a draw of Z, then G, then an image of each class."""
    z_place = Place(58, low, 8, 8)
    g_place = Place(70, low, 5, 8)
    torch.manual_seed(draw)
    canvas.arrow(norm_place.right(), z_place.left())
    canvas.picture(z_place, torch.randn(20, 20), cmap="gray")
    canvas.note(62, low + 9.3, f"Z, draw {draw + 1}")
    canvas.arrow(z_place.right(), g_place.left())
    canvas.box(g_place, "G", GENERATOR)
    canvas.arrow(g_place.right(), (IMAGES_LEFT, low + 4))
    for k, name in enumerate(names):
        x = IMAGES_LEFT + IMAGES_STEP * k
        image = images[labels == k][0].permute(1, 2, 0)
        canvas.picture(Place(x, low + 2.2, 3.6, 3.6), image, cmap="gray")
        canvas.note(x + 1.8, low + 1, name, fontsize=8)


def draw_generator_step(canvas, num_classes):
    """From the images over T and S to the three losses, and back to Z and G."""
    teacher = Place(121, 37, 9, 6)
    student = Place(121, 29, 9, 6)
    loss_ce = Place(134, 41, 15, 4)
    loss_bn = Place(134, 36, 15, 4)
    loss_adv = Place(134, 29, 15, 6)
    images_right = IMAGES_LEFT + 0.5 + IMAGES_STEP * num_classes
    first_batch = (images_right, FIRST + 4)
    second_batch = (images_right, SECOND + 4)
    canvas.arrow(first_batch, teacher.left())
    canvas.arrow(first_batch, student.left(up=1))
    canvas.arrow(second_batch, teacher.left(up=-2))
    canvas.arrow(second_batch, student.left(up=-1))
    canvas.box(teacher, "T, frozen", TEACHER)
    canvas.box(student, "S", STUDENT)
    canvas.box(loss_ce, "$L_{CE}$: T says y")
    canvas.box(loss_bn, "$L_{BN}$: T's statistics")
    canvas.box(loss_adv, "$L_{adv}$: S agrees,\nbut is not as sure")
    canvas.arrow(teacher.right(up=1), loss_ce.left())
    canvas.arrow(teacher.right(), loss_bn.left())
    canvas.arrow(teacher.right(up=-2), loss_adv.left(up=1))
    canvas.arrow(student.right(), loss_adv.left())
    above_g = (72, 53)
    above_z = (62, 53)
    canvas.line(loss_ce.top(along=-0.5), (141, 53), above_g, (72, 46.5), color=RED)
    canvas.arrow((72, 47.5), (72, 46), RED)
    canvas.line(above_z, above_g, color=RED)
    canvas.arrow(above_z, (62, 49), RED)
    canvas.note(106, 54.5, "generator step: lowers the three losses over Z and G", color=RED)


def draw_student_step(canvas):
    """From the images over M, T and S to L_KD, and back to S."""
    memory = Place(78, 8, 38, 8)
    teacher = Place(121, 13, 9, 6)
    student = Place(121, 4, 9, 6)
    loss_kd = Place(134, 8, 15, 6)
    canvas.arrow((97, SECOND), memory.top())
    canvas.box(memory, "M: memory of all images\n(those of each batch's best step)", MEMORY)
    canvas.arrow(memory.right(), teacher.left(up=-1))
    canvas.arrow(memory.right(), student.left(up=1))
    canvas.box(teacher, "T, frozen", TEACHER)
    canvas.box(student, "S", STUDENT)
    canvas.box(loss_kd, "$L_{KD}$: S answers\nas T does")
    canvas.arrow(teacher.right(), loss_kd.left(up=1))
    canvas.arrow(student.right(), loss_kd.left(up=-1))
    canvas.line(loss_kd.bottom(along=-0.5), (141, 1.2), (125.5, 1.2), color=GREEN)
    canvas.arrow((125.5, 1.2), student.bottom(), GREEN)
    canvas.note(106, 1.2, "student step: lowers it over S", color=GREEN)


def diagram(run, out):
    """What is drawn is real but for the two draws of Z: e_y and its BatchNorm as the run read them,
    and its last two batches, whose labels are the same and for which Z was drawn anew."""
    run = Path(run)
    about = settings(run)
    names = class_names(run)
    y = 3  # the class whose prompt is shown
    prompt = about["prompt"].replace("{class}", names[y])
    prompt = prompt.replace("of ", "of\n")  # two lines
    words, normalised = label_embeddings(run)
    last = epochs(run)[-1]
    canvas = Canvas()
    norm_place = draw_inputs(canvas, prompt, words[y], normalised[y])
    for draw, low in enumerate((FIRST, SECOND)):
        images, labels = made(run, last - 1 + draw)
        a_set = slice(-len(names), None)  # the last image of each class
        draw_batch(canvas, low, draw, norm_place, images[a_set], labels[a_set], names)
    canvas.note(97, 48.3, "images: two batches of the same labels y", fontsize=11)
    draw_generator_step(canvas, len(names))
    draw_student_step(canvas)
    steps = (
        "For every batch:\n"
        "1. draw Z anew, N(0, 1), one matrix for each set of classes\n"
        f"2. {about['generator_steps']} generator steps on it, then its images go to M\n"
        "After the batches of an epoch:\n"
        f"3. {about['student_steps']} student steps on M"
    )
    canvas.note(2, 15, steps, ha="left", fontsize=11, linespacing=1.6)
    canvas.axes.figure.savefig(out, dpi=80)


# ---- Accuracies ----------------------------------------------------------------------------------
def minutes(out, *runs):
    axes = Figure(figsize=(8, 4), layout="constrained").subplots()
    for words_and_run in runs:
        words, run = words_and_run.rsplit("=", 1)
        log = [row for row in read(Path(run) / "log.csv") if row["accuracy"]]
        times = [float(row["seconds"]) / 60 for row in log]
        accuracies = [100 * float(row["accuracy"]) for row in log]
        axes.plot(times, accuracies, ".-", label=f"{words}: {accuracies[-1]:.2f} %")
    axes.set(xlabel="minutes", ylabel="accuracy on the test images, %", ylim=(40, None))
    axes.grid(alpha=0.3)
    axes.legend()
    axes.figure.savefig(out, dpi=100)


def plot(run):
    run = Path(run)
    rows = learnt(run / "log.csv")
    teacher_accuracy = summary_of(run)["teacher_accuracy"]
    figure = Figure(figsize=(12, 4), layout="constrained")
    panels = figure.subplots(1, 3)
    if teacher_accuracy is not None:
        panels[0].axhline(teacher_accuracy, color="gray", linestyle="--", label="teacher")
    for axes, columns in zip(panels, (["accuracy"], ["agree"], [*nayer.LOSSES, "loss_kd"])):
        for column in columns:
            known = [row for row in rows if row[column]]
            heights = [abs(float(row[column])) for row in known]
            if known:
                axes.plot([float(row["seconds"]) for row in known], heights, ".-", label=column)
                axes.legend()
        axes.set_xlabel("seconds")
    panels[2].set_yscale("log", nonpositive="mask")  # L_adv is 0 in the warm-up
    figure.savefig(run / "curve.png", dpi=100)


# ---- Numbers of one run --------------------------------------------------------------------------
STEPS = (5, 10, 20)  # of a batch, counted from 1, whose L_CE is told if a batch has so many


class Number(NamedTuple):
    key: str
    head: str
    form: str
    meaning: str


NUMBERS = (
    Number("accuracy", "accuracy, %", ".2f", "of the real test images, after the last epoch"),
    Number(
        "agree", "agree, %", ".2f", "images of agree.pt on which S names the class that T names"
    ),
    Number(
        "ce_5", "L_CE at step 5", ".3g", "in a batch, mean over all batches but the run's first"
    ),
    Number("ce_10", "at step 10", ".3g", "likewise"),
    Number("ce_20", "at step 20", ".3g", "likewise"),
    Number(
        "diversity",
        "diversity",
        ".3g",
        "mean distance of two images of one class in a batch, as T's last linear layer reads them",
    ),
    Number("right_1", "T right, batch 1", ".0f", "% of the first batch that T names as asked for"),
    Number("right_2", "T right, batch 2", ".0f", "% of the second batch"),
    Number("best_is_last", "best is last", ".0f", "batches whose last step has the lowest loss"),
    Number("batches", "batches", ".0f", "of all these, without those for `agree`"),
    Number("images", "images", ".0f", "in M at the end"),
    Number("generator_step", "s a step of G", ".4f", "seconds of synthesis by generator steps"),
    Number("student_step", "s a step of S", ".4f", "seconds of distillation by student steps"),
    Number("seconds", "seconds", ".1f", "of the run, without imports and start"),
)


def curve(generator_steps):
    """L_CE by step: the mean over all batches but the run's first one, for which L_BN has no
    average yet."""
    steps = {}
    for row in generator_steps:
        first_batch = int(row["epoch"]) == 0 and int(row["batch"]) == 0
        if not first_batch:
            steps.setdefault(int(row["step"]), []).append(float(row["loss_ce"]))
    return [statistics.fmean(steps[step]) for step in sorted(steps)]


def best_is_last(generator_steps):
    """(batches in which the last step has the lowest loss, all batches)"""
    batches = {}
    for row in generator_steps:
        batch = (row["epoch"], row["batch"])
        batches.setdefault(batch, []).append(float(row["loss"]))
    count = 0
    for losses in batches.values():
        if losses[-1] == min(losses):
            count += 1
    return count, len(batches)


def teacher_of(run):
    """(T as the run read it, what prepares images for it, both on the fastest device)"""
    about = settings(run)
    name = summary_of(run).get("teacher", about.get("teacher"))
    flags = ["--dataset", about["dataset"], "--teacher", name, "--label-input", "onehot"]
    args = nayer.parse_args(flags)
    for key in ("image_size", "mean", "std"):
        setattr(args, key, about[key])
    teacher = nayer.load_teacher(args)
    info = teacher.info
    nayer.check(info["sha256"] == about["sha256"], f"{name} is not the teacher of {run}")
    device, _ = nayer.pick_device("auto")
    return teacher.to(device), nayer.Augment(info["mean"], info["std"], 0, False, device)


def batches_of(run, epoch, device):
    """The batches of an epoch: images, float in [0, 1], and their labels."""
    batch = int(settings(run)["synthesis_batch"])
    images, labels = made(run, epoch)
    for x, y in zip(images.split(batch), labels.split(batch)):
        yield x.to(device) / 255, y.to(device)


@torch.no_grad()
def diversity(run, teacher, augment):
    """How much images of one class in a batch differ: the mean Euclidean distance between two of
    them, taken between the inputs of the teacher's last linear layer, mean over all batches."""
    linear = [layer for layer in teacher.modules() if isinstance(layer, nn.Linear)]
    if not linear:
        return nan
    seen = []  # inputs of the last one, in T's last pass

    def see(layer, inputs):
        seen[:] = [inputs[0].flatten(1)]

    linear[-1].register_forward_pre_hook(see)
    means = []
    for epoch in epochs(run):
        for x, y in batches_of(run, epoch, augment.mean.device):
            teacher(augment.normalize(x))
            features = seen[0]
            pairs = (y[:, None] == y).triu(1)  # each pair of one class once
            if pairs.any():
                means.append(torch.cdist(features, features)[pairs].mean().item())
    return statistics.fmean(means) if means else nan


@torch.no_grad()
def right_answers(run, teacher, augment):
    """Of each batch of the run's first epoch: on how many images, in %, T names the class that was
    asked for."""
    found = []
    for x, y in batches_of(run, 0, augment.mean.device):
        right = teacher(augment.normalize(x)).argmax(1) == y
        found.append(100 * right.float().mean().item())
    return found


def seconds_in(run, half):
    """Of all epochs. In some of the logs in this folder, those with an epoch -1, they are running
    totals."""
    log = read(run / "log.csv")
    seconds = [float(row[half] or 0) for row in log]
    if log[0]["epoch"] == "-1":
        return seconds[-1] - seconds[0]
    return sum(seconds)


def percent(cell):
    return 100 * float(cell) if cell else nan


def measured(run):
    """All NUMBERS of a finished run by their keys, nan for what was not measured, and its seed."""
    about = settings(run)
    log = learnt(run / "log.csv")
    last = log[-1]
    generator_steps = generator_rows(run)
    losses = curve(generator_steps)
    row = dict.fromkeys((number.key for number in NUMBERS), nan)
    row["seed"] = int(about["seed"])
    row["accuracy"] = percent(last["accuracy"])
    row["agree"] = percent(last["agree"])
    for step in STEPS:
        if step <= len(losses):
            row[f"ce_{step}"] = losses[step - 1]
    if (run / "memory").exists():  # the runs in this folder have none
        teacher, augment = teacher_of(run)
        row["diversity"] = diversity(run, teacher, augment)
        right = right_answers(run, teacher, augment)
        row["right_1"] = right[0]
        if len(right) > 1:
            row["right_2"] = right[1]
    count, batches = best_is_last(generator_steps)
    row["best_is_last"] = count
    row["batches"] = batches
    row["images"] = int(last["images"])
    distilled = [line for line in log if line["loss_kd"]]
    student_steps = len(distilled) * int(about["student_steps"])
    row["generator_step"] = seconds_in(run, "seconds_synthesis") / len(generator_steps)
    row["student_step"] = seconds_in(run, "seconds_distillation") / student_steps
    row["seconds"] = float(last["seconds"])
    return row


def print_row(*cells):
    print("|", " | ".join(cells), "|")


def numbers(*runs):
    """A row for each run, and what each column means."""
    for number in NUMBERS:
        print(f"{number.head}: {number.meaning}")
    print()
    print_row("run", *(number.head for number in NUMBERS))
    print("|---" * (len(NUMBERS) + 1) + "|")
    for run in runs:
        row = measured(Path(run))
        cells = []
        for number in NUMBERS:
            value = row[number.key]
            cells.append("" if isnan(value) else format(value, number.form))
        print_row(run, *cells)


# ---- Groups of runs, compared --------------------------------------------------------------------
# In what follows, `groups` is {word: its rows, seed after seed}, all of the same seeds. The first
# one is what the others are compared with; `first` is what a heading calls it.
def column(rows, key):
    """Floats; nan for an empty cell."""
    values = []
    for row in rows:
        value = row.get(key, "")
        values.append(nan if value == "" else float(value))
    return values


def interval(values):
    """(mean, half of the 95 % confidence interval of the mean) by Student's t. The half is nan for
    a single value, which has no interval; both are where a value was not measured."""
    n = len(values)
    mean = statistics.fmean(values)
    if n == 1 or isnan(mean):
        return mean, nan
    return mean, stats.t.ppf(0.975, n - 1) * statistics.stdev(values) / n**0.5


def mean_and_interval(values):
    """As text; nothing where nothing was measured."""
    mean, half = interval(values)
    if isnan(mean):
        return ""
    if isnan(half):
        return f"{mean:.3g}"
    return f"{mean:.3g} ± {half:.2g}"


def mean_and_deviation(values, digits):
    """As text; nothing where something was not measured."""
    mean = statistics.fmean(values)
    if isnan(mean):
        return ""
    if len(values) == 1:
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def difference(values, reference, form):
    """(the ends of the interval of the mean paired difference; mean and interval as text)"""
    mean, half = interval([a - b for a, b in zip(values, reference)])
    low = mean - half
    high = mean + half
    if isnan(mean):
        return low, high, ""
    if isnan(half):
        return low, high, f"{mean:{form}}"
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


def print_accuracies(title, groups, first):
    print()
    print_row(title, "accuracy, %", f"difference to {first}", "verdict")
    print("|---" * 4 + "|")
    reference = None
    for word, rows in groups.items():
        values = column(rows, "accuracy")
        accuracy = mean_and_deviation(values, 1)
        if reference is None:
            reference = values
            print_row(word, accuracy, "", "")
        else:
            low, high, words = difference(values, reference, "+.1f")
            print_row(word, accuracy, words, verdict(low, high))


def print_convergence(groups, first):
    reference = next(iter(groups.values()))
    steps = [step for step in STEPS if not isnan(column(reference, f"ce_{step}")[0])]
    heads = [f"L_CE at step {step}" for step in steps]
    print()
    print_row("variant", "diversity", *heads, f"at 10, less {first}'s")
    print("|---" * (len(steps) + 3) + "|")
    for word, rows in groups.items():
        cells = []
        for key in ("diversity", *(f"ce_{step}" for step in steps)):
            values = column(rows, key)
            cells.append(mean_and_interval(values))
        words = ""
        if rows is not reference:
            values = column(rows, "ce_10")
            _, _, words = difference(values, column(reference, "ce_10"), "+.2f")
        print_row(word, *cells, words)


def print_costs(groups):
    print()
    print_row("variant", "agree, %", "images", "s a step of G", "s a step of S", "minutes")
    print("|---" * 6 + "|")
    for word, rows in groups.items():
        minutes = [seconds / 60 for seconds in column(rows, "seconds")]
        print_row(
            word,
            mean_and_deviation(column(rows, "agree"), 1),
            f"{rows[0]['images']}",
            mean_and_deviation(column(rows, "generator_step"), 4),
            mean_and_deviation(column(rows, "student_step"), 4),
            mean_and_deviation(minutes, 1),
        )


def by_seed(text):
    """(word, {seed: the numbers of a run}) of "word=pattern"."""
    word, equals, pattern = text.partition("=")
    nayer.check(equals, f"{text}: write WORD=RUNS, for example lte='runs/lte-*'")
    paths = sorted(glob.glob(pattern))
    nayer.check(paths, f"no run folder matches {pattern}")
    rows = {}
    for path in paths:
        row = measured(Path(path))
        seed = row["seed"]
        nayer.check(seed not in rows, f"{word}: {path} is a second run of seed {seed}")
        rows[seed] = row
    return word, rows


INTERVALS = """Accuracy, agree, seconds and minutes: mean ± standard deviation over the seeds.
Diversity and L_CE: mean ± half of its 95 % confidence interval.
Differences: mean over the seeds, which pair the runs, [its 95 % confidence interval]."""


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
    print_costs(groups)
    print(f"\n{INTERVALS}")


# ---- What a preset needs, counted ----------------------------------------------------------------
COUNTED = {
    "digits": "--dataset digits",
    "cpu": "--dataset cifar10 --preset cpu",
    "cifar10": "--dataset cifar10",
    "cifar10, E = 300": "--dataset cifar10 --epochs 300",
    "cifar100": "--dataset cifar100",
    "tiny_imagenet": "--dataset tiny_imagenet",
}


class Operations(TorchDispatchMode):
    """Counts what PyTorch dispatches, but for views, which do no work: on a GPU, about a kernel
    each."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view:
            self.count += 1
        return function(*args, **(kwargs or {}))


def counted(half_step, counts):
    """The half-step, which leaves in `counts` how many operations it has dispatched."""

    def run(*args, **settings):
        with Operations() as operations:
            result = half_step(*args, **settings)
        counts[half_step.__name__] = operations.count
        return result

    return patch.object(nayer, half_step.__name__, run)


def untrained_teacher(args, folder):
    """The file of a network with random weights, since not every preset's teacher is shipped."""
    known = nayer.parse_args(nayer.IMAGES[args.dataset].split())
    names = json.loads((nayer.SHIPPED / "class_names.json").read_text())[args.dataset]
    channels = len(known.mean)
    model = nayer.build_model(args.teacher, len(names), channels, known.image_size)
    info = dict(
        architecture=args.teacher,
        class_names=names,
        channels=channels,
        image_size=known.image_size,
        mean=known.mean,
        std=known.std,
    )
    path = folder / f"{args.teacher}.safetensors"
    nayer.save_model(path, model, info)
    return path


def short_run(flags, out):
    """A run whose epochs have a single batch. Returns {half-step: operations of the last one}."""
    short = "--batches 1 --student-batch 10 --no-amp --device cpu --no-eval --agree-batches 0"
    counts = {}
    with contextlib.redirect_stdout(io.StringIO()), counted(nayer.synthesize, counts):
        with counted(nayer.distill, counts):
            nayer.main(f"{flags} --epochs 1 {short} --out {out}".split())
    return counts


def operations(flags, reuse, folder):
    """Of a generator step and of a student step with L_adv: what another step adds to an epoch."""
    flags += " --warmup-epochs 1 --warmup-batches 1 --synthesis-batch 10"
    student_steps = reuse  # in which T is asked once
    one_step = f"{flags} --generator-steps 1 --student-steps {student_steps}"
    two_steps = f"{flags} --generator-steps 2 --student-steps {2 * student_steps}"
    one = short_run(one_step, folder / "one")
    two = short_run(two_steps, folder / "two")
    generator_step = two["synthesize"] - one["synthesize"]
    student_step = (two["distill"] - one["distill"]) / student_steps
    return generator_step, student_step


def needs(flags, folder):
    """The row of a preset."""
    args = nayer.parse_args(flags.split())
    flags += f" --teacher {untrained_teacher(args, folder)}"
    generator_step, student_step = operations(flags, args.reuse, folder)
    run = folder / "run"  # with a batch of the usual size
    short_run(f"{flags} --warmup-epochs 0 --generator-steps 1 --student-steps 1", run)
    batches = args.warmup_epochs * args.warmup_batches + args.epochs * args.batches
    images = batches * args.synthesis_batch
    one_batch, _ = made(run, 0)
    bytes_in_memory = images * one_batch[0].numel()
    bytes_on_disk = batches * (run / "memory/epoch_000.pt").stat().st_size
    return (
        f"{images:,}",
        f"{bytes_in_memory / 1e6:,.1f}",
        f"{bytes_on_disk / 1e6:,.1f}",
        f"{(run / 'checkpoint.pt').stat().st_size / 1e6:,.1f}",
        f"{batches * args.generator_steps:,}",
        f"{args.epochs * args.student_steps:,}",
        f"{generator_step:,}",
        f"{student_step:,.0f}",
    )


def counts():
    """A row for each preset."""
    print_row(
        "preset",
        "images",
        "M, MB",
        "memory/, MB",
        "checkpoint, MB",
        "steps of G",
        "of S",
        "operations a step of G",
        "of S",
    )
    print("|---" * 9 + "|")
    for name, flags in COUNTED.items():
        with tempfile.TemporaryDirectory() as folder:
            print_row(name, *needs(flags, Path(folder)))


ACTIONS = dict(
    strip=strip,
    similarities=similarities,
    parts=parts,
    diagram=diagram,
    plot=plot,
    minutes=minutes,
    numbers=numbers,
    compare=compare,
    counts=counts,
)


def main():
    action = ACTIONS.get(" ".join(sys.argv[1:2]))
    wanted = 0 if action is counts else 1
    if action is None or len(sys.argv[2:]) < wanted:
        sys.exit(__doc__)
    action(*sys.argv[2:])


if __name__ == "__main__":
    nayer.run_script(main)
