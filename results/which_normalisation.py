"""T's mean, std and channel order: python results/which_normalisation.py TEACHER [PHOTO ...]

L_BN of T on random squares of any photographs, larger than its images (default: scikit-learn's
two), the lowest first: it is most likely the right one. TEACHER: as for --teacher."""

import sys

import torch
import torch.nn.functional as F
from figures import nayer
from sklearn.datasets import load_sample_images
from torchvision.io import read_image

KNOWN = {"0/1": ([0.0] * 3, [1.0] * 3), "0.5/0.5": ([0.5] * 3, [0.5] * 3)}
KNOWN |= {"0.5/0.25": ([0.5] * 3, [0.25] * 3)}
KNOWN |= {"ImageNet": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])}


def rank(name, paths=()):
    """{candidate: L_BN}, the lowest first."""
    teacher, info = nayer.load_teacher(nayer.parse_args(["--teacher", name]))
    nayer.check(info["channels"] == 3, f"{name} does not take colour images")
    photos = [read_image(path, "RGB") for path in paths]  # uint8 (3, height, width)
    photos = photos or [torch.tensor(p).permute(2, 0, 1) for p in load_sample_images().images]
    images, size, found = [], info["image_size"], {}
    for k in range(200):
        photo = photos[k % len(photos)]
        nayer.check(min(photo.shape[1:]) >= size, f"a photograph has less than {size} pixels")
        side = int(torch.randint(size, min(photo.shape[1:]) + 1, ()))
        top, left = (int(torch.randint(length - side + 1, ())) for length in photo.shape[1:])
        square = photo[None, :, top : top + side, left : left + side] / 255
        images.append(F.interpolate(square, size=size, mode="bilinear", antialias=True))
    squares = torch.cat(images).clamp(0, 1)
    bn_loss = nayer.BatchNormLoss(nayer.batch_norms(teacher), momentum=0.0)
    for candidate, (mean, std) in (KNOWN | {".info": (info["mean"], info["std"])}).items():
        views = nayer.Augment(mean, std, padding=0, flip=False).normalize(squares)
        for order, ordered in (("RGB", views), ("BGR", views.flip(1))):
            teacher(ordered)
            found[f"{candidate}, {order}"] = bn_loss().item()
    return dict(sorted(found.items(), key=lambda pair: pair[1]))


def main():
    nayer.check(len(sys.argv) > 1, "which teacher? a file.py:function, or a model file")
    for candidate, loss_bn in rank(sys.argv[1], sys.argv[2:]).items():
        print(f"{loss_bn:8.1f}  {candidate}")


if __name__ == "__main__":
    nayer.run_script(main)
