"""What a program needs beside the method: clear errors, images to score on, a log, pictures.

Kept apart from nayer.py so that the method can be read at one sitting, and so that nayer.py has no
line that reads a real image. teachers/train.py uses it too.
"""

import argparse
import contextlib
import csv
import json
import math
import os
import platform
import shlex
import signal
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F

# What the images of a data set are like: pixels, channels, mean and standard deviation per channel.
IMAGES = dict(
    digits=(16, 1, [0.3052], [0.3185]),
    cifar10=(32, 3, [0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010]),
    cifar100=(32, 3, [0.5071, 0.4867, 0.4408], [0.2675, 0.2565, 0.2761]),
    tiny_imagenet=(64, 3, [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]),
    folder=(None, 3, None, None),
)


# ---- Errors, files, devices ---------------------------------------------------------------------


class UserError(Exception):
    """Something the user can put right: the program shows it as one line and exits with code 1."""


@contextlib.contextmanager
def explained(message):
    """Any error in the block becomes a UserError: `message`, and the first line of the reason."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"{message} ({reason})") from error


def number(kind, low, high=math.inf):
    """An argparse type: a finite number of this kind in [low, high]."""

    def parse(text):
        if not low <= (value := kind(text)) <= high or value == math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not in [{low}, {high}]")
        return value

    parse.__name__ = kind.__name__  # for argparse's own message where text is no number at all
    return parse


def run_script(main):
    """Run main() as a program: one clear line and an exit code in the place of a traceback."""

    def stop(signum, frame):
        raise KeyboardInterrupt(signum)

    signal.signal(signal.SIGTERM, stop)
    try:
        main()
    except (UserError, OSError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: error: {error}")
    except KeyboardInterrupt as signum:
        command = shlex.join(arg for arg in sys.argv if arg != "--resume")
        print(
            f"\nstopped; finished epochs are kept: go on with python {command} --resume",
            file=sys.stderr,
        )
        sys.exit(143 if signum.args else 130)


def write_atomically(path, write):
    """write(a temporary path), then move that file to `path`, which is never seen half-written."""
    temporary = path.with_name(path.name + ".tmp")
    with explained(f"cannot write {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def read_class_names(path, outputs):
    """One name per line, as many as the teacher has outputs."""
    with explained(f"cannot use --class-names {path}"):
        names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        names = [name for name in names if name]
        if len(names) != outputs:
            raise ValueError(f"{len(names)} names, but the teacher has {outputs} outputs")
    return names


def pick_device(name):
    """(device, whether bf16 is fast on it); auto: cuda, else mps, else cpu."""
    there = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    name = next(n for n in there if there[n]) if name == "auto" else name
    if not there[name]:
        raise UserError(f"there is no {name} device here: leave --device out, or use --device cpu")
    if name == "cuda":
        return torch.device(name), torch.cuda.get_device_capability() >= (8, 0)  # Ampere
    return torch.device(name), name == "cpu" and torch.cpu._is_avx512_bf16_supported()


# ---- Real images --------------------------------------------------------------------------------


def digits(part):
    """(image, label) pairs of scikit-learn's real digits, uint8 (1, 16, 16).

    part 0: the 1,297 to train a teacher on; part 1: the 500 held out, used for nothing but scoring.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)  # 1,797 images of 8x8 pixels, values 0 to 16
    parts = train_test_split(images, labels, test_size=500, stratify=labels, random_state=0)
    images = torch.as_tensor(parts[part]).float().view(-1, 1, 8, 8) * (255 / 16)
    images = F.interpolate(images, size=16, mode="bilinear").round().byte()
    return list(zip(images, parts[part + 2].tolist()))


def image_folder(folder, channels, image_size):
    """torchvision's ImageFolder (a folder per class) of uint8 images (channels, size, size).

    Other sizes are resized and cropped in the middle; grayscale and palette images are converted.
    Raises ValueError for an unreadable image, FileNotFoundError for a missing or empty folder.
    """
    from PIL import Image
    from torchvision import datasets
    from torchvision.transforms import v2

    def read(path):
        try:
            with Image.open(path) as image:
                return image.convert("L" if channels == 1 else "RGB")
        except (OSError, ValueError, SyntaxError) as error:
            raise ValueError(f"unreadable image {path}: {error}") from error

    fit = v2.Compose([v2.Resize(image_size), v2.CenterCrop(image_size), v2.PILToTensor()])
    return datasets.ImageFolder(folder, transform=fit, loader=read)


