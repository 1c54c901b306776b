r"""Train a teacher on real images and write it as one self-describing model file.

    python teachers/train.py --dataset digits --model wrn10_2 --out digits.safetensors
    python teachers/train.py --dataset cifar10 --model resnet34
    python teachers/train.py --dataset cifar10 --model wrn40_2 --epochs 30 --out first.safetensors
    python teachers/train.py --dataset cifar10 --model wrn40_2 --epochs 12 \
        --init first.safetensors --out second.safetensors
    python teachers/train.py --embed-labels openai/clip-vit-base-patch32 --out labels.safetensors

Without --epochs: the recipe of the paper's teachers (200 epochs of SGD from 0.1, cosine, batch 256,
weight decay 5e-4). With --epochs N: a one-cycle recipe that is strong when short (peak 0.25,
Nesterov; the images grow from 5/8 of their size to all of it during the first 60 % of the epochs,
which saves a quarter of the time). With --init FILE as well: a further cycle from the weights in
that model file (peak 0.1, images in full size from the start).

No file is overwritten. A training that was stopped goes on with the same command and --resume; when
it has ended, --resume says so and does nothing.

The last line trains nothing. It embeds the names in class_names.json with each data set's prompt.
nayer.py looks up such embeddings in teachers/label_embeddings.safetensors.

Images of up to 64 pixels are decoded once and kept on the device, larger ones are streamed. Nothing
else in the project reads a training image.
"""

import argparse
import copy
import json
import math
import random
import shlex
import sys
import time
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.utils.data import DataLoader, Subset
from torchvision import datasets
from torchvision.transforms import v2

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import nayer  # noqa: E402

PUBLISHED_EPOCHS = 200
FREE = "out resume device data_root trained_on embed_labels encoder".split()  # change no number


