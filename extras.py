"""What a program needs beside the method: clear errors, networks from the user's own files, several
processes, images to score on, checkpoints, a log, pictures.

Kept apart from nayer.py so that the method can be read at one sitting, and so that nayer.py has no
line that reads a real image. teachers/train.py uses it too.
"""

import argparse
import contextlib
import csv
import ctypes
import hashlib
import importlib.util
import io
import json
import math
import os
import platform
import shlex
import signal
import sys
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path

import safetensors
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

# What the images of a data set are like: pixels, channels, mean and standard deviation per channel.
IMAGES = dict(
    digits=(16, 1, [0.3052], [0.3185]),
    cifar10=(32, 3, [0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010]),
    cifar100=(32, 3, [0.5071, 0.4867, 0.4408], [0.2675, 0.2565, 0.2761]),
    tiny_imagenet=(64, 3, [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]),
    folder=(None, 3, None, None),
)
SMALL = 64  # pixels: larger images are not kept in memory, but read when they are needed


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


def out_of_memory(error):
    """Which flag to lower, by where in the program the memory ran out."""
    functions, trace = set(), error.__traceback__
    while trace:
        functions.add(trace.tb_frame.f_code.co_name)
        trace = trace.tb_next
    flag = "--student-batch" if "distill" in functions else "--synthesis-batch"
    return f"out of memory: lower {flag}, or --bank-size if little is missing"


def run_script(main):
    """Run main() as a program: one clear line and an exit code in the place of a traceback."""

    def stop(signum, frame):
        raise KeyboardInterrupt(signum)

    signal.signal(signal.SIGTERM, stop)
    keep_freed_memory()
    rank = os.environ.get("RANK", "")  # set by torchrun
    name = Path(sys.argv[0]).name + (f": rank {rank}" if rank else "")
    try:
        main()
    except (UserError, OSError) as error:
        sys.exit(f"{name}: error: {error}")
    except KeyboardInterrupt as signum:
        command = shlex.join(arg for arg in sys.argv if arg != "--resume")
        print(
            f"\nstopped; finished epochs are kept: go on with python {command} --resume",
            file=sys.stderr,
        )
        sys.exit(143 if signum.args else 130)
    except RuntimeError as error:
        if isinstance(error, torch.cuda.OutOfMemoryError) or "allocate memory" in str(error):
            sys.exit(f"{name}: error: {out_of_memory(error)}")
        if isinstance(error, dist.DistBackendError) or "by peer" in str(error):
            reason = str(error).strip().splitlines()[0][:200]
            sys.exit(
                f"{name}: error: another process of this run has ended ({reason}); finished epochs"
                " are kept: go on with the same torchrun command and --resume"
            )
        raise


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


def read_class_names(path):
    """One name per line; empty lines do not count."""
    with explained(f"cannot read --class-names {path}"):
        names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        names = [name for name in names if name]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"{twice!r} is there twice")
    return names


def pick_device(name):
    """(device, whether bf16 is fast on it); auto: cuda, else mps, else cpu."""
    there = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    name = next(n for n in there if there[n]) if name == "auto" else name
    if not there[name]:
        raise UserError(f"there is no {name} device here: leave --device out, or use --device cpu")
    if name == "cuda":
        local = int(os.environ.get("LOCAL_RANK", 0))  # torchrun gives each process a GPU
        if local >= torch.cuda.device_count():
            raise UserError(f"{torch.cuda.device_count()} GPUs here: lower --nproc-per-node to it")
        torch.cuda.set_device(local)
        return torch.device(name, local), torch.cuda.get_device_capability() >= (8, 0)  # Ampere
    bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)  # not in torch 2.4
    return torch.device(name), name == "cpu" and bf16()


def keep_freed_memory():
    """Ask glibc not to hand large blocks back to the kernel as soon as they are freed: every step
    needs the same ones again, and would get them anew, page by page."""
    with contextlib.suppress(OSError, AttributeError):  # where there is no glibc
        for parameter in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            ctypes.CDLL("libc.so.6").mallopt(parameter, 2**31 - 1)


def set_determinism(wanted):
    """The same bits on every run on CUDA, too, or the fastest kernels that a trial finds."""
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS asks for
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not wanted


def compile_network(model):
    """torch.compile, in place. T and S may share their code, and each is called with and without
    gradients, in other modes and batch sizes: more kinds than the compiler keeps by default."""
    import torch._dynamo

    torch._dynamo.config.cache_size_limit = 64  # an older name of recompile_limit, known to both
    model.compile()


