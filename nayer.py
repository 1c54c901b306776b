# /// script
# requires-python = ">=3.10"
# dependencies = []
# ///
"""NAYER"""

import hashlib
import json
import os
import re
import signal
import sys
from pathlib import Path

import safetensors
import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F

DATASETS = {
    "digits": dict(image_size=16, channels=1, mean=[0.305], std=[0.3185], padding=2, flip=False),
    "cifar10": dict(
        image_size=32, channels=3, mean=[0.4914, 0.4822, 0.4465], std=[0.2023, 0.1994, 0.2010], padding=4, flip=True
    ),
    "folder": dict(image_size=None, channels=3, mean=None, std=None, padding=4, flip=True),
}


class UserError(Exception):
    """Something the user can put right: shown as one line, exit code 1, no traceback."""


class Augment:
    """Random crop after zero padding, random horizontal flip, normalisation: one batch at once.

    images (B, ch, H, W), float in [0, 1] -> the same shape, normalised. Gradients pass through.
    """

    def __init__(self, mean, std, padding, flip, device="cpu"):
        self.mean, self.std = (torch.tensor(v, device=device).view(1, -1, 1, 1) for v in (mean, std))
        self.padding, self.flip = padding, flip

    def normalize(self, images):
        return (images - self.mean) / self.std

    def __call__(self, images):
        B, ch, H, W = images.shape
        shift = torch.randint(2 * self.padding + 1, (2, B, 1), device=images.device)
        rows = shift[0] + torch.arange(H, device=images.device)  # (B, H)
        columns = shift[1] + torch.arange(W, device=images.device)  # (B, W)
        if self.flip:
            mirrored = torch.rand(B, 1, device=images.device) < 0.5
            columns = torch.where(mirrored, columns.flip(1), columns)
        images = F.pad(images, [self.padding] * 4)
        images = images.gather(2, rows[:, None, :, None].expand(-1, ch, -1, images.shape[3]))
        images = images.gather(3, columns[:, None, None, :].expand(-1, ch, H, -1))
        return self.normalize(images)


class WideBlock(nn.Module):
    """Two 3x3 convolutions, each after BatchNorm and ReLU, and a shortcut."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut = None
        if inputs != outputs:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x):
        h = F.relu(self.norm1(x))
        x = x if self.shortcut is None else self.shortcut(h)
        return x + self.conv2(F.relu(self.norm2(self.conv1(h))))


class WideResNet(nn.Module):
    """wrn{depth}_{width} of Zagoruyko and Komodakis: images (B, ch, H, W) -> logits (B, C)."""

    def __init__(self, depth, width, num_classes, channels=3):
        super().__init__()
        blocks, inputs = [], 16
        for group in range(3):  # resolution 1, 1/2, 1/4
            for i in range((depth - 4) // 6):
                outputs = 16 * width * 2**group
                blocks.append(WideBlock(inputs, outputs, stride=2 if group and i == 0 else 1))
                inputs = outputs
        self.stem = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(inputs)
        self.classifier = nn.Linear(inputs, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images):
        features = F.relu(self.norm(self.blocks(self.stem(images))))
        return self.classifier(features.mean((2, 3)))


def build_model(name, num_classes, channels=3, image_size=32):
    """A network with random weights: `wrn{depth}_{width}`, or any name that torchvision knows."""
    if match := re.fullmatch(r"wrn(\d+)_(\d+)", name):
        depth, width = map(int, match.groups())
        if depth < 10 or (depth - 4) % 6 or width < 1:
            raise UserError(f"no Wide ResNet {name!r}: the depth must be 10, 16, 22, ... (6n+4), the width 1 or more")
        return WideResNet(depth, width, num_classes, channels)

    import torchvision.models as zoo

    small = image_size <= 64
    if small and re.fullmatch(r"vgg\d\d", name):
        name += "_bn"
    if name not in zoo.list_models(module=zoo):
        raise UserError(f"unknown network {name!r}: use wrn16_2, resnet18, vgg11 or another name of torchvision.models")
    model = zoo.get_model(name, weights=None, num_classes=num_classes)
    if small and isinstance(model, zoo.ResNet):
        model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    if small and isinstance(model, zoo.VGG):
        model.avgpool, model.classifier = nn.AdaptiveAvgPool2d(1), nn.Linear(512, num_classes)
    if channels != 3:
        path, first = next((p, m) for p, m in model.named_modules() if isinstance(m, nn.Conv2d))
        parent = model.get_submodule(path.rpartition(".")[0])
        new = nn.Conv2d(channels, first.out_channels, first.kernel_size, first.stride, first.padding, bias=first.bias is not None)
        setattr(parent, path.rpartition(".")[2], new)
    return model


def fingerprint(info, state):
    """sha256 over the description and the weights of a model file."""
    digest = hashlib.sha256(json.dumps(info, sort_keys=True).encode())
    for name in sorted(state):
        digest.update(name.encode() + state[name].contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def write_atomically(path, write):
    """Call write(temporary name), then move the file to `path`: it is never seen half-written."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_model(path, model, info, half=False):
    """Write weights and their description to one self-describing safetensors file."""
    state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    if half:
        state = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    metadata = {k: json.dumps(v) for k, v in info.items()}
    metadata |= {"format": "nayer-1", "sha256": fingerprint(info, state)}
    write_atomically(path, lambda temporary: safetensors.torch.save_file(state, temporary, metadata))


