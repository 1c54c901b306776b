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

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torchvision.utils import make_grid

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import nayer  # noqa: E402


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def add(path, row):
    """One row, a dict, at the end of a table; a new table gets its keys as the head."""
    fresh = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        if fresh:
            writer.writeheader()
        writer.writerow(row)


def settings(run):
    return json.loads((run / "summary.json").read_text())["settings"]


def made(run, epoch):
    """(images uint8, labels) of an epoch."""
    file = torch.load(run / "memory" / f"epoch_{epoch:03d}.pt", weights_only=True)
    return file["images"], file["labels"]


def learnt(path):
    """Rows of a run's log.csv or generator.csv but those of epoch -1: S never meets its images."""
    return [row for row in read(path) if int(row["epoch"]) >= 0]


def epochs(run):
    """Numbers of the epochs whose images S has learnt from."""
    return [int(row["epoch"]) for row in learnt(run / "log.csv")]


def show(path, cells, columns, rows, names):
    """cells: images uint8 (ch, H, W), row after row; rows, names: words beside and above them."""
    grid, side = (
        make_grid(torch.stack(cells), columns, padding=1, pad_value=255),
        cells[0].shape[-1],
    )
    axes = Figure(figsize=(0.7 * columns + 1.5, 0.7 * len(rows) + 0.5)).subplots()
    axes.imshow(grid.permute(1, 2, 0).numpy(), interpolation="nearest")
    axes.set_xticks([(side + 1) * (k + 0.5) for k in range(len(names))], names, fontsize=8)
    axes.set_yticks([(side + 1) * (k + 0.5) for k in range(len(rows))], rows)
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)
    axes.figure.savefig(path, dpi=100, bbox_inches="tight")


