"""Train a teacher on real images, and write it as one self-describing model file.

    python teachers/train.py --dataset digits --model wrn16_2                 # the shipped digits teacher
    python teachers/train.py --dataset cifar10 --model resnet34               # the published recipe, 200 epochs
    python teachers/train.py --dataset folder --data-root DIR --model wrn40_2 --epochs 30 --image-size 32

Without --epochs: the recipe of the paper's teachers (200 epochs, SGD 0.1, cosine, batch 256, weight
decay 5e-4). With --epochs N: a one-cycle recipe that is strong when short (peak 0.25, Nesterov; the
resolution grows from 5/8 to full during the first 60 % of the epochs, which saves a quarter of the time).
This is the only file of the project that reads training images; nayer.py never does.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import nayer  # noqa: E402  the networks, the augmentation, the model files


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Train a teacher on real images.")
    add = parser.add_argument
    add("--dataset", choices=list(nayer.IMAGES), default="digits")
    add("--data-root", type=Path, default=Path("data"), help="where the data set is (folder: DIR/train, DIR/test)")
    add("--model", default="wrn16_2", help="a name that nayer.build_model knows")
    add("--out", type=Path, help="default: teachers/<dataset>_<model>.safetensors")
    add("--epochs", type=int, help="a short one-cycle run; without it, the published 200 epochs")
    add("--batch", type=int, default=256)
    add("--image-size", type=int, help="pixels, for --dataset folder")
    add("--mean", type=float, nargs="+", help="per channel; default: the data set's, or measured")
    add("--std", type=float, nargs="+", help="per channel; default: the data set's, or measured")
    add("--trained-on", help="words about the training images, kept in the model file")
    add("--seed", type=int, default=0)
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    add("--resume", action="store_true", help="continue an interrupted training")
    add("--embed-labels", metavar="ENCODER", help="train nothing: write teachers/label_embeddings.safetensors")
    args = parser.parse_args(argv)
    args.out = args.out or Path(__file__).parent / f"{args.dataset}_{args.model}.safetensors"
    return args


def load_images(args, preset):
    """(images uint8 (N, ch, H, W), labels (N,)) of the training and of the test part, and the class names."""
    if args.dataset == "digits":
        names = "zero one two three four five six seven eight nine".split()
        return nayer.digits(0), nayer.digits(1), names
    parts = [nayer.image_folder(args.data_root / p, preset["channels"], preset["image_size"]) for p in ("train", "test")]
    return *map(nayer.decode, parts), parts[0].classes


def embed_labels(encoder):
    """Embed the class names of the known data sets (class_names.json), each with its preset's prompt."""
    tensors, metadata, here = {}, {}, Path(__file__).parent
    for dataset, names in json.loads((here / "class_names.json").read_text()).items():
        prompt = nayer.PRESETS[dataset]["prompt"]
        tensors[dataset] = nayer.label_text_embeddings(names, encoder, prompt).half()
        wanted = dict(encoder=nayer.TEXT_ENCODER, prompt=prompt, class_names=names)
        metadata[dataset] = json.dumps(wanted)
        print(f"{dataset}: {tuple(tensors[dataset].shape)}")
    safetensors.torch.save_file(tensors, here / "label_embeddings.safetensors", metadata)


def schedule(progress, short):
    """Learning rate at `progress` in [0, 1] of the training."""
    if not short:
        return 0.1 * 0.5 * (1 + math.cos(math.pi * progress))
    warm = 0.2
    if progress < warm:
        return 0.25 * (0.1 + 0.9 * progress / warm)
    return 0.25 * 0.5 * (1 + math.cos(math.pi * (progress - warm) / (1 - warm)))


def resolution(progress, full, short):
    """Side of the training images: 5/8, 6/8, 7/8 of the full one, each for 20 % of a short training."""
    return full if not short else full * min(8, 5 + int(progress / 0.2)) // 8


def main(argv=None):
    args = parse_args(argv)
    if args.embed_labels:
        return embed_labels(args.embed_labels)
    torch.manual_seed(args.seed)
    device = nayer.pick_device(args.device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=nayer.has_bf16(device))
    preset = dict(nayer.IMAGES[args.dataset] | {k: nayer.PRESETS[args.dataset][k] for k in ("crop_padding", "flip")})
    preset["image_size"] = args.image_size or preset["image_size"]
    (images, labels), (test_images, test_labels), class_names = load_images(args, preset)
    scaled = images.float() / 255
    mean = args.mean or preset["mean"] or scaled.mean((0, 2, 3)).tolist()
    std = args.std or preset["std"] or scaled.std((0, 2, 3)).tolist()
    del scaled
    augment = nayer.Augment(mean, std, preset["crop_padding"], preset["flip"], device)
    images, labels = images.to(device), labels.to(device)
    test = list(zip(test_images.to(device).split(500), test_labels.to(device).split(500)))

    model = nayer.build_model(args.model, len(class_names), preset["channels"], preset["image_size"])
    model = model.to(device, memory_format=torch.channels_last)
    short, epochs = args.epochs is not None, args.epochs or 200
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=short, weight_decay=5e-4)
    checkpoint, start, best = args.out.with_suffix(".checkpoint.pt"), 0, 0.0
    if args.resume and checkpoint.exists():
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["rng"].cpu())
        start = saved["epoch"]
    print(f"{args.model} on {args.dataset}: {len(images)} training, {len(test_images)} test images, {device}, {epochs} epochs")

    steps = max(1, len(images) // args.batch)
    for epoch in range(start, epochs):
        clock, total = time.perf_counter(), torch.zeros((), device=device)
        model.train()
        order = torch.randperm(len(images), device=device)
        size = resolution(epoch / epochs, preset["image_size"], short)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = schedule((epoch + step / steps) / epochs, short)
            rows = order[step * args.batch : (step + 1) * args.batch]
            x = augment(images[rows].float() / 255)
            if size != preset["image_size"]:
                x = F.interpolate(x, size=size, mode="bilinear", antialias=True)
            with autocast:
                logits = model(x.contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(logits.float(), labels[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total += loss.detach()
        score = nayer.accuracy(model, test, augment, autocast)
        seconds = time.perf_counter() - clock
        print(f"epoch {epoch + 1:3d}/{epochs}  {size:3d} px  loss {total / steps:.4f}  test {100 * score:6.2f} %  {seconds:6.1f} s", flush=True)
        state = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), rng=torch.get_rng_state(), epoch=epoch + 1)
        nayer.write_atomically(checkpoint, lambda path, state=state: torch.save(state, path))

    model = model.cpu().half().float()  # what is scored is what is stored
    score = nayer.accuracy(model.to(device), test, augment, autocast)
    info = dict(
        architecture=args.model,
        class_names=class_names,
        channels=preset["channels"],
        image_size=preset["image_size"],
        mean=mean,
        std=std,
        accuracy=score,
        trained_on=args.trained_on or args.dataset,
        command="python teachers/train.py " + " ".join(argv or sys.argv[1:]),
    )
    nayer.save_model(args.out, model, info, half=True)
    checkpoint.unlink(missing_ok=True)
    print(f"{args.out}: test accuracy {100 * score:.2f} %")


if __name__ == "__main__":
    nayer.run_script(main)
