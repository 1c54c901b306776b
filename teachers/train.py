"""Train a teacher on real images and write it as one self-describing model file.

    python teachers/train.py --dataset digits --model wrn16_2       the shipped teacher of digits
    python teachers/train.py --dataset cifar10 --model resnet34     the paper's: 200 epochs
    python teachers/train.py --dataset cifar10 --model wrn40_2 --epochs 30           a short recipe
    python teachers/train.py --dataset cifar10 --model wrn40_2 --epochs 12 --init F  a second cycle
    python teachers/train.py --embed-labels sentence-transformers/all-MiniLM-L6-v2

Without --epochs: the recipe of the paper's teachers (200 epochs of SGD from 0.1, cosine, batch 256,
weight decay 5e-4). With --epochs N: a one-cycle recipe that is strong when short (peak 0.25,
Nesterov; the images grow from 5/8 of their size to all of it during the first 60 % of the epochs,
which saves a quarter of the time). With --init FILE as well: a further cycle from the weights in
that model file (peak 0.1, images in full size from the start). The last command trains nothing: it
writes the embeddings of the class names in class_names.json to label_embeddings.safetensors, with
each data set's prompt.

Images of up to 64 pixels are decoded once and kept on the device, larger ones are streamed. Nothing
else in the project reads a training image.
"""

import argparse
import json
import math
import os
import random
import shlex
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torchvision import datasets
from torchvision.transforms import v2

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import nayer  # noqa: E402


def parse_args(argv=None):
    parser = argparse.ArgumentParser(prog="train.py", description="Train a teacher on real images.")
    parser.error = lambda message: parser.exit(2, f"train.py: error: {message}\n")
    add, count = parser.add_argument, nayer.number(int, 1)
    add("--dataset", choices=nayer.IMAGES, default="digits")
    add("--data-root", type=Path, default=Path("data"), help="a folder has train/ and test/ in it")
    add("--model", default="wrn16_2", help="a name that nayer.build_model knows")
    add("--out", type=Path, help="model file (default: teachers/<dataset>_<model>.safetensors)")
    add("--epochs", type=count, help="a short one-cycle run; without it, 200 epochs as published")
    add("--init", type=Path, help="model file to go on from, for a further cycle of --epochs N")
    add("--batch", type=nayer.number(int, 2), default=256)
    add("--image-size", type=nayer.number(int, 8, 224), help="pixels, for --dataset folder")
    add("--channels", type=int, choices=[1, 3], help="for --dataset folder (default: 3)")
    add("--mean", type=float, nargs="+", help="per channel (default: known, or measured)")
    add("--std", type=nayer.number(float, 1e-6), nargs="+", help="likewise")
    add("--trained-on", help="words about the training images, kept in the model file")
    add("--seed", type=nayer.number(int, 0), default=0)
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    add("--resume", action="store_true", help="go on after the last finished epoch")
    add("--embed-labels", metavar="ENCODER", help="only write label_embeddings.safetensors")
    args = parser.parse_args(argv)
    size, channels, mean, std = nayer.IMAGES[args.dataset]
    args.image_size, args.channels = args.image_size or size, args.channels or channels
    args.mean, args.std = args.mean or mean, args.std or std
    args.out = args.out or HERE / f"{args.dataset}_{args.model}.safetensors"
    if args.init and not args.epochs:
        parser.error("--init needs --epochs N: it is a further short cycle")
    if args.image_size is None or args.image_size % 4:
        parser.error("--dataset folder needs --image-size, a multiple of 4")
    return args


