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

Images of up to 64 pixels are decoded once and kept on the device, larger ones are read in every
epoch.
"""

import argparse
import copy
import json
import math
import random
import shlex
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Subset
from torchvision import datasets
from torchvision.transforms import v2

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import nayer  # noqa: E402

# How the images of a data set look: pixels, and mean and standard deviation of each channel in
# [0, 1]. Of a folder, --image-size gives the first, and the others are measured.
IMAGES = dict(
    digits=dict(image_size=12, mean=[0.3052], std=[0.3222]),
    cifar10=dict(image_size=32, mean=[0.4914, 0.4822, 0.4465], std=[0.2023, 0.1994, 0.2010]),
    cifar100=dict(image_size=32, mean=[0.5071, 0.4867, 0.4408], std=[0.2675, 0.2565, 0.2761]),
    tiny_imagenet=dict(image_size=64, mean=[0.5, 0.5, 0.5], std=[0.5, 0.5, 0.5]),
    folder=dict(image_size=None, mean=None, std=None),
)
# Class names in the order of the labels. Of Tiny-ImageNet, {folder: name}.
NAMES = json.loads((HERE / "class_names.json").read_text(encoding="utf-8"))
MAY_CHANGE = ["out", "resume", "device", "data_root", "trained_on"]  # in a training that goes on


# ---- Flags ---------------------------------------------------------------------------------------
def parse_args(argv=None):
    """The command line -> a Namespace. A wrong one ends with one line on stderr and exit code 2."""
    parser = argparse.ArgumentParser(
        "train.py",
        usage=argparse.SUPPRESS,  # so that an error is one line
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )

    def flag(name, text, **more):
        if more.get("default") is not None:
            text += " (default: %(default)s)"
        parser.add_argument(name, help=text, **more)

    flag("--dataset", "images to train on", default="digits", choices=IMAGES)
    flag("--data-root", "a folder has train/ and test/ in it", default=Path("data"), type=Path)
    flag("--model", "a name that nayer.build_model knows", default="wrn10_2")
    flag("--out", "model file (default: teachers/<dataset>_<model>.safetensors)", type=Path)
    flag("--epochs", "of a one-cycle recipe", type=nayer.number(int, 1))
    flag("--init", "model file to go on from, for a further cycle of --epochs N", type=Path)
    flag("--batch", "images in a step", default=256, type=nayer.number(int, 2))
    flag("--image-size", "pixels, of --dataset folder alone", type=nayer.number(int, 8, 512))
    flag("--channels", "of --dataset folder alone (default: 3)", type=int, choices=[1, 3])
    flag("--mean", "a number per channel", type=nayer.number(float, 0, 1), nargs="+")
    flag("--std", "a number per channel", type=nayer.number(float, 1e-6, 1), nargs="+")
    flag("--flip", "mirror half of the images", action=argparse.BooleanOptionalAction)
    flag("--trained-on", "words about the images for the file (default: the data set's name)")
    flag("--seed", "of all random numbers", default=0, type=nayer.number(int, 0, 10**18))
    flag("--device", "auto: cuda if there", default="auto", choices=["auto", "cuda", "cpu"])
    flag("--resume", "go on after the last finished epoch", action="store_true")
    flag("--embed-labels", "train nothing: a text encoder, Hugging Face name or local folder")
    flag("--as", "for --embed-labels: name to write (default: its own)", dest="encoder")
    args = parser.parse_args(argv)

    # Defaults that follow from the data set.
    known = IMAGES[args.dataset]
    preset = nayer.parse_args(["--dataset", args.dataset])
    channels = len(known["mean"]) if known["mean"] else args.channels or 3
    name = "label_embeddings" if args.embed_labels else f"{args.dataset}_{args.model}"
    args.out = args.out or HERE / f"{name}.safetensors"
    if args.encoder and not args.embed_labels:
        parser.error("--as is for --embed-labels")
    if args.out.suffix != ".safetensors":
        parser.error(f"--out {args.out}: nayer.py reads a name that ends with .safetensors")
    if ".py:" in args.model:
        parser.error("--model takes a name: a model file has no code in it")
    if args.init and not args.epochs:
        parser.error("--init needs --epochs N: it is a further short cycle")
    if args.image_size not in (None, known["image_size"]) and args.dataset != "folder":
        parser.error(f"--image-size: {args.dataset} has {known['image_size']} pixels")
    if args.channels not in (None, channels):
        parser.error(f"--channels: {args.dataset} has {channels}")
    args.image_size = args.image_size or known["image_size"]
    args.channels = channels
    args.mean = args.mean or known["mean"]
    args.std = args.std or known["std"]
    if args.image_size is None and not args.embed_labels:
        parser.error("--dataset folder needs --image-size")
    for values in (args.mean, args.std):
        if values and len(values) != channels:
            parser.error(f"--mean and --std take a number per channel: {channels}")
    if args.flip is None:
        args.flip = preset.flip
    args.crop_padding = preset.crop_padding
    return args


# ---- Training images -----------------------------------------------------------------------------
def names_by_label(dataset):
    """The class names, a list in the order of the labels: for Tiny-ImageNet that of its folders."""
    names = NAMES[dataset]
    if isinstance(names, dict):
        return [names[folder] for folder in sorted(names)]
    return names


def training_digits(size):
    """scikit-learn's digits but the 500 that are held out: 1,297 (image uint8, label) pairs. Their
    labels are the digits themselves."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)  # (1797, 64), values 0 to 16
    pixels, _, labels, _ = train_test_split(
        pixels, labels, test_size=500, stratify=labels, random_state=0
    )
    images = torch.tensor(pixels).float().view(-1, 1, 8, 8) * (255 / 16)
    images = F.interpolate(images, size=size, mode="bilinear").round().byte()
    return list(zip(images, labels.tolist()))