def bank_capacity(wanted, limit, channels, image_size, device):
    """How many images the bank is to hold: all `wanted`, but no more than --bank-size `limit`.

    Half of the machine's memory is the most it may take. Where that is too little for all, the
    bank is capped, with a word; a larger --bank-size than that raises UserError.
    """
    size = channels * image_size**2
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    elif hasattr(os, "sysconf"):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:  # Windows
        return min(wanted, limit or wanted)
    room, asked = memory // 2 // size, min(wanted, limit or wanted)
    if asked <= room:
        return asked
    text = f"{asked} images take {asked * size / 1e9:.1f} GB, and {room} fit into half the memory"
    if limit:
        raise UserError(f"--bank-size {limit} is too much: {text}")
    print(f"memory    {text}: the newest {room} are kept")
    return room


# ---- Several processes (torchrun) ---------------------------------------------------------------


def join_ranks(device):
    """(rank, number of ranks) of this process among those of torchrun; (0, 1) without it."""
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if ranks > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return (dist.get_rank(), ranks) if ranks > 1 else (0, 1)


def data_parallel(model, ranks):
    """The model in DistributedDataParallel: equal weights, and gradients averaged, on all ranks."""
    return nn.parallel.DistributedDataParallel(model) if ranks > 1 else model


def same_buffers(model, ranks):
    """BatchNorm statistics as on rank 0: each rank has seen other images."""
    if ranks > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def wait_for_all():
    if dist.is_initialized():
        dist.barrier()


# ---- Networks from elsewhere --------------------------------------------------------------------


def network_from_file(place):
    """The nn.Module that `file.py:function` returns: on the CPU, in float32, not wrapped.

    Runs that file. Raises UserError if it or the function is missing, fails, or returns none.
    """
    path, _, function = place.rpartition(":")
    with explained(f"no network from {place}"):
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no file {path}")
        spec = importlib.util.spec_from_file_location(Path(path).stem, path)
        module = importlib.util.module_from_spec(spec)
        sys.path.insert(0, str(Path(path).resolve().parent))  # for what lies beside it
        spec.loader.exec_module(module)
        model = getattr(module, function)()
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        if not isinstance(model, nn.Module):
            raise TypeError(f"{function}() returns a {type(model).__name__}, not an nn.Module")
        return model.cpu().float().requires_grad_(True)


@torch.no_grad()
def count_outputs(model, name, channels, image_size):
    """Number of classes, by one forward pass on two black images."""
    with explained(f"{name} does not take {channels} channels of {image_size}x{image_size} pixels"):
        logits = model.eval()(torch.zeros(2, channels, image_size, image_size))
        if not isinstance(logits, torch.Tensor) or logits.dim() != 2 or len(logits) != 2:
            shape = tuple(getattr(logits, "shape", ())) or type(logits).__name__
            raise ValueError(f"it gives {shape} for two images, not logits (2, classes)")
    return logits.shape[1]


def foreign_teacher(args):
    """The network of --teacher file.py:function in eval mode; the flags describe it in `.info`.

    What --dataset knows need not be said again; what nobody says is asked for (UserError).
    """
    size, channels, mean, std = IMAGES[args.dataset]
    info = dict(image_size=args.image_size or size, mean=args.mean or mean, std=args.std or std)
    missing = ["--" + key.replace("_", "-") for key, value in info.items() if not value]
    known = json.loads((Path(__file__).parent / "teachers" / "class_names.json").read_text())
    names = known.get(args.dataset)
    if args.class_names:
        names = read_class_names(args.class_names)
    if not names and args.label_input == "lte":
        missing += ["--class-names (or --label-input onehot, which does without names)"]
    if missing:
        raise UserError(f"{args.teacher} does not describe itself: add {', '.join(missing)}")
    teacher, shape = network_from_file(args.teacher).eval(), (len(info["mean"]), info["image_size"])
    names = names or [f"class {k}" for k in range(count_outputs(teacher, args.teacher, *shape))]
    teacher.info = info | dict(architecture=args.teacher, class_names=names, channels=shape[0])
    return teacher


# ---- Files that may be damaged: models, checkpoints ---------------------------------------------


def read_safetensors(path):
    """(tensors by name, metadata)"""
    with explained(f"{path} is not an intact safetensors file"):
        with safetensors.safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}