def load_model(path):
    """The network in a model file, in eval mode; `.info` is its description."""
    if not Path(path).is_file():
        raise UserError(f"no model file {path}")
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path} is not a complete safetensors file ({error})") from None
    if metadata.pop("format", None) != "nayer-1":
        raise UserError(f"{path} is not one of our model files: make one with nayer.save_model or teachers/train.py")
    expected = metadata.pop("sha256", None)
    try:
        info = {name: json.loads(value) for name, value in metadata.items()}
        if fingerprint(info, state) != expected:
            raise UserError(f"{path} is damaged: its contents do not match its checksum")
        model = build_model(info["architecture"], len(info["class_names"]), info["channels"], info["image_size"])
        model.load_state_dict(state)
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"{path}: the weights do not fit the description ({str(error).splitlines()[0]})") from None
    model.info = info
    return model.eval()


@torch.no_grad()
def accuracy(model, images, labels, augment, autocast, batch=1000):
    """Fraction in [0, 1] of the test images that the model (put into eval mode) gets right."""
    model.eval()
    correct = 0
    for x, y in zip(images.split(batch), labels.split(batch)):
        with autocast:
            logits = model(augment.normalize(x.float() / 255).contiguous(memory_format=torch.channels_last))
        correct += (logits.argmax(1) == y).sum()
    return float(correct) / len(labels)


def digits(part):
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    split = train_test_split(data.images, data.target, test_size=500, stratify=data.target, random_state=0)
    images, labels = (torch.as_tensor(v) for v in split[part::2])
    images = F.interpolate(images[:, None].float() * 255 / 16, size=16, mode="bilinear").round().byte()
    return images, labels.long()


def image_folder(folder, channels, image_size):
    """A torchvision ImageFolder whose images are uint8 (channels, image_size, image_size)."""
    from PIL import Image
    from torchvision import datasets
    from torchvision.transforms import v2

    def read(path):
        try:
            with Image.open(path) as image:
                return image.convert("L" if channels == 1 else "RGB")
        except (OSError, ValueError) as error:
            raise UserError(f"unreadable image {path} ({error})") from None

    if not Path(folder).is_dir():
        raise UserError(f"no folder {folder}: it should hold one folder of images for each class")
    resize = v2.Compose([v2.Resize(image_size), v2.CenterCrop(image_size), v2.PILToTensor()])
    try:
        return datasets.ImageFolder(folder, transform=resize, loader=read)
    except FileNotFoundError as error:
        raise UserError(str(error).splitlines()[0]) from None


def decode(dataset):
    """All images of a small data set at once: uint8 (N, ch, H, W), and the labels (N,)."""
    images = torch.stack([image for image, _ in dataset])
    return images, torch.tensor(dataset.targets)


def pick_device(name):
    if name != "auto":
        return torch.device(name)
    has_mps = torch.backends.mps.is_available()
    return torch.device("cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu")


def has_bf16(device):
    """Whether bf16 is fast here: CUDA from Ampere on, CPUs with AMX or AVX-512 BF16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def run_script(main):
    """Run main() as a program: one clear line and an exit code instead of a traceback."""

    def terminate(signum, frame):
        raise SystemExit(143)

    signal.signal(signal.SIGTERM, terminate)
    try:
        main()
    except UserError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
