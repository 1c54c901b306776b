"""What limits the 200-class student: python results/tiny_imagenet/limits.py RUN DATA IMAGES ...

Trains new students with the same steps on different images, and scores them on DATA/test/:

    real       training images, those in DATA/tiny-imagenet-200/train/ (no label is used)
    synthetic  as many images of RUN's memory/, the newest
    all        all images of RUN's memory/
    run        trains nothing: the student of RUN

Prints rows of limits.csv: the accuracy, and how often S predicts T's class.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "results"), str(ROOT / "teachers")]
import ablations  # noqa: E402
import squeezenet  # noqa: E402
import torch  # noqa: E402
import train  # noqa: E402

import nayer  # noqa: E402

STEPS, EPOCHS, BATCH = 400, 4, 64
AMP = torch.autocast("cpu", torch.bfloat16)


def real_images(root):
    """uint8 (n, 3, 64, 64)"""
    images, _ = train.stack(train.training_tiny_imagenet(root, 3, 64))
    return images


def made_images(run):
    """uint8 (n, 3, 64, 64), the oldest first"""
    files = sorted((run / "memory").iterdir())
    return torch.cat([nayer.load_tensors(path, "cpu")["images"] for path in files])


def images_of(kind, args):
    if kind == "real":
        return real_images(args.data)
    images = made_images(args.run)
    if kind == "synthetic":
        return images[-len(real_images(args.data)) :]
    return images


def learn(images, teacher, augment):
    """A student that was trained on the images as in a run: SGD with a cosine, R = 4, mix 0.5."""
    torch.manual_seed(0)
    student = squeezenet.half(200)
    memory = nayer.MemoryBank(len(images), 3, 64)
    memory.add(images)
    optimizer = torch.optim.SGD(
        student.parameters(), 0.1, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    settings = dict(steps=STEPS, batch=BATCH, temperature=20.0, reuse=4, mix=0.5)
    for _ in range(EPOCHS):
        nayer.distill(teacher, student, memory, optimizer, augment, AMP, **settings)
        schedule.step()
    return student


def main():
    parser = argparse.ArgumentParser("limits.py", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("run", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("images", nargs="+", choices=["real", "synthetic", "all", "run"])
    args = parser.parse_args()
    teacher = squeezenet.load().eval().requires_grad_(False)
    info = teacher.info | dict(channels=3)
    augment = nayer.Augment(info["mean"], info["std"], padding=4, flip=True)
    flags = ["--dataset", "folder", "--data-root", str(args.data)]
    batches = nayer.test_batches(nayer.parse_args(flags), info)
    of_teacher = ablations.labelled_by(teacher, batches, augment, AMP)
    print("images,number,accuracy,T's class")
    for kind in args.images:
        images = images_of(kind, args)
        if kind == "run":
            network = squeezenet.half(200)
            student = nayer.load_model(args.run / "student.safetensors", network)
        else:
            student = learn(images, teacher, augment)
        accuracy = 100 * nayer.accuracy(student, batches, augment, AMP)
        as_teacher = 100 * nayer.accuracy(student, of_teacher, augment, AMP)
        print(f"{kind},{len(images)},{accuracy:.2f},{as_teacher:.2f}", flush=True)


if __name__ == "__main__":
    nayer.run_script(main)