def cifar(dataset, root, train):
    """cifar10 or cifar100 through torchvision, downloaded to `root` when needed."""
    from torchvision import datasets
    from torchvision.transforms import v2

    kind = getattr(datasets, dataset.upper())
    try:
        return kind(root, train=train, download=True, transform=v2.PILToTensor())
    except (OSError, RuntimeError) as error:
        place = root / kind.base_folder
        raise FileNotFoundError(f"no {place}, and no download: unpack it there") from error


def tiny_imagenet(root, part, channels=3, image_size=64):
    """The official archive, unpacked. part: "train", or "val", which is one folder and a table."""
    root = root / "tiny-imagenet-200"
    if not (root / "wnids.txt").is_file():
        raise FileNotFoundError(
            f"no {root / 'wnids.txt'}: unpack tiny-imagenet-200.zip in {root.parent}"
        )
    wnids = (root / "wnids.txt").read_text().split()
    data = image_folder(root / part, channels, image_size)
    if part == "train":
        data.samples = [(path, wnids.index(data.classes[label])) for path, label in data.samples]
    else:
        rows = (root / part / "val_annotations.txt").read_text().splitlines()
        rows = [row.split("\t")[:2] for row in rows]
        data.samples = [(str(root / part / "images" / name), wnids.index(w)) for name, w in rows]
    return data


def test_images(dataset, root, class_names, channels, image_size):
    """(image, label) pairs to score on: uint8 (channels, size, size), index of a class."""
    expected = IMAGES[dataset][0]
    if expected not in (None, image_size):
        raise ValueError(f"the teacher reads {image_size} pixels, {dataset} has {expected}")
    if dataset == "digits":
        return digits(1)
    if dataset in ("cifar10", "cifar100"):
        return cifar(dataset, root, train=False)
    if dataset == "tiny_imagenet":
        return tiny_imagenet(root, "val")
    data = image_folder(root / "test", channels, image_size)
    if unknown := set(data.classes) - set(class_names):
        raise ValueError(
            f"the teacher knows no class {min(unknown)!r}, a folder in {root / 'test'}"
        )
    data.samples = [(path, class_names.index(data.classes[label])) for path, label in data.samples]
    return data


def stack(pairs):
    """A small data set decoded at once: images uint8 (N, ch, H, W), labels (N,)."""
    images, labels = zip(*pairs)
    return torch.stack(images), torch.tensor(labels)


def test_batches(dataset, root, class_names, channels, image_size, device):
    """Batches (images uint8, labels): decoded once onto the device; streamed above 64 pixels."""
    pairs = test_images(dataset, root, class_names, channels, image_size)
    if image_size > 64:
        return torch.utils.data.DataLoader(pairs, batch_size=100, num_workers=2)
    images, labels = stack(pairs)
    return list(zip(images.to(device).split(500), labels.to(device).split(500)))


# ---- Pictures and the log -----------------------------------------------------------------------


