"""What run folders tell afterwards: python results/figures.py ACTION ...

table DIR           DIR/<variant>/<seed>/ are runs: a Markdown table (accuracy, L_CE within a batch,
                    diversity), DIR/raw.csv with a row per run, DIR/convergence.png
strip RUN           RUN/training.png: one image of each class, a row per epoch
similarities RUN    RUN/label_embeddings.png: cosine similarity of the class names' embeddings,
                    before and after the BatchNorm of the noisy layer
parts OUT RUN ...   OUT: one class's images in the last epoch of each run, a row per run
published DIR T:S ...  DIR/<T>-<S>/ are runs of published.sh: the table of their accuracies
"""

import csv
import json
import statistics
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure
from torchvision.utils import make_grid

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import nayer  # noqa: E402


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def settings(run):
    return json.loads((run / "summary.json").read_text())["settings"]


def made(run, epoch):
    """(images uint8, labels) of an epoch."""
    file = torch.load(run / "memory" / f"epoch_{epoch:03d}.pt", weights_only=True)
    return file["images"], file["labels"]


@torch.no_grad()
def diversity(run):
    """How much images of one class in a batch differ: the mean Euclidean distance between two of
    them, taken between the inputs of the teacher's last linear layer, mean over all batches."""
    about, seen, found = settings(run), [], []
    args = nayer.parse_args(["--dataset", about["dataset"], "--teacher", about["teacher"]])
    teacher = nayer.load_teacher(args)
    augment = nayer.Augment(teacher.info["mean"], teacher.info["std"], 0, False)
    linear = [layer for layer in teacher.modules() if isinstance(layer, nn.Linear)][-1]
    linear.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(1)))
    for epoch in range(len(read(run / "log.csv"))):
        images, labels = (part.split(int(about["synthesis_batch"])) for part in made(run, epoch))
        for x, y in zip(images, labels):
            teacher.eval()(augment.normalize(x / 255))
            pairs = (y[:, None] == y).triu(1)
            if pairs.any():
                found.append(torch.cdist(seen[-1], seen[-1])[pairs].mean().item())
    return statistics.fmean(found) if found else float("nan")


def measure(run):
    """A row of the table, and L_CE by step: the mean over all batches but the run's first one."""
    log, steps = read(run / "log.csv"), read(run / "generator.csv")
    steps = [row for row in steps if (row["epoch"], row["batch"]) != ("0", "0")]
    last = max(int(row["step"]) for row in steps)
    curve = [
        statistics.fmean(float(row["loss_ce"]) for row in steps if int(row["step"]) == step)
        for step in range(last + 1)
    ]
    names = ("ce_5", "ce_10", "ce_20")
    row = dict(accuracy=100 * float(log[-1]["accuracy"]))
    row |= {name: curve[min(step, last)] for name, step in zip(names, (4, 9, 19))}
    return row | dict(diversity=diversity(run), seconds=float(log[-1]["seconds"])), curve


def table(folder):
    found, curves, raw = {}, {}, []
    for run in sorted(path.parent for path in folder.glob("*/*/summary.json")):
        values, curve = measure(run)
        name = run.parent.name.replace("--", "")
        found.setdefault(name, []).append(values)
        curves.setdefault(name, []).append(curve)
        raw.append(dict(variant=name, seed=run.name) | values)
    if not raw:
        sys.exit(f"no finished runs in {folder}")
    with open(folder / "raw.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, raw[0])
        writer.writeheader()
        short = {float: "{:.5g}".format}
        writer.writerows({k: short.get(type(v), str)(v) for k, v in row.items()} for row in raw)
    print("| variant | accuracy, % | CE at step 5 | 10 | 20 | diversity | s | seeds |")
    print("|---|---|---|---|---|---|---|---|")
    for name in sorted(found, key=lambda name: (name != "default", name)):
        cells = []
        for key, digits in zip(found[name][0], (2, 3, 3, 3, 2, 1)):
            values = [row[key] for row in found[name]]
            spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.{digits}f}{spread}")
        print(f"| {name} | {' | '.join(cells)} | {len(found[name])} |")
    axes = Figure(figsize=(8, 4), layout="constrained").subplots()
    for name, label in (
        ("default", "LTE"),
        ("label-input onehot", "one-hot"),
        ("label-input noise", "noise"),
    ):
        mean = [statistics.fmean(values) for values in zip(*curves.get(name, []))]
        axes.plot(range(1, len(mean) + 1), mean, ".-", label=label)
    axes.set(xlabel="generator step within a batch", ylabel="L_CE", yscale="log")
    axes.legend()
    axes.figure.savefig(folder / "convergence.png", dpi=100)


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
    epochs = len(read(run / "log.csv"))
    shown = torch.linspace(0, epochs - 1, min(most, epochs)).round().long().tolist()
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
        images, labels = made(run, len(read(run / "log.csv")) - 1)
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
    actions = dict(table=table, strip=strip, similarities=similarities, parts=parts)
    actions |= dict(published=published)
    if len(sys.argv) < 3 or sys.argv[1] not in actions:
        sys.exit(__doc__)
    actions[sys.argv[1]](*map(Path, sys.argv[2:]))
