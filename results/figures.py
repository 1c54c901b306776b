"""What run folders tell afterwards: python results/figures.py ACTION ...

strip RUN           RUN/training.png: one image of each class, a row per epoch
similarities RUN    RUN/label_embeddings.png: cosine similarity of the class names' embeddings,
                    before and after the BatchNorm of the noisy layer
parts OUT RUN ...   OUT: one class's images in the last epoch of each run, a row per run
diagram RUN OUT     OUT: the method on one picture, with the images of RUN's last two batches
minutes OUT W=RUN ...  OUT: accuracy against minutes of several runs, each with words W
published DIR T:S ...  DIR/<T>-<S>/ are runs of published.sh: the table of their accuracies
"""

import csv
import json
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torchvision.utils import make_grid

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import nayer  # noqa: E402


# ---- What lies in a run folder -------------------------------------------------------------------
def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def settings(run):
    summary = json.loads((run / "summary.json").read_text())
    return summary["settings"]


def class_names(run):
    return nayer.load_model(run / "student.safetensors").info["class_names"]


def label_embeddings(run):
    """e_y as the run read them (C, D), and what the BatchNorm of the noisy layer makes of them."""
    about = settings(run)
    names = class_names(run)
    words = nayer.label_text_embeddings(names, about["text_encoder"], about["prompt"])
    return words, F.batch_norm(words, None, None, training=True)


def made(run, epoch):
    """(images uint8, labels) of an epoch."""
    file = torch.load(run / "memory" / f"epoch_{epoch:03d}.pt", weights_only=True)
    return file["images"], file["labels"]


def learnt(path):
    """Rows of a log.csv or generator.csv without those of epoch -1, which some of the files in this
    folder have: it stands for images that S never meets."""
    return [row for row in read(path) if int(row["epoch"]) >= 0]


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


def published(folder, *pairs):
    """Pairs without a finished run show a dash."""
    summaries = []
    for pair in pairs:
        path = Path(folder) / pair.replace(":", "-") / "summary.json"
        summary = {}
        if path.exists():
            summary = json.loads(path.read_text())
        summaries.append(summary)
    print("| |", " | ".join(pairs).replace(":", " → "), "|")
    print("|---" * (len(pairs) + 1) + "|")
    lines = (
        ("teacher, %", "teacher_accuracy", 100),
        ("student, last epoch, %", "student_accuracy", 100),
        ("hours of the run", "seconds", 1 / 3600),
    )
    for name, key, scale in lines:
        cells = []
        for summary in summaries:
            value = summary.get(key)
            cells.append(f"{scale * value:.2f}" if value else "-")
        print(f"| {name} |", " | ".join(cells), "|")


ACTIONS = dict(
    strip=strip,
    similarities=similarities,
    parts=parts,
    diagram=diagram,
    minutes=minutes,
    published=published,
)

if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] not in ACTIONS:
        sys.exit(__doc__)
    action = ACTIONS[sys.argv[1]]
    action(*sys.argv[2:])