def training_images(args):
    """((image uint8 (ch, H, W), label) pairs to train on, class names)."""
    names, root = json.loads((HERE / "class_names.json").read_text()), args.data_root
    with nayer.explained(f"cannot read {args.dataset} in {root}"):
        if args.dataset == "digits":  # the 1,297 that are not held out
            pixels, labels = load_digits(return_X_y=True)
            how = dict(test_size=500, stratify=labels, random_state=0)
            pixels, _, labels, _ = train_test_split(pixels, labels, **how)
            images = torch.tensor(pixels).float().view(-1, 1, 8, 8) * (255 / 16)
            images = F.interpolate(images, size=16, mode="bilinear").round().byte()
            pairs = list(zip(images, labels.tolist()))
        elif args.dataset in ("cifar10", "cifar100"):
            kind = getattr(datasets, args.dataset.upper())
            pairs = kind(root, train=True, download=True, transform=v2.PILToTensor())
        elif args.dataset == "tiny_imagenet":
            root = root / "tiny-imagenet-200"
            wnids = (root / "wnids.txt").read_text().split()
            pairs = nayer.image_folder(root / "train", args.channels, args.image_size)
            order = [wnids.index(name) for name in pairs.classes]
            pairs.samples = [(path, order[label]) for path, label in pairs.samples]
        else:
            pairs = nayer.image_folder(root / "train", args.channels, args.image_size)
            if pairs.classes != datasets.folder.find_classes(root / "test")[0]:
                raise ValueError("train/ and test/ do not hold the same classes")
        return pairs, names.get(args.dataset) or pairs.classes


def stack(pairs):
    """A small data set decoded at once: images uint8 (N, ch, H, W), labels (N,)."""
    images, labels = zip(*pairs)
    return torch.stack(images), torch.tensor(labels)


def epoch_batches(data, batch):
    """An epoch's batches (images uint8, labels) in a new order.

    data: (images, labels) on the device, or pairs that are too large to keep, which are streamed.
    """
    if isinstance(data, tuple):
        images, labels = data
        for rows in torch.randperm(len(images), device=images.device).split(batch):
            yield images[rows], labels[rows]
    else:
        how = dict(shuffle=True, num_workers=min(8, os.cpu_count() or 1))
        yield from torch.utils.data.DataLoader(data, batch, **how)


def channel_statistics(data):
    """(mean, std) per channel of images in [0, 1]; of streamed ones, 2,000 will do."""
    if not isinstance(data, tuple):
        few = torch.randperm(len(data))[:2000].tolist()
        data = stack(torch.utils.data.Subset(data, few))
    scaled = data[0].float() / 255
    return scaled.mean((0, 2, 3)).tolist(), scaled.std((0, 2, 3)).tolist()


def embed_labels(encoder):
    """Write the embeddings that nayer.label_text_embeddings looks up first: an entry per data set,
    and what it was made of."""
    entries, about = {}, {}
    for dataset, names in json.loads((HERE / "class_names.json").read_text()).items():
        prompt = nayer.parse_args(["--dataset", dataset]).prompt
        entries[dataset] = nayer.label_text_embeddings(names, encoder, prompt).half()
        about[dataset] = json.dumps([nayer.TEXT_ENCODER, prompt, names])
        print(f"{dataset}: {tuple(entries[dataset].shape)}, {prompt!r}")
    place = HERE / "label_embeddings.safetensors"
    nayer.write_atomically(place, lambda file: save_file(entries, file, about))


def learning_rate(progress, args):
    """At `progress` in [0, 1) of the training."""
    if args.epochs is None:
        return 0.1 * (1 + math.cos(math.pi * progress)) / 2
    peak = 0.1 if args.init else 0.25
    if progress < 0.2:
        return peak * (0.1 + 0.9 * progress / 0.2)
    return peak * (1 + math.cos(math.pi * (progress - 0.2) / 0.8)) / 2