def strip(run, most=8):
    count = len(epochs(run))
    shown = torch.linspace(0, count - 1, min(most, count)).round().long().tolist()
    names = nayer.load_model(run / "student.safetensors").info["class_names"]
    classes = range(0, len(names), -(-len(names) // 20))
    cells = []
    for epoch in shown:
        images, labels = made(run, epoch)
        white = torch.full_like(images[0], 255)
        cells += [images[labels == k][0] if (labels == k).any() else white for k in classes]
    rows = [f"epoch {epoch}" for epoch in shown]
    show(run / "training.png", cells, len(classes), rows, [names[k] for k in classes])


def parts(out, *runs):
    """The class that has most images in the last epoch of the first run."""
    cells, chosen = [], None
    for run in runs:
        images, labels = made(run, epochs(run)[-1])
        chosen = labels.mode().values if chosen is None else chosen
        cells += list(images[labels == chosen][:8])
    show(out, cells, min(8, len(cells) // len(runs)), [run.parent.name for run in runs], [])


def similarities(run):
    about, info = settings(run), nayer.load_model(run / "student.safetensors").info
    names = info["class_names"]
    rows = nayer.label_text_embeddings(names, about["text_encoder"], about["prompt"])
    figure = Figure(figsize=(10, 5.4), layout="constrained")
    titles = ("Label-text embeddings", "After the BatchNorm of the noisy layer")
    normalised = F.batch_norm(rows, None, None, training=True)
    for axes, x, title in zip(figure.subplots(1, 2), (rows, normalised), titles):
        x = F.normalize(x)
        cosine, C = x @ x.T, len(x)
        picture = axes.imshow(cosine.numpy(), vmin=-1, vmax=1, cmap="RdBu_r")
        others = (cosine.sum() - C) / max(1, C * (C - 1))
        axes.set_title(f"{title}\n(mean between classes: {others:.2f})", fontsize=11)
        if C <= 40:
            axes.set_xticks(range(C), names, rotation=90, fontsize=8)
            axes.set_yticks(range(C), names, fontsize=8)
    figure.colorbar(picture, ax=figure.axes, label="cosine similarity", shrink=0.8)
    figure.savefig(run / "label_embeddings.png", dpi=100)


def diagram(run, out):
    """What is drawn is real but for the two draws of Z: e_y and its BatchNorm as the run read them,
    and its last two batches, whose labels are the same and for which Z was drawn anew."""
    about, info = settings(run), nayer.load_model(run / "student.safetensors").info
    names, last = info["class_names"], epochs(run)[-1]
    words = nayer.label_text_embeddings(names, about["text_encoder"], about["prompt"])
    normalised, y = F.batch_norm(words, None, None, training=True), 3
    axes = Figure(figsize=(15, 5.6)).add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 150), ylim=(0, 56))
    axes.axis("off")

    def box(x, y, width, height, text, color="#eeeeee"):
        axes.add_patch(Rectangle((x, y), width, height, facecolor=color, edgecolor="black"))
        axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=10)

    def arrow(start, end, color="black"):
        axes.annotate("", end, start, arrowprops=dict(arrowstyle="->", color=color, linewidth=1.5))

    def picture(x, y, side, values, **how):
        axes.imshow(values, extent=(x, x + side, y, y + side), aspect="auto", **how)

    def note(x, y, text, **how):
        axes.text(x, y, text, **dict(ha="center", va="center", fontsize=10) | how)

    prompt = about["prompt"].replace("{class}", names[y]).replace("of ", "of\n")
    box(1, 33, 15, 8, f"“{prompt}”", "white")
    arrow((16, 37), (20, 37))
    box(20, 33, 11, 8, "text\nencoder")
    arrow((31, 37), (34, 37))
    picture(34, 33, 8, words[y].view(16, -1), cmap="RdBu", vmin=-0.6, vmax=0.6)
    note(38, 43, f"$e_y$, {words.shape[1]} numbers")
    arrow((42, 37), (45, 37))
    picture(45, 33, 8, normalised[y].view(16, -1), cmap="RdBu", vmin=-2, vmax=2)
    note(49, 43, "BatchNorm")
    for line, low in enumerate((38, 24)):
        torch.manual_seed(line)
        arrow((53, 37), (58, low + 4))
        picture(58, low, 8, torch.randn(20, 20), cmap="gray")
        note(62, low + 9.3, f"Z, draw {line + 1}")
        arrow((66, low + 4), (70, low + 4))
        box(70, low, 5, 8, "G", "#cfe3f5")
        arrow((75, low + 4), (78, low + 4))
        images, labels = (part[-len(names) :] for part in made(run, last - 1 + line))
        for k in range(len(names)):
            cell = images[labels == k][0].permute(1, 2, 0)
            picture(78 + 3.8 * k, low + 2.2, 3.6, cell, cmap="gray")
            note(79.8 + 3.8 * k, low + 1, names[k], fontsize=8)
    note(97, 48.3, "images: two batches of the same labels y", fontsize=11)
    for low in (42, 28):
        arrow((78.5 + 3.8 * len(names), low), (121, 40 if low > 30 else 38))
        arrow((78.5 + 3.8 * len(names), low), (121, 33 if low > 30 else 31))
    box(121, 37, 9, 6, "T, frozen", "#dddddd")
    box(121, 29, 9, 6, "S", "#d8efd3")
    box(134, 41, 15, 4, "$L_{CE}$: T says y", "white")
    box(134, 36, 15, 4, "$L_{BN}$: T's statistics", "white")
    box(134, 29, 15, 6, "$L_{adv}$: S agrees,\nbut is not as sure", "white")
    for start, end in (((130, 41), 43), ((130, 40), 38), ((130, 38), 33), ((130, 32), 32)):
        arrow(start, (134, end))
    axes.plot([141, 141, 72, 72], [45, 53, 53, 46.5], color="#c0392b", linewidth=1.5)
    arrow((72, 47.5), (72, 46), "#c0392b")
    arrow((62, 53), (62, 49), "#c0392b")
    axes.plot([62, 72], [53, 53], color="#c0392b", linewidth=1.5)
    note(106, 54.5, "generator step: lowers the three losses over Z and G", color="#c0392b")
    box(78, 8, 38, 8, "M: memory of all images\n(those of each batch's best step)", "#fff3d6")
    arrow((97, 24), (97, 16))
    arrow((116, 12), (121, 15))
    arrow((116, 12), (121, 8))
    box(121, 13, 9, 6, "T, frozen", "#dddddd")
    box(121, 4, 9, 6, "S", "#d8efd3")
    box(134, 8, 15, 6, "$L_{KD}$: S answers\nas T does", "white")
    arrow((130, 16), (134, 12))
    arrow((130, 7), (134, 10))
    axes.plot([141, 141, 125.5], [8, 1.2, 1.2], color="#2e7d32", linewidth=1.5)
    arrow((125.5, 1.2), (125.5, 4), "#2e7d32")
    note(106, 1.2, "student step: lowers it over S", color="#2e7d32")
    steps = "For every batch:\n1. draw Z anew, N(0, 1), one matrix for each set of classes"
    steps += f"\n2. {about['generator_steps']} generator steps on it, then its images go to M"
    steps += f"\nAfter the batches of an epoch:\n3. {about['student_steps']} student steps on M"
    note(2, 15, steps, ha="left", fontsize=11, linespacing=1.6)
    axes.figure.savefig(out, dpi=80)


def minutes(out, *runs):
    axes = Figure(figsize=(8, 4), layout="constrained").subplots()
    for words, run in (str(run).rsplit("=", 1) for run in runs):
        log = [row for row in read(Path(run) / "log.csv") if row["accuracy"]]
        points = [(float(row["seconds"]) / 60, 100 * float(row["accuracy"])) for row in log]
        axes.plot(*zip(*points), ".-", label=f"{words}: {points[-1][1]:.2f} %")
    axes.set(xlabel="minutes", ylabel="accuracy on the test images, %", ylim=(40, None))
    axes.grid(alpha=0.3)
    axes.legend()
    axes.figure.savefig(out, dpi=100)


def published(folder, *pairs):
    """Pairs without a finished run show a dash."""
    paths = [folder / str(pair).replace(":", "-") / "summary.json" for pair in pairs]
    found = [json.loads(path.read_text()) if path.exists() else {} for path in paths]
    print("| |", " | ".join(map(str, pairs)).replace(":", " → "), "|")
    print("|---" * (len(pairs) + 1) + "|")
    for name, key, scale in (
        ("teacher, %", "teacher_accuracy", 100),
        ("student, last epoch, %", "student_accuracy", 100),
        ("hours of the run", "seconds", 1 / 3600),
    ):
        cells = (f"{scale * run[key]:.2f}" if run.get(key) else "-" for run in found)
        print(f"| {name} |", " | ".join(cells), "|")


if __name__ == "__main__":
    actions = dict(strip=strip, similarities=similarities, parts=parts, diagram=diagram)
    actions |= dict(minutes=minutes, published=published)
    if len(sys.argv) < 3 or sys.argv[1] not in actions:
        sys.exit(__doc__)
    actions[sys.argv[1]](*map(Path, sys.argv[2:]))