def fingerprint(info, state):
    """sha256 of a description and of tensors by name: to notice damage, and changes on --resume."""
    digest = hashlib.sha256(json.dumps(info, sort_keys=True).encode())
    for name in sorted(state):
        data = state[name].detach().cpu().contiguous().view(-1).view(torch.uint8)
        digest.update(name.encode() + data.numpy().tobytes())
    return digest.hexdigest()


def write_sealed(path, state):
    """torch.save, followed by the sha256 of it: what is cut or flipped later will be noticed."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    seal = hashlib.sha256(buffer.getbuffer()).digest()

    def write(file):
        with open(file, "wb") as handle:
            handle.write(buffer.getbuffer())
            handle.write(seal)

    write_atomically(path, write)


def read_sealed(path, device="cpu"):
    """What write_sealed wrote. UserError if it is missing or damaged; runs no code from it."""
    with explained(f"{path} is not an intact checkpoint of nayer.py"):
        data = path.read_bytes()
        if hashlib.sha256(data[:-32]).digest() != data[-32:]:
            raise ValueError("its checksum does not match")
        return torch.load(io.BytesIO(data[:-32]), map_location=device, weights_only=True)


def random_state(device):
    """Where the sequences of random numbers stand, of the CPU and of a GPU, for a checkpoint."""
    state = dict(rng=torch.get_rng_state())
    if device.type == "cuda":
        state["cuda_rng"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state, device):
    """Go on from where `random_state` was taken, also if that was on another kind of device."""
    torch.set_rng_state(state["rng"].cpu())
    if device.type == "cuda" and "cuda_rng" in state:
        torch.cuda.set_rng_state(state["cuda_rng"].cpu())


class Checkpoint:
    """What --resume goes on from: checkpoint.pt, and memory/, the bank's images, a file an epoch.

    Files move into place whole, checkpoint.pt last, so that a kill at any moment leaves either this
    epoch's state or the one before. Every rank writes its own; rank 0 begins when all have.
    """

    FORMAT = 3

    def __init__(self, out, settings, rank, device):
        self.out, self.settings, self.rank, self.device = out, settings, rank, device
        self.shards = []  # (epoch, images added to the bank before it)
        self.suffix = f"_rank{rank}" if rank else ""

    def shard(self, epoch):
        return self.out / "memory" / f"epoch_{epoch:03d}{self.suffix}.pt"

    def state_of_rank(self, epoch):
        return self.out / "memory" / f"state_{epoch:03d}{self.suffix}.pt"

    def open(self, resume, warmup_epochs):
        """The saved state, or None where a new run begins. UserError if it is of another run."""
        path = self.out / "checkpoint.pt"
        if path.exists() and not resume:
            raise UserError(f"{self.out} holds a run: go on with --resume, or choose another --out")
        with explained(f"cannot write to --out {self.out}"):
            self.out.mkdir(parents=True, exist_ok=True)
            (self.out / f"writable{self.suffix}.tmp").touch()
            wait_for_all()
            for leftover in self.out.glob("**/*.tmp") if self.rank == 0 else ():
                leftover.unlink()  # also of a run that was killed while writing
        if not path.exists():
            return None
        state = read_sealed(path, self.device)
        with explained(f"{path} is not a checkpoint of nayer.py"):
            if state["format"] != self.FORMAT:
                text = f"has format {state['format']}; this nayer.py reads format {self.FORMAT}"
                raise UserError(f"{path} {text}")
            self.compare(state["settings"], state["epoch"], warmup_epochs)
            if self.rank:
                state = read_sealed(self.state_of_rank(state["epoch"]), self.device)
            self.shards, self.epoch = state["shards"], state["epoch"]
            restore_random_state(state, self.device)
        return state

    def compare(self, old, epoch, warmup_epochs):
        """UserError that names each setting that differs and may not."""
        new = self.settings
        changed = {key for key in old.keys() | new.keys() if old.get(key) != new.get(key)}
        if "epochs" in changed and epoch < warmup_epochs:
            changed.remove("epochs")  # the learning rate's cosine has not begun
        if changed:
            lines = [f"{k} {old.get(k)} -> {new.get(k)}" for k in sorted(changed)]
            if "epochs" in changed:
                lines.append("the learning rate follows a cosine over --epochs, which has begun")
            path = self.out / "checkpoint.pt"
            raise UserError(f"{path} is of a run with other settings: {'; '.join(lines)}")

    def refill(self, memory):
        """Put the saved images back where they were. Returns the epoch to go on with."""
        for epoch, added in self.shards:
            memory.added = added
            memory.add(read_sealed(self.shard(epoch), self.device)["images"])
        return self.epoch + 1

    def save(self, epoch, state, images, memory):
        """`images`: those that this epoch added to `memory`."""
        write_sealed(self.shard(epoch), dict(images=images))
        oldest = memory.added - len(memory.images)
        ends = [added for _, added in self.shards[1:]] + [memory.added - len(images)]
        gone = [shard for shard, end in zip(self.shards, ends) if end <= oldest]
        self.shards = self.shards[len(gone) :] + [(epoch, memory.added - len(images))]
        state |= dict(format=self.FORMAT, settings=self.settings, epoch=epoch, shards=self.shards)
        state |= random_state(self.device)
        if self.rank:
            write_sealed(self.state_of_rank(epoch), state)
        wait_for_all()
        if self.rank == 0:
            write_sealed(self.out / "checkpoint.pt", state)
        wait_for_all()  # from here on the old files are of no use
        for old, _ in gone:
            self.shard(old).unlink(missing_ok=True)
        self.state_of_rank(epoch - 1).unlink(missing_ok=True)


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


def open_image(mode, path):
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.convert(mode)
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"unreadable image {path}: {error}") from error


def image_folder(folder, channels, image_size):
    """torchvision's ImageFolder (a folder per class) of uint8 images (channels, size, size).

    Other sizes are resized and cropped in the middle; grayscale and palette images are converted.
    Raises ValueError for an unreadable image, FileNotFoundError for a missing or empty folder.
    """
    from torchvision import datasets
    from torchvision.transforms import v2

    fit = v2.Compose([v2.Resize(image_size), v2.CenterCrop(image_size), v2.PILToTensor()])
    read = partial(open_image, "L" if channels == 1 else "RGB")
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
        text = f"{place} is missing or damaged, and there is no download: unpack it there"
        raise FileNotFoundError(text) from error


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


class Stream:
    """Batches (images uint8, labels) of a data set that is read anew for each pass over it.

    Raises UserError for an unreadable image.
    """

    def __init__(self, pairs, batch, shuffle=False):
        how = dict(shuffle=shuffle, num_workers=min(8, os.cpu_count() or 1))
        self.loader = torch.utils.data.DataLoader(pairs, batch, **how)

    def __iter__(self):
        try:
            yield from self.loader
        except ValueError as error:  # a worker's, with its traceback; the last line says why
            line = str(error).strip().splitlines()[-1]
            raise UserError(line.removeprefix("ValueError: ")) from error


def test_batches(dataset, root, class_names, channels, image_size, device):
    """Batches (images uint8, labels): decoded once onto the device; large images are streamed."""
    pairs = test_images(dataset, root, class_names, channels, image_size)
    if image_size > SMALL:
        return Stream(pairs, 100)
    images, labels = stack(pairs)
    return list(zip(images.to(device).split(500), labels.to(device).split(500)))


# ---- Pictures and the log -----------------------------------------------------------------------


def shown_classes(class_names, most=20):
    """Numbers of at most 20 classes, evenly spaced, to draw."""
    return torch.linspace(0, len(class_names) - 1, min(most, len(class_names))).long().tolist()


def paste(grid, image, x, y):
    """One image uint8 (ch, H, W), at least 64 pixels wide, its pixels as squares."""
    from PIL import Image

    picture = Image.fromarray(image.permute(1, 2, 0).squeeze(2).cpu().numpy())
    cell = max(64, image.shape[-1])
    grid.paste(picture.resize((cell, cell), Image.Resampling.NEAREST), (x, y))


def draw_samples(file, images, labels, class_names, rows=8):
    """A grid of images uint8 (B, ch, H, W): a column per class (at most 20), its name on top."""
    from PIL import Image, ImageDraw

    shown, cell = shown_classes(class_names), max(64, images.shape[-1])
    grid = Image.new("RGB", (len(shown) * (cell + 2), 14 + rows * (cell + 2)), "white")
    for column, label in enumerate(shown):
        x = column * (cell + 2)
        ImageDraw.Draw(grid).text((x, 1), class_names[label][: cell // 6], fill="black")
        for row, image in enumerate(images[labels == label][:rows]):
            paste(grid, image, x, 14 + row * (cell + 2))
    grid.save(file, "png")


def draw_strips(file, strips, class_names, most=8):
    """Samples over training: a row per epoch (at most 8 of them), a column per class.

    strips: (epoch, images uint8 (n, ch, H, W), for each column whether the epoch has an image).
    """
    from PIL import Image, ImageDraw

    picked = torch.linspace(0, len(strips) - 1, min(most, len(strips))).round().long().tolist()
    cell = max(64, strips[0][1].shape[-1])
    shown = shown_classes(class_names)
    size = (58 + len(shown) * (cell + 2), 14 + len(picked) * (cell + 2))
    grid = Image.new("RGB", size, "white")
    for column, label in enumerate(shown):
        place = (58 + column * (cell + 2), 1)
        ImageDraw.Draw(grid).text(place, class_names[label][: cell // 6], fill="black")
    for row, index in enumerate(picked):
        epoch, images, present = strips[index]
        y, images = 14 + row * (cell + 2), iter(images)
        ImageDraw.Draw(grid).text((2, y + cell // 2), f"epoch {epoch}", fill="black")
        for column, there in enumerate(present):
            if there:
                paste(grid, next(images), 58 + column * (cell + 2), y)
    grid.save(file, "png")


def draw_curve(file, log, teacher_accuracy):
    """Against seconds: test accuracy, with the teacher's as a line; the unweighted losses."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2)
    curves = dict(accuracy="student", agree="agreement with the teacher on new images")
    curves |= dict(loss_ce="CE", loss_bn="BN", loss_adv="|adv|", loss_kd="KD")
    for column, label in curves.items():
        points = [(row["seconds"], abs(row[column])) for row in log if row[column]]
        if points:
            axes = left if column in ("accuracy", "agree") else right
            axes.plot(*zip(*points), ".-", label=label, alpha=0.4 if column == "agree" else 1)
    if teacher_accuracy is not None:
        left.axhline(teacher_accuracy, color="gray", linestyle="--", label="teacher")
    left.set(xlabel="seconds", ylabel="test accuracy", title="Student against teacher")
    right.set(xlabel="seconds", yscale="log", title="Losses, unweighted")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    figure.savefig(file, dpi=100, format="png")