def training_cifar(dataset, root):
    """torchvision's CIFAR10 or CIFAR100. UserError if its list of names is not ours."""
    kind = getattr(datasets, dataset.upper())
    pairs = kind(root, train=True, download=True, transform=v2.PILToTensor())
    for name, ours in zip(pairs.classes, names_by_label(dataset), strict=True):
        same = name.lower().replace("_", " ") == ours.lower().replace("_", " ")
        nayer.check(same, f"class_names.json has {ours!r} where {dataset} has {name!r}")
    return pairs


def training_tiny_imagenet(root, channels, size):
    """The official archive, unpacked in root.

    Its validation images lie in one folder, beside a table of their classes. They move to where
    nayer.py looks for images to score on: root/test, a folder per class, with the class's name."""
    archive = root / "tiny-imagenet-200"
    name_of = NAMES["tiny_imagenet"]
    for line in (archive / "val/val_annotations.txt").read_text().splitlines():
        image, folder = line.split()[:2]
        before = archive / "val/images" / image
        after = root / "test" / name_of[folder] / image
        if before.exists():
            after.parent.mkdir(parents=True, exist_ok=True)
            before.rename(after)
    return nayer.image_folder(archive / "train", sorted(name_of), channels, size)


def training_images(args):
    """((image uint8 (ch, H, W), label) pairs to train on, class names in the order of labels)."""
    root, size = args.data_root, args.image_size
    with nayer.user_error(f"cannot read {args.dataset} in {root}"):
        if args.dataset == "folder":
            names, tested = (folder_names(root / part) for part in ("train", "test"))
            lonely = sorted(set(names) ^ set(tested))
            nayer.check(not lonely, f"train/ and test/ must have the same folders: {lonely}")
            return nayer.image_folder(root / "train", names, args.channels, size), names
        names = names_by_label(args.dataset)
        if args.dataset == "digits":
            return training_digits(size), names
        if args.dataset == "tiny_imagenet":
            return training_tiny_imagenet(root, args.channels, size), names
        return training_cifar(args.dataset, root), names