# ---- Flags ---------------------------------------------------------------------------------------
def parse_args(argv=None):
    """The command line -> a Namespace. A wrong one ends with one line on stderr and exit code 2."""
    parser = argparse.ArgumentParser(
        "train.py",
        usage="train.py [flags]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def refuse(message):
        parser.exit(2, f"train.py: error: {message}\n")

    parser.error = refuse

    def add(flag, text, **more):
        if "default:" not in text:
            text += " (default: %(default)s)"
        parser.add_argument(flag, help=text, **more)

    count = nayer.number(int, 1, 1e9)
    pixel = nayer.number(float, 0, 1)
    add("--dataset", "images to train on", default="digits", choices=nayer.IMAGES)
    add("--data-root", "a folder has train/ and test/ in it", default=Path("data"), type=Path)
    add("--model", "a name that nayer.build_model knows", default="wrn10_2")
    add("--out", "model file (default: teachers/<dataset>_<model>.safetensors)", type=Path)
    add("--epochs", "of a one-cycle run (default: the published recipe, 200)", type=count)
    add("--init", "model file to go on from, for a further cycle of --epochs N", type=Path)
    add("--batch", "images in a step", default=256, type=nayer.number(int, 2, 1e9))
    add("--image-size", "pixels (default: known, but of a folder)", type=nayer.number(int, 8, 512))
    add("--channels", "(default: known, 3 of a folder)", type=int, choices=[1, 3])
    add("--mean", "a number per channel (default: known, or measured)", type=pixel, nargs="+")
    add("--std", "(default: likewise)", type=nayer.number(float, 1e-6, 1), nargs="+")
    add("--trained-on", "words about the images for the file (default: the data set's name)")
    add("--seed", "of all random numbers", default=0, type=nayer.number(int, 0, 1e18))
    add(
        "--device", "auto: cuda if it is there", default="auto", choices="auto cpu cuda mps".split()
    )
    add("--resume", "go on after the last finished epoch", action="store_true")
    add("--embed-labels", "train nothing: a text encoder, Hugging Face name or local folder")
    add("--as", "for --embed-labels: name to write (default: its own)", dest="encoder")
    args = parser.parse_args(argv)
    known = nayer.parse_args(nayer.IMAGES[args.dataset].split())
    fill_in(args, known)
    problem = what_is_wrong(args, known)
    if problem:
        parser.error(problem)
    return args


def fill_in(args, known):
    """What no flag says follows from the data set; of a folder nothing is known."""
    args.image_size = args.image_size or known.image_size
    args.mean = args.mean or known.mean
    args.std = args.std or known.std
    if args.channels is None:
        args.channels = len(known.mean) if known.mean else 3
    if args.out is None and args.embed_labels:
        args.out = HERE / "label_embeddings.safetensors"
    if args.out is None:
        args.out = HERE / f"{args.dataset}_{args.model}.safetensors"


def what_is_wrong(args, known):
    """One line, or None."""
    if args.out.suffix != ".safetensors":
        return f"--out {args.out}: nayer.py reads a name that ends with .safetensors"
    if args.embed_labels:
        return None
    if args.encoder:
        return "--as is for --embed-labels"
    if ".py:" in args.model:
        return "--model takes a name that nayer.py knows: a model file has no code in it"
    if args.init and not args.epochs:
        return "--init needs --epochs N: it is a further short cycle"
    if args.image_size is None:
        return "--dataset folder needs --image-size"
    if known.image_size and args.image_size != known.image_size:
        return f"--image-size is for --dataset folder: {args.dataset} has {known.image_size}"
    if known.mean and args.channels != len(known.mean):
        return f"--channels is for --dataset folder: {args.dataset} has {len(known.mean)}"
    for flag in ("mean", "std"):
        values = getattr(args, flag)
        if values and len(values) != args.channels:
            return f"--{flag} takes one number per channel: {args.channels}"
    return None


# ---- Training images -----------------------------------------------------------------------------
def training_digits(size):
    """scikit-learn's digits but the 500 that are held out: 1,297 (image uint8, label) pairs."""
    pixels, labels = load_digits(return_X_y=True)  # (1797, 64), values 0 to 16
    pixels, _, labels, _ = train_test_split(
        pixels, labels, test_size=500, stratify=labels, random_state=0
    )
    images = torch.tensor(pixels).float().view(-1, 1, 8, 8) * (255 / 16)
    images = F.interpolate(images, size=size, mode="bilinear").round().byte()
    return list(zip(images, labels.tolist()))


def training_tiny_imagenet(root, names, channels, size):
    """The official archive, unpacked in root. Its classes, whose names are given, are in the order
    of their folders.

    Its validation images lie in one folder, beside a table of their classes. They move to where
    nayer.py looks for images to score on: root/test, a folder per class, with the class's name."""
    archive = root / "tiny-imagenet-200"
    pairs = nayer.image_folder(archive / "train", channels, size)
    name_of = dict(zip(pairs.classes, names))
    for line in (archive / "val/val_annotations.txt").read_text().splitlines():
        image, folder = line.split()[:2]
        before = archive / "val/images" / image
        after = root / "test" / name_of[folder] / image
        if before.exists():
            after.parent.mkdir(parents=True, exist_ok=True)
            before.rename(after)
    return pairs


def training_folder(root, channels, size):
    """A folder per class in train/, and the same classes in test/. Folders without an image, such
    as hidden ones, are none."""
    train = nayer.image_folder(root / "train", channels, size)
    test = nayer.image_folder(root / "test", channels, size)
    names = classes_of(train)
    lonely = names ^ classes_of(test)
    text = f"train/ and test/ must hold images of the same classes, but not so {sorted(lonely)}"
    nayer.check(names and not lonely, text)
    kept = sorted(names)
    train = nayer.label_by_name(train, kept)
    train.classes = kept
    return train


def classes_of(data):
    """The names of the folders with an image in them, a set."""
    return {nayer.plain(data.classes[k]) for _, k in data.samples}


def training_images(args):
    """((image uint8 (ch, H, W), label) pairs to train on, class names)."""
    root = args.data_root
    names = json.loads((HERE / "class_names.json").read_text()).get(args.dataset)
    with nayer.explained(f"cannot read {args.dataset} in {root}"):
        if args.dataset == "digits":
            pairs = training_digits(args.image_size)
        elif args.dataset in ("cifar10", "cifar100"):
            kind = getattr(datasets, args.dataset.upper())
            pairs = kind(root, train=True, download=True, transform=v2.PILToTensor())
        elif args.dataset == "tiny_imagenet":
            pairs = training_tiny_imagenet(root, names, args.channels, args.image_size)
        else:
            pairs = training_folder(root, args.channels, args.image_size)
    return pairs, names or pairs.classes


def stack(pairs):
    """A small data set decoded at once: images uint8 (N, ch, H, W), labels (N,)."""
    images, labels = zip(*DataLoader(pairs, 500))
    return torch.cat(images), torch.cat(labels)


def keep_or_stream(pairs, args, device):
    """(images, labels) on the device; large images stay pairs, which are read for each pass."""
    if args.image_size > nayer.SMALL:
        return pairs
    images, labels = stack(pairs)
    return images.to(device), labels.to(device)


def epoch_batches(data, batch):
    """An epoch's batches (images uint8, labels) in a new order. data: see keep_or_stream."""
    if isinstance(data, tuple):
        images, labels = data
        for rows in torch.randperm(len(images), device=images.device).split(batch):
            yield images[rows], labels[rows]
    else:
        yield from DataLoader(data, batch, shuffle=True)


def channel_statistics(data):
    """(mean, std) per channel of images in [0, 1]; of streamed ones, 2,000 will do."""
    if isinstance(data, tuple):
        images, _ = data
    else:
        few = torch.randperm(len(data))[:2000].tolist()
        images, _ = stack(Subset(data, few))
    scaled = images.float() / 255
    return scaled.mean((0, 2, 3)).tolist(), scaled.std((0, 2, 3)).tolist()


# ---- Label embeddings ----------------------------------------------------------------------------
def embed_labels(args):
    """Write the embeddings that nayer.label_text_embeddings looks up first: an entry per data set,
    and what it was made of. All are computed, even those that the shipped file has."""
    nayer.check(not args.out.exists(), f"{args.out} exists: choose another --out")
    entries = {}
    about = {}
    for dataset, names in json.loads((HERE / "class_names.json").read_text()).items():
        prompt = nayer.parse_args(["--dataset", dataset]).prompt
        with patch.object(nayer, "SHIPPED", HERE / "nowhere"):  # nothing is looked up
            rows = nayer.label_text_embeddings(names, args.embed_labels, prompt)
        entries[dataset] = rows.half()
        about[dataset] = json.dumps([args.encoder or args.embed_labels, prompt, names])
        print(f"{dataset}: {tuple(rows.shape)}, {prompt!r}")
    with nayer.replaced(args.out) as temporary:
        save_file(entries, temporary, about)


# ---- Training ------------------------------------------------------------------------------------
def learning_rate(progress, args):
    """At `progress` in [0, 1) of the training."""
    if args.epochs is None:
        return 0.1 * (1 + math.cos(math.pi * progress)) / 2
    peak = 0.1 if args.init else 0.25
    if progress < 0.2:
        return peak * (0.1 + 0.9 * progress / 0.2)
    return peak * (1 + math.cos(math.pi * (progress - 0.2) / 0.8)) / 2


def side_in_epoch(epoch, epochs, args):
    """Pixels: in a first short cycle 5/8 of the size, then 6/8, 7/8, and from 60 % on all of it.
    Always all of it for a network that takes no other size."""
    if args.epochs is None or args.init or args.fixed_size:
        return args.image_size
    eighths = min(8, 5 + 5 * epoch // epochs)
    return args.image_size * eighths // 8


def train_epoch(model, optimizer, data, steps, augment, args, epoch, epochs):
    """One pass over `data`, in so many steps. Returns the mean loss."""
    model.train()
    device = augment.mean.device
    side = side_in_epoch(epoch, epochs, args)
    total = torch.zeros((), device=device)
    for step, (images, labels) in zip(range(steps), epoch_batches(data, args.batch)):
        progress = (epoch + step / steps) / epochs
        optimizer.param_groups[0]["lr"] = learning_rate(progress, args)
        views = augment(images.to(device).float() / 255)
        if side != args.image_size:
            views = F.interpolate(views, size=side, mode="bilinear", antialias=True)
        logits = model(views.contiguous(memory_format=torch.channels_last))
        loss = F.cross_entropy(logits.float(), labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.detach()
    return (total / steps).item()


def build_model(args, num_classes, before, device, bf16):
    """The network to train, with random weights or with those of `before`, an earlier cycle.

    UserError if it does not give logits for these images in both modes, as nayer.py needs it."""
    model = nayer.load_student(args.model, num_classes, args.channels, args.image_size)
    try_out(model, args)
    if before is not None:
        with nayer.explained(f"{args.init} is not a {args.model} for these images and classes"):
            model.load_state_dict(before.state_dict())
    model = model.to(device, memory_format=torch.channels_last)
    model.forward = partial(nayer.answer, model.forward, device.type, bf16)
    return model


def try_out(model, args):
    """UserError if the network does not take the images in both modes. Notes in the flags whether
    it takes smaller ones, too."""
    before = copy.deepcopy(model.state_dict())  # train mode moves BatchNorm's statistics
    forward = model.forward
    model.forward = partial(nayer.answer, forward, "cpu", False)
    smallest = args.image_size * 5 // 8
    for mode in (False, True):
        model.train(mode)
        nayer.trial(model, args.model, noise(args, args.image_size))
    args.fixed_size = False
    try:
        nayer.trial(model, args.model, noise(args, smallest))
    except nayer.UserError:
        args.fixed_size = True
    model.forward = forward
    model.load_state_dict(before)


def noise(args, size):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(2, args.channels, size, size, generator=generator).requires_grad_()


def settings_of(args, num_images):
    """What decides the numbers of a training."""
    settings = {key: str(value) for key, value in vars(args).items() if key not in FREE}
    settings["images"] = str(num_images)
    return settings


def resume(checkpoint, settings, model, optimizer, device):
    """Go back to the checkpoint. Returns the epoch that comes next."""
    with nayer.explained(f"{checkpoint} is not an intact checkpoint of this training"):
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        changed = []
        for key, value in settings.items():
            old = saved["settings"].get(key)
            if old != value:
                changed.append(f"{key} {old} -> {value}")
        text = f"{checkpoint} is of a training with other settings: {'; '.join(changed)}"
        nayer.check(not changed, text)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        return saved["epoch"] + 1


def train(args, model, data, num_images, test, augment):
    """All epochs, each with a line on the console and a checkpoint, which is left behind."""
    epochs = args.epochs or PUBLISHED_EPOCHS
    steps = max(1, num_images // args.batch)
    device = augment.mean.device
    nesterov = args.epochs is not None
    optimizer = torch.optim.SGD(
        model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4, nesterov=nesterov
    )
    checkpoint = checkpoint_path(args)
    settings = settings_of(args, num_images)
    first = 0
    if args.resume and checkpoint.exists():
        first = resume(checkpoint, settings, model, optimizer, device)
    print(f"{args.model} on {args.dataset}: {num_images} images, {device}, {epochs} epochs")
    for epoch in range(first, epochs):
        start = time.perf_counter()
        torch.manual_seed(random.Random(f"{args.seed} {epoch}").getrandbits(63))
        loss = train_epoch(model, optimizer, data, steps, augment, args, epoch, epochs)
        score = nayer.accuracy(model, test, augment)
        side = side_in_epoch(epoch, epochs, args)
        seconds = time.perf_counter() - start
        line = f"epoch {epoch + 1:3d}  {side:3d} px  loss {loss:.4f}  test {score:7.2%}"
        print(f"{line}  {seconds:6.1f} s", flush=True)
        state = dict(
            model=model.state_dict(),
            optimizer=optimizer.state_dict(),
            epoch=epoch,
            settings=settings,
        )
        nayer.save_tensors(checkpoint, state)


def checkpoint_path(args):
    return args.out.with_suffix(".checkpoint.pt")


def is_finished(args):
    """Whether --resume finds the teacher trained. UserError if something would be overwritten."""
    if not args.out.exists():
        checkpoint = checkpoint_path(args)
        fresh = args.resume or not checkpoint.exists()
        text = f"{checkpoint} is of an unfinished training: add --resume, or choose another --out"
        nayer.check(fresh, text)
        return False
    nayer.check(args.resume, f"{args.out} exists: choose another --out")
    info = nayer.load_model(args.out).info
    model = info["architecture"]
    nayer.check(model == args.model, f"{args.out} is a {model}: choose another --out")
    print(f"{args.out} is trained: test accuracy {info['accuracy']:.2%}")
    return True


def write_teacher(args, command, model, class_names, test, augment):
    """The model file, which describes itself. Weights are stored in fp16; so those are scored."""
    model = model.half().float()
    score = nayer.accuracy(model, test, augment)
    info = dict(
        architecture=args.model,
        class_names=class_names,
        channels=args.channels,
        image_size=args.image_size,
        mean=args.mean,
        std=args.std,
        accuracy=score,
        trained_on=args.trained_on or args.dataset,
        command=command,
    )
    nayer.save_model(args.out, model.half(), info)
    print(f"{args.out}: test accuracy {score:.2%}")


def main(argv=None):
    args = parse_args(argv)
    if args.embed_labels:
        embed_labels(args)
        return
    if is_finished(args):
        return
    torch.manual_seed(args.seed)
    device, bf16 = nayer.pick_device(args.device)
    before = None
    if args.init:  # its images were normalised in some way: go on with that
        before = nayer.load_model(args.init)
        args.mean = args.mean or before.info["mean"]
        args.std = args.std or before.info["std"]

    pairs, class_names = training_images(args)
    with nayer.explained(f"cannot read {args.dataset} in {args.data_root}"):
        test = nayer.test_batches(
            args.dataset, args.data_root, class_names, args.channels, args.image_size, device
        )
        data = keep_or_stream(pairs, args, device)
        if args.mean is None or args.std is None:
            mean, std = channel_statistics(data)
            args.mean = args.mean or mean
            args.std = args.std or std
    preset = nayer.parse_args(["--dataset", args.dataset])
    augment = nayer.Augment(args.mean, args.std, preset.crop_padding, preset.flip, device)

    model = build_model(args, len(class_names), before, device, bf16)
    train(args, model, data, len(pairs), test, augment)
    command = "python teachers/train.py " + shlex.join(argv or sys.argv[1:])
    write_teacher(args, command, model, class_names, test, augment)
    checkpoint_path(args).unlink(missing_ok=True)


if __name__ == "__main__":
    nayer.run_script(main)