def train_epoch(model, optimizer, data, count, augment, args, epoch, epochs):
    """One pass over the `count` images of `data`. Returns the mean loss, and the images' side."""
    model.train()
    device = augment.mean.device
    steps, total = max(1, count // args.batch), torch.zeros((), device=device)
    size, grow = args.image_size, args.epochs is not None and args.init is None
    side = size * min(8, 5 + 5 * epoch // epochs) // 8 if grow else size
    for step, (images, labels) in zip(range(steps), epoch_batches(data, args.batch)):
        optimizer.param_groups[0]["lr"] = learning_rate((epoch + step / steps) / epochs, args)
        views = augment(images.to(device).float() / 255)
        if side != size:
            views = F.interpolate(views, size=side, mode="bilinear", antialias=True)
        logits = model(views.contiguous(memory_format=torch.channels_last))
        loss = F.cross_entropy(logits.float(), labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.detach()
    return (total / steps).item(), side


def main(argv=None):
    args = parse_args(argv)
    if args.embed_labels:
        return embed_labels(args.embed_labels)
    torch.manual_seed(args.seed)
    device, bf16 = nayer.pick_device(args.device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
    start = nayer.load_model(args.init) if args.init else None
    if start:  # its images were normalised in some way: go on with that
        args.mean, args.std = args.mean or start.info["mean"], args.std or start.info["std"]
    pairs, class_names = training_images(args)
    with nayer.explained(f"cannot read {args.dataset} in {args.data_root}"):
        shape = (args.channels, args.image_size)
        test = nayer.test_batches(args.dataset, args.data_root, class_names, *shape, device)
        data = pairs
        if args.image_size <= nayer.SMALL:
            data = tuple(tensor.to(device) for tensor in stack(pairs))
        if args.mean is None or args.std is None:
            mean, std = channel_statistics(data)
            args.mean, args.std = args.mean or mean, args.std or std
    preset = nayer.parse_args(["--dataset", args.dataset])
    augment = nayer.Augment(args.mean, args.std, preset.crop_padding, preset.flip, device)

    model = nayer.build_model(args.model, len(class_names), *shape)
    if start:
        with nayer.explained(f"{args.init} is not a {args.model} for these images and classes"):
            model.load_state_dict(start.state_dict())
    model = model.to(device, memory_format=torch.channels_last)
    model.forward = autocast(model.forward)
    epochs, weights, nesterov = args.epochs or 200, model.parameters(), args.epochs is not None
    optimizer = torch.optim.SGD(weights, 0.1, 0.9, weight_decay=5e-4, nesterov=nesterov)
    checkpoint, first = args.out.with_suffix(".checkpoint.pt"), 0
    free = ("out", "resume", "device", "data_root", "trained_on")  # settings that change nothing
    settings = {k: str(v) for k, v in vars(args).items() if k not in free}
    settings["images"] = str(len(pairs))
    if args.resume and checkpoint.exists():
        with nayer.explained(f"{checkpoint} is not an intact checkpoint of this training"):
            saved = torch.load(checkpoint, map_location=device, weights_only=True)
            old = saved["settings"]
            changed = [f"{k} {old.get(k)} -> {v}" for k, v in settings.items() if old.get(k) != v]
            text = f"{checkpoint} is of a training with other settings: {'; '.join(changed)}"
            nayer.check(not changed, text)
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            first = saved["epoch"] + 1
    print(f"{args.model} on {args.dataset}: {len(pairs)} images, {device}, {epochs} epochs")

    for epoch in range(first, epochs):
        start = time.perf_counter()
        torch.manual_seed(random.Random(f"{args.seed} {epoch}").getrandbits(63))
        loss, side = train_epoch(model, optimizer, data, len(pairs), augment, args, epoch, epochs)
        score = nayer.accuracy(model, test, augment)
        took = f"{time.perf_counter() - start:6.1f} s"
        line = f"epoch {epoch + 1:3d}  {side:3d} px  loss {loss:.4f}  test {score:7.2%}  {took}"
        print(line, flush=True)
        state = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), epoch=epoch)
        write = partial(torch.save, state | dict(settings=settings))
        nayer.write_atomically(checkpoint, write)

    model = model.half().float()  # stored in fp16, so that is what is scored
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
        command="python teachers/train.py " + shlex.join(argv or sys.argv[1:]),
    )
    nayer.save_model(args.out, model.half(), info)
    checkpoint.unlink(missing_ok=True)
    print(f"{args.out}: test accuracy {score:.2%}")


if __name__ == "__main__":
    nayer.run_script(main)