def folder_names(folder):
    """The names of the folders in a folder, sorted."""
    return sorted(nayer.normalize_name(path.name) for path in folder.iterdir() if path.is_dir())


def stack(pairs):
    """A small data set decoded at once: images uint8 (N, ch, H, W), labels (N,)."""
    images, labels = zip(*DataLoader(pairs, 500))
    return torch.cat(images), torch.cat(labels)


def epoch_batches(data, batch):
    """An epoch's batches (images uint8, labels) in a new order. data: images and labels, or pairs
    of them, which are read now."""
    if isinstance(data, tuple):
        images, labels = data
        for rows in torch.randperm(len(images), device=images.device).split(batch):
            yield images[rows], labels[rows]
    else:
        yield from DataLoader(data, batch, shuffle=True)


# ---- Parts of the training -----------------------------------------------------------------------
def takes(model, channels, size):
    """Whether a network makes logits of images of so many pixels in train mode. (A vision
    transformer takes one size alone; some networks take large images alone.)"""
    try:
        logits = copy.deepcopy(model).train()(torch.rand(2, channels, size, size))
    except Exception:
        return False
    return isinstance(logits, torch.Tensor)


def one_cycle(progress, peak):
    """The learning rate at `progress` in [0, 1): a rise for a fifth of the training, then a
    cosine."""
    if progress < 0.2:
        return peak * (0.1 + 0.9 * progress / 0.2)
    return peak * (1 + math.cos(math.pi * (progress - 0.2) / 0.8)) / 2


def is_finished(args, checkpoint):
    """Whether --resume finds the teacher trained. UserError if something would be overwritten."""
    if args.out.exists():
        nayer.check(args.resume, f"{args.out} exists: choose another --out")
        model = nayer.load_model(args.out).info["architecture"]
        nayer.check(model == args.model, f"{args.out} is a {model}: choose another --out")
        print(f"{args.out} is trained: nothing is left to do")
        return True
    text = f"{checkpoint} is of an unfinished training: add --resume, or choose another --out"
    nayer.check(args.resume or not checkpoint.exists(), text)
    return False


def embed_labels(args):
    """Write what nayer.embeddings_of looks up: an entry per data set, and what it was made of."""
    nayer.check(not args.out.exists(), f"{args.out} exists: choose another --out")
    with nayer.user_error(f"no usable text encoder {args.embed_labels} here or on the hub"):
        tokenize, encoder = nayer.load_text_encoder(args.embed_labels)
    entries = {}
    about = {}
    for dataset in NAMES:
        names = names_by_label(dataset)
        prompt = nayer.parse_args(["--dataset", dataset]).prompt
        entries[dataset] = nayer.label_text_embeddings(names, tokenize, encoder, prompt).half()
        about[dataset] = json.dumps([args.encoder or args.embed_labels, prompt, names])
        print(f"{dataset}: {tuple(entries[dataset].shape)}, {prompt!r}")
    with nayer.atomic_write(args.out) as temporary:
        save_file(entries, temporary, about)