def draw_samples(file, images, labels, class_names, rows=8, columns=20):
    """A grid of images uint8 (B, ch, H, W): a column per class (at most 20), its name on top."""
    from PIL import Image, ImageDraw

    shown = torch.linspace(0, len(class_names) - 1, min(columns, len(class_names))).long().tolist()
    cell = max(64, images.shape[-1])
    grid = Image.new("RGB", (len(shown) * (cell + 2), 14 + rows * (cell + 2)), "white")
    for column, label in enumerate(shown):
        x = column * (cell + 2)
        ImageDraw.Draw(grid).text((x, 1), class_names[label][: cell // 6], fill="black")
        for row, image in enumerate(images[labels == label][:rows].cpu()):
            picture = Image.fromarray(image.permute(1, 2, 0).squeeze(2).numpy())
            picture = picture.resize((cell, cell), Image.Resampling.NEAREST)
            grid.paste(picture, (x, 14 + row * (cell + 2)))
    grid.save(file, "png")


def draw_curve(file, log, teacher_accuracy):
    """Against seconds: test accuracy, with the teacher's as a line; the unweighted losses."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    curves = dict(accuracy="student", loss_ce="CE", loss_bn="BN", loss_adv="|adv|", loss_kd="KD")
    for column, label in curves.items():
        points = [(row["seconds"], abs(row[column])) for row in log if row[column]]
        if points:
            axes = left if column == "accuracy" else right
            axes.plot(*zip(*points), ".-", label=label)
    if teacher_accuracy is not None:
        left.axhline(teacher_accuracy, color="gray", linestyle="--", label="teacher")
    left.set(xlabel="seconds", ylabel="test accuracy", title="Student against teacher")
    right.set(xlabel="seconds", yscale="log", title="Losses, unweighted")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    figure.savefig(file, dpi=100, format="png")


def write_csv(file, rows):
    """rows: dicts with the same keys; None becomes an empty field."""
    with open(file, "w", newline="") as handle:
        writer = csv.DictWriter(handle, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def peak_memory_mb(device):
    """The most memory this process has held: on the device for CUDA, else resident, in MB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    try:
        from resource import RUSAGE_SELF, getrusage
    except ImportError:  # Windows
        return None
    return getrusage(RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def percent(fraction):
    return "-" if fraction is None else f"{fraction:.2%}"


def check_finite(place, **losses):
    """UserError at the first loss that is no finite number; what was finished stays on disk."""
    for name, value in losses.items():
        if not math.isfinite(value):
            raise UserError(
                f"{name} became {value} in {place}: lower the learning rate, or --no-amp"
            )


class Journal:
    """What a run tells: a line per epoch on the console, log.csv, generator.csv, pictures, summary.

    rows: of log.csv, one per epoch; steps: of generator.csv, one per generator step. Losses in both
    are unweighted; those of an epoch are the means over the last steps of its batches.
    """

    LINE = "{:>5} {:>7} {:>8} {:>8} {:>8} {:>8} {:>8} {:>8} {:>8} {:>6}"
    COLUMNS = ("epoch", "images", "CE", "BN", "adv", "KD", "accuracy", "best", "seconds", "left")

    def __init__(self, out, epochs, device):
        self.out, self.epochs, self.device = out, epochs, device
        self.rows, self.steps, self.clock = [], [], time.perf_counter()

    def header(self, args, classes, image_size, teacher_accuracy):
        """What is distilled into what, where, with which versions; the heads of the columns."""
        score = percent(teacher_accuracy) + ("" if args.eval else ", by its file")
        precision = "bf16" if args.amp else "fp32"
        versions = f"python {platform.python_version()}, torch {torch.__version__}"
        print(f"data set  {args.dataset}: {classes} classes, {image_size} pixels")
        print(f"networks  {args.teacher} (accuracy {score}) -> {args.student}")
        print(f"machine   {self.device}, {precision}, {versions}, seed {args.seed}\n")
        print(self.LINE.format(*self.COLUMNS), flush=True)

    def add_batch(self, epoch, batch, losses):
        """losses (steps, 4): L_CE, L_BN, L_adv, weighted sum. UserError if not finite."""
        for step, values in enumerate(losses.tolist()):
            names = dict(zip(("loss_ce", "loss_bn", "loss_adv", "loss"), values))
            check_finite(f"epoch {epoch}, batch {batch}", **names)
            self.steps.append(dict(epoch=epoch, batch=batch, step=step) | names)

    def add_epoch(self, epoch, images, loss_kd, accuracy, **seconds):
        """Make the row of an epoch and print it. In the warm-up, loss_kd and accuracy are None."""
        ends = {step["batch"]: step for step in self.steps if step["epoch"] == epoch}.values()
        row = dict(epoch=epoch, images=images)
        for name in ("loss_ce", "loss_bn", "loss_adv"):
            row[name] = sum(step[name] for step in ends) / len(ends)
        if loss_kd is not None:
            check_finite(f"epoch {epoch}", loss_kd=loss_kd)
        scores = [r["accuracy"] for r in self.rows if r["accuracy"] is not None]
        best = None if accuracy is None else max([accuracy, *scores])
        row |= dict(loss_kd=loss_kd, accuracy=accuracy, best=best)
        before, now = self.rows[-1]["seconds"] if self.rows else 0.0, time.perf_counter()
        row |= dict(seconds=before + now - self.clock, **seconds)
        row["peak_memory_mb"], self.clock = peak_memory_mb(self.device), now
        self.rows.append(row)
        left = (self.epochs - 1 - epoch) * (row["seconds"] - before)
        cells = [f"{row[name]:.4f}" for name in ("loss_ce", "loss_bn", "loss_adv")]
        cells += ["-" if loss_kd is None else f"{loss_kd:.4f}", percent(accuracy), percent(best)]
        cells += [f"{row['seconds']:.1f}", "-" if loss_kd is None else f"{left:.0f}"]
        print(self.LINE.format(epoch, images, *cells), flush=True)

    def write(self, images, labels, class_names):
        """Both tables, and the grid of the epoch's last batch of images."""
        picture = self.out / "samples" / f"epoch_{self.rows[-1]['epoch']:03d}.png"
        write_atomically(picture, lambda file: draw_samples(file, images, labels, class_names))
        write_atomically(self.out / "log.csv", lambda file: write_csv(file, self.rows))
        write_atomically(self.out / "generator.csv", lambda file: write_csv(file, self.steps))

    def finish(self, args, teacher_accuracy):
        """summary.json, curve.png and the last lines on the console. Returns the summary."""
        rows, last = self.rows, self.rows[-1]
        kinds = ("synthesis", "distillation", "evaluation")
        spent = {kind: sum(row[f"seconds_{kind}"] for row in rows) for kind in kinds}
        learned = sum(row["loss_kd"] is not None for row in rows)
        generator_steps, student_steps = len(self.steps), learned * args.student_steps
        synthesis, distillation = spent["synthesis"], spent["distillation"]
        summary = dict(
            dataset=args.dataset,
            teacher=args.teacher,
            student=args.student,
            device=str(self.device),
            seed=args.seed,
            amp=args.amp,
            teacher_accuracy=teacher_accuracy,
            student_accuracy=last["accuracy"],
            best_accuracy=last["best"],
            epochs=len(rows),
            images_synthesized=generator_steps // args.generator_steps * args.synthesis_batch,
            generator_steps=generator_steps,
            student_steps=student_steps,
            seconds_total=last["seconds"],
            **{f"seconds_{kind}": seconds for kind, seconds in spent.items()},
            seconds_per_generator_step=synthesis / generator_steps,
            seconds_per_student_step=distillation / student_steps,
            generator_images_per_second=generator_steps * args.synthesis_batch / synthesis,
            student_images_per_second=student_steps * args.student_batch / distillation,
            peak_memory_mb=last["peak_memory_mb"],
            versions=dict(python=platform.python_version(), torch=torch.__version__)
            | {name: version(name) for name in ("torchvision", "safetensors")},
        )
        text = json.dumps(summary, indent=2) + "\n"
        write_atomically(self.out / "summary.json", lambda file: file.write_text(text))
        curve = self.out / "curve.png"
        write_atomically(curve, lambda file: draw_curve(file, rows, teacher_accuracy))
        score, best, teacher = map(percent, (last["accuracy"], last["best"], teacher_accuracy))
        print(f"\nstudent   last {score}, best {best}, teacher {teacher}")
        split = ", ".join(f"{kind} {seconds:.1f}" for kind, seconds in spent.items())
        print(f"seconds   {last['seconds']:.1f} in all: {split}")
        print(f"files     {self.out}/: student.safetensors log.csv summary.json curve.png samples/")
        return summary

    def state_dict(self):
        return dict(rows=self.rows, steps=self.steps)

    def load_state_dict(self, state):
        self.rows, self.steps = state["rows"], state["steps"]
