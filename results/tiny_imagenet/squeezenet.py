"""A SqueezeNet for Tiny-ImageNet as a teacher, by another author, and a student of half its width.

The weights are those of github.com/TropComplique/trained-ternary-quantization (MIT licence), saved
as data/squeezenet_tiny_imagenet.safetensors. They were trained with PyTorch 0.2, on the classes in
the order of the sorted folder names, and reach 55 % of the validation images.
"""

import sys
from pathlib import Path

import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.append(str(Path(__file__).resolve().parents[2] / "teachers"))
import train  # noqa: E402

WEIGHTS = Path("data/squeezenet_tiny_imagenet.safetensors")


class Fire(nn.Module):
    """Maps (B, inputs, h, w) -> (B, ones + threes, h, w): few channels, then many.

    add: whether the input is added, which then has as many channels as the output."""

    def __init__(self, inputs, squeezed, ones, threes, add=False):
        super().__init__()
        self.add = add
        self.squeeze_bn = nn.BatchNorm2d(inputs)
        self.squeeze = nn.Conv2d(inputs, squeezed, 1, bias=False)
        self.expand1x1_bn = nn.BatchNorm2d(squeezed)
        self.expand1x1 = nn.Conv2d(squeezed, ones, 1, bias=False)
        self.expand3x3_bn = nn.BatchNorm2d(squeezed)
        self.expand3x3 = nn.Conv2d(squeezed, threes, 3, padding=1, bias=False)

    def forward(self, maps):
        few = self.squeeze(F.relu(self.squeeze_bn(maps)))
        ones = self.expand1x1(F.relu(self.expand1x1_bn(few)))
        threes = self.expand3x3(F.relu(self.expand3x3_bn(few)))
        many = torch.cat([ones, threes], dim=1)
        return many + maps if self.add else many


class SqueezeNet(nn.Module):
    """Images (B, 3, 64, 64), normalised -> logits (B, num_classes).

    width: the number of channels of each layer, as a share of the teacher's.
    last_relu: the teacher's logits pass through a ReLU before the average over the pixels."""

    def __init__(self, width=1.0, last_relu=True, num_classes=200):
        super().__init__()
        a, b, c, d = (int(size * width) for size in (64, 128, 192, 256))
        s, t, u = a // 4, b // 4, c // 4  # squeezed
        self.features = nn.Sequential(
            nn.Conv2d(3, a, 3, padding=1, bias=False),
            nn.BatchNorm2d(a),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, ceil_mode=True),
            Fire(a, s, a, a),
            Fire(2 * a, s, a, a, add=True),
            nn.MaxPool2d(3, 2, ceil_mode=True),
            Fire(2 * a, t, b, b),
            Fire(2 * b, t, b, b, add=True),
            nn.MaxPool2d(3, 2, ceil_mode=True),
            Fire(2 * b, u, c, c),
            Fire(2 * c, u, c, c, add=True),
            Fire(2 * c, a, d, d),
            Fire(2 * d, a, d, d, add=True),
        )
        self.classifier = nn.Sequential(
            nn.Dropout() if last_relu else nn.Identity(),
            nn.Conv2d(2 * d, num_classes, 1),
            nn.ReLU() if last_relu else nn.Identity(),
            nn.AvgPool2d(7),
        )

    def forward(self, images):
        return self.classifier(self.features(images)).flatten(1)


def load():
    """The teacher, 0.83 M weights."""
    model = SqueezeNet()
    found = model.load_state_dict(safetensors.torch.load_file(WEIGHTS), strict=False)
    lacking = [key for key in found.missing_keys if not key.endswith("num_batches_tracked")]
    assert not lacking and not found.unexpected_keys
    model.info = dict(class_names=train.names_by_label("tiny_imagenet"), image_size=64)
    model.info |= dict(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
    model.info["accuracy"] = 0.5255  # of the 8,000 images on which the student was scored
    return model.to(memory_format=torch.channels_last)  # faster on a CPU


def half(num_classes):
    """A student, 0.23 M weights: half of the channels, no ReLU after the last convolution."""
    model = SqueezeNet(0.5, last_relu=False, num_classes=num_classes)
    return model.to(memory_format=torch.channels_last)