# ---- The training --------------------------------------------------------------------------------
def main(argv=None):
    """Train a teacher, with a line on the console and a checkpoint after every epoch."""
    args = parse_args(argv)
    if args.embed_labels:
        embed_labels(args)
        return
    checkpoint = args.out.with_suffix(".checkpoint.pt")
    if is_finished(args, checkpoint):
        return
    torch.manual_seed(args.seed)
    device, bf16 = nayer.pick_device(args.device)
    amp = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
    if args.init:  # its images were normalised in some way: go on with that
        before = nayer.load_model(args.init)
        args.mean = args.mean or before.info["mean"]
        args.std = args.std or before.info["std"]

    # Images to train on and to score on, and how their pixels are normalised.
    data, class_names = training_images(args)
    num_images = len(data)
    C, channels, size = len(class_names), args.channels, args.image_size
    looks = dict(class_names=class_names, channels=channels, image_size=size)
    test = nayer.test_batches(args, looks)
    with nayer.user_error(f"cannot read {args.dataset} in {args.data_root}"):
        if size <= nayer.SMALL_IMAGE:
            images, labels = stack(data)
            data = (images.to(device), labels.to(device))
        else:
            few = torch.randperm(num_images)[:2000].tolist()  # for mean and std
            images, _ = stack(Subset(data, few))
    pixels = images.float() / 255
    args.mean = args.mean or pixels.mean((0, 2, 3)).tolist()
    args.std = args.std or pixels.std((0, 2, 3)).tolist()
    augment = nayer.Augment(args.mean, args.std, args.crop_padding, args.flip, device)

    # The network, with random weights or those of an earlier cycle, and its optimizer.
    model = nayer.build_model(args.model, C, channels, size)
    text = f"{args.model} makes no logits of images of {channels} x {size} x {size} in train mode"
    nayer.check(takes(model, channels, size), text)
    grows = args.epochs and not args.init and takes(model, channels, size * 5 // 8)
    if args.init:
        with nayer.user_error(f"{args.init} is not a {args.model} for these images and classes"):
            model.load_state_dict(before.state_dict())
    model = model.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4, nesterov=bool(args.epochs)
    )

    # A training that was stopped goes on where its last whole epoch ended.
    epochs = args.epochs or 200
    steps = max(1, num_images // args.batch)
    settings = {key: str(value) for key, value in vars(args).items() if key not in MAY_CHANGE}
    settings["images"] = str(num_images)
    first = 0
    if checkpoint.exists():
        saved = nayer.load_tensors(checkpoint, device)
        old = saved.get("settings", {})
        changed = [f"{key} {old.get(key)}" for key in settings if old.get(key) != settings[key]]
        nayer.check(not changed, f"{checkpoint} is of other settings: {', '.join(changed)}")
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["epoch"] + 1
    print(f"{args.model} on {args.dataset}: {num_images} images, {device}, {epochs} epochs")
    for epoch in range(first, epochs):
        start = time.perf_counter()
        torch.manual_seed(random.Random(f"{args.seed} {epoch}").getrandbits(63))
        side = size
        if grows:
            side = size * min(8, 5 + 5 * epoch // epochs) // 8  # pixels: 5/8, 6/8, 7/8, all of it
        total = 0.0
        model.train()
        for step, (images, labels) in zip(range(steps), epoch_batches(data, args.batch)):
            progress = (epoch + step / steps) / epochs
            rate = 0.1 * (1 + math.cos(math.pi * progress)) / 2
            if args.epochs:
                rate = one_cycle(progress, peak=0.1 if args.init else 0.25)
            optimizer.param_groups[0]["lr"] = rate
            views = augment(images.to(device).float() / 255)
            if side != size:
                views = F.interpolate(views, size=side, mode="bilinear", antialias=True)
            with amp:
                logits = model(views.contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(logits.float(), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach()
        score = nayer.accuracy(model, test, augment, amp)
        line = f"epoch {epoch + 1:3d}  {side:3d} px  loss {total.item() / steps:.4f}"
        line += f"  test {score:7.2%}  {time.perf_counter() - start:6.1f} s"
        print(line, flush=True)
        state = dict(model=model.state_dict(), optimizer=optimizer.state_dict())
        nayer.save_tensors(checkpoint, state | dict(epoch=epoch, settings=settings))

    # The model file describes itself. Weights are stored in fp16; so those are scored.
    model = model.half().float()
    score = nayer.accuracy(model, test, augment, amp)
    command = "python teachers/train.py " + shlex.join(sys.argv[1:] if argv is None else argv)
    info = looks | dict(
        architecture=args.model,
        mean=args.mean,
        std=args.std,
        accuracy=score,
        trained_on=args.trained_on or args.dataset,
        command=command,
    )
    nayer.save_model(args.out, model.half(), info)
    print(f"{args.out}: test accuracy {score:.2%}")
    checkpoint.unlink(missing_ok=True)


if __name__ == "__main__":
    nayer.run_script(main)