def draw_similarities(file, embeddings, class_names):
    """Cosine similarity of the LTEs (C, D), before and after the BatchNorm that Z begins with."""
    from matplotlib.figure import Figure

    normalised = F.batch_norm(embeddings, None, None, training=True)
    figure = Figure(figsize=(10, 5.4), layout="constrained", facecolor="white")
    titles = ("Label-text embeddings", "After the BatchNorm of the noisy layer")
    for axes, rows, title in zip(figure.subplots(1, 2), (embeddings, normalised), titles):
        rows = F.normalize(rows.float().cpu())
        cosine, C = rows @ rows.T, len(rows)
        picture = axes.imshow(cosine.numpy(), vmin=-1, vmax=1, cmap="RdBu_r")
        others = (cosine.sum() - C) / max(1, C * (C - 1))
        axes.set_title(f"{title}\n(mean between classes: {others:.2f})", fontsize=11)
        if C <= 40:
            axes.set_xticks(range(C), class_names, rotation=90, fontsize=8)
            axes.set_yticks(range(C), class_names, fontsize=8)
    figure.colorbar(picture, ax=figure.axes, label="cosine similarity", shrink=0.8)
    figure.savefig(file, dpi=100, format="png")


@torch.no_grad()
def class_diversity(teacher, images, labels, augment, autocast):
    """How much the images of one class differ: mean distance between two of them, or None.

    images uint8 (B, ch, H, W), labels (B,). The distance is Euclidean, between the inputs of the
    teacher's last linear layer (its logits where it has none); the mean is over all pairs of images
    with the same label [ours].
    """
    linear = [layer for layer in teacher.modules() if isinstance(layer, nn.Linear)]
    seen, read = [], lambda _, inputs: seen.append(inputs[0])
    hooks = [layer.register_forward_pre_hook(read) for layer in linear[-1:]]
    try:
        with autocast:
            seen.append(teacher(augment.normalize(images.float() / 255)))
    finally:
        for hook in hooks:
            hook.remove()
    features = seen[0].float().flatten(1)
    pairs = (labels[:, None] == labels).triu(1)
    return torch.cdist(features, features)[pairs].mean().item() if pairs.any() else None


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
    are unweighted; those of an epoch are the means over the last steps of its batches. With several
    ranks, rank 0 alone prints and writes: losses and steps are its own, counts are those of all.
    """

    LINE = "{:>5} {:>7} {:>8} {:>8} {:>8} {:>8} {:>7} {:>8} {:>8} {:>8} {:>6}"
    COLUMNS = "epoch images CE BN adv KD agree accuracy best seconds left".split()

    def __init__(self, args, device, rank, ranks):
        self.args, self.out, self.device, self.ranks = args, args.out, device, ranks
        self.silent = rank > 0
        self.rows, self.steps, self.strips, self.clock = [], [], [], time.perf_counter()

    def say(self, text):
        if not self.silent:
            print(text, flush=True)

    def header(self, class_names, image_size, teacher_accuracy, embeddings):
        """What is distilled into what, where, with which versions; the heads of the columns."""
        args, count = self.args, len(class_names)
        known = "not known" if teacher_accuracy is None else percent(teacher_accuracy)
        score = known + ("" if args.eval or teacher_accuracy is None else ", by its file")
        precision = "bf16" if args.amp else "fp32"
        versions = f"python {platform.python_version()}, torch {torch.__version__}"
        ranks = f", {self.ranks} ranks" if self.ranks > 1 else ""
        self.say(f"data set  {args.dataset}: {count} classes, {image_size} pixels")
        self.say(f"networks  {args.teacher} (accuracy {score}) -> {args.student}")
        self.say(f"machine   {self.device}{ranks}, {precision}, {versions}, seed {args.seed}\n")
        self.say(self.LINE.format(*self.COLUMNS))
        picture = self.out / "label_embeddings.png"
        if args.label_input == "lte" and not self.silent and not picture.exists():
            write_atomically(picture, lambda f: draw_similarities(f, embeddings, class_names))

    def begin(self, epoch, steps):
        """An epoch begins: its progress bar (none in a pipe), its clock."""
        self.epoch, self.losses = epoch, []
        self.row = dict.fromkeys(("synthesis", "distillation", "evaluation"), 0.0)
        hide = True if self.silent else None
        self.bar = tqdm(total=steps, desc=f"epoch {epoch}", leave=False, disable=hide)
        self.tick, self.lap_start = self.bar.update, time.perf_counter()

    def lap(self, kind):
        """The time since begin() or the last lap went into `kind`."""
        now = time.perf_counter()
        self.row[kind] += now - self.lap_start
        self.lap_start = now

    def add_batch(self, batch, losses):
        """losses (steps, 4): L_CE, L_BN, L_adv, weighted sum. UserError if not finite."""
        for step, values in enumerate(losses.tolist()):
            names = dict(zip(("loss_ce", "loss_bn", "loss_adv", "loss"), values))
            check_finite(f"epoch {self.epoch}, batch {batch}, step {step}", **names)
            self.steps.append(dict(epoch=self.epoch, batch=batch, step=step) | names)

    def add_distillation(self, losses):
        """losses (steps,): L_KD. UserError if not finite."""
        self.losses = losses.tolist()
        for step, value in enumerate(self.losses):
            check_finite(f"epoch {self.epoch}, student step {step}", loss_kd=value)

    def add_epoch(self, memory, images, agree, accuracy, diversity):
        """Make the row of the epoch and print it. images: those it added to `memory`."""
        self.bar.close()
        args, epoch, spent = self.args, self.epoch, self.row
        mine = [step for step in self.steps if step["epoch"] == epoch]
        ends = {step["batch"]: step for step in mine}.values()
        row = dict(epoch=epoch, images=len(memory) * self.ranks)
        for name in ("loss_ce", "loss_bn", "loss_adv"):
            row[name] = sum(step[name] for step in ends) / len(ends)
        loss_kd = sum(self.losses) / len(self.losses) if self.losses else None
        scores = [r["accuracy"] for r in self.rows if r["accuracy"] is not None]
        best = None if accuracy is None else max([accuracy, *scores])
        row |= dict(loss_kd=loss_kd, agree=agree, accuracy=accuracy, best=best, diversity=diversity)
        before, now = self.rows[-1]["seconds"] if self.rows else 0.0, time.perf_counter()
        row |= dict(seconds=before + now - self.clock)
        row |= {f"seconds_{kind}": seconds for kind, seconds in spent.items()}
        made = len(images) * args.generator_steps * self.ranks
        row["generator_images_per_second"] = made / spent["synthesis"]
        learned = len(self.losses) * args.student_batch
        row["student_images_per_second"] = learned / spent["distillation"] if learned else None
        row["peak_memory_mb"], self.clock = peak_memory_mb(self.device), now
        self.rows.append(row)
        left = (args.warmup_epochs + args.epochs - 1 - epoch) * (row["seconds"] - before)
        cells = [f"{row[name]:.4f}" for name in ("loss_ce", "loss_bn", "loss_adv")]
        cells += ["-" if loss_kd is None else f"{loss_kd:.4f}"]
        cells += ["-" if agree is None else f"{agree:.1%}", percent(accuracy), percent(best)]
        cells += [f"{row['seconds']:.1f}", "-" if loss_kd is None else f"{left:.0f}"]
        self.say(self.LINE.format(epoch, row["images"], *cells))

    def draw(self, images, labels, class_names):
        """Both tables; the grid of the epoch's last batch; one image a class to show at the end."""
        first = [(labels == k).nonzero()[:1, 0] for k in shown_classes(class_names)]
        self.strips.append((self.epoch, images[torch.cat(first)].cpu(), [len(k) for k in first]))
        if self.silent:
            return
        picture = self.out / "samples" / f"epoch_{self.epoch:03d}.png"
        write_atomically(picture, lambda file: draw_samples(file, images, labels, class_names))
        write_atomically(self.out / "log.csv", lambda file: write_csv(file, self.rows))
        write_atomically(self.out / "generator.csv", lambda file: write_csv(file, self.steps))

    def finish(self, teacher_accuracy, class_names):
        """summary.json, the last pictures and lines on the console. Returns the summary."""
        args, rows, last = self.args, self.rows, self.rows[-1]
        kinds = ("synthesis", "distillation", "evaluation")
        spent = {kind: sum(row[f"seconds_{kind}"] for row in rows) for kind in kinds}
        learned = sum(row["loss_kd"] is not None for row in rows)
        generator_steps, student_steps = len(self.steps), learned * args.student_steps
        batches = args.warmup_epochs * args.warmup_batches + args.epochs * args.batches
        made = batches * args.generator_steps * args.synthesis_batch
        synthesis, distillation = spent["synthesis"], spent["distillation"]
        summary = dict(
            dataset=args.dataset,
            teacher=args.teacher,
            student=args.student,
            device=str(self.device),
            ranks=self.ranks,
            seed=args.seed,
            amp=args.amp,
            teacher_accuracy=teacher_accuracy,
            student_accuracy=last["accuracy"],
            best_accuracy=last["best"],
            agree=last["agree"],
            diversity=last["diversity"],
            epochs=len(rows),
            images_synthesized=batches * args.synthesis_batch,
            generator_steps=generator_steps,
            student_steps=student_steps,
            seconds_total=last["seconds"],
            **{f"seconds_{kind}": seconds for kind, seconds in spent.items()},
            seconds_per_generator_step=synthesis / generator_steps,
            seconds_per_student_step=distillation / student_steps,
            generator_images_per_second=made / synthesis,
            student_images_per_second=student_steps * args.student_batch / distillation,
            peak_memory_mb=last["peak_memory_mb"],
            versions=dict(python=platform.python_version(), torch=torch.__version__)
            | {name: version(name) for name in ("torchvision", "safetensors")},
        )
        if self.silent:
            return summary
        text = json.dumps(summary, indent=2) + "\n"
        write_atomically(self.out / "summary.json", lambda file: file.write_text(text))
        write_atomically(
            self.out / "curve.png", lambda file: draw_curve(file, rows, teacher_accuracy)
        )
        write_atomically(
            self.out / "training.png", lambda file: draw_strips(file, self.strips, class_names)
        )
        score, best, teacher = map(percent, (last["accuracy"], last["best"], teacher_accuracy))
        agree = percent(last["agree"])
        self.say(f"\nstudent   last {score}, best {best}, teacher {teacher}, agreement {agree}")
        split = ", ".join(f"{kind} {seconds:.1f}" for kind, seconds in spent.items())
        self.say(f"seconds   {last['seconds']:.1f} in all: {split}")
        self.say(f"files     {self.out}/: student.safetensors log.csv summary.json *.png samples/")
        return summary

    def state_dict(self):
        return dict(rows=self.rows, steps=self.steps, strips=self.strips)

    def load_state_dict(self, state):
        self.rows, self.steps, self.strips = state["rows"], state["steps"], state["strips"]
