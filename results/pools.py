"""How many views should S meet before it meets one again? Students of ten minutes, on a fixed bank.

    python results/pools.py --data-root data/cifar10_jpeg --bank runs/long

Each trial distils the teacher into a new wrn16_1 by nayer.distill, from the images of the finished
run --bank or from 45,000 of the training images, and is scored on the other 5,000 (the first 500 of
each class), which the teacher has seen in its training. No test image is read. Per trial one row in
results/pools.csv; a row that is there already is not measured again. A student step is the preset
`cpu`'s but for what the trial's name says; the rate falls with every step.
"""

import argparse
import csv
import math
import sys
import time
from pathlib import Path

import figures
import torch
import torch.nn as nn

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "results/pools.csv"
sys.path.insert(0, str(ROOT))
import nayer  # noqa: E402

COLUMNS = "trial images reuse pool steps seconds accuracy agree loss_kd".split()
TRIALS = {  # name: R, batches in a pool, student steps
    "pools of 16 batches": (4, 16, 14336),
    "pools of 256 batches": (4, 256, 14336),
    "R = 1": (1, 1, 9150),
    "pools of 256 batches, Muon": (4, 256, 13312),
    "pools of 256 batches, real images": (4, 256, 14336),
}


class Bf16(nn.Module):
    """A network that computes in bf16 and keeps its weights in float32."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.model(x)


class Optimizer:
    """SGD of the preset `cpu` whose rate falls as a cosine to 0 within `steps` steps. muon: the
    convolutions' weights follow their momentum with all its singular values brought near 1 (Jordan
    et al. 2024, by five steps of their Newton-Schulz iteration), at 0.06 times the same cosine."""

    def __init__(self, student, steps, muon):
        self.student, self.steps, self.done = student, steps, 0
        kernels = [p for p in student.parameters() if muon and p.ndim == 4]
        others = [p for p in student.parameters() if not (muon and p.ndim == 4)]
        self.sgd = torch.optim.SGD(others, 0.1, 0.9, weight_decay=5e-4, nesterov=True)
        self.kernels = [(p, torch.zeros_like(p)) for p in kernels]

    def zero_grad(self):
        self.student.zero_grad()

    @torch.no_grad()
    def step(self):
        cosine = 0.5 * (1 + math.cos(math.pi * self.done / self.steps))
        self.done += 1
        self.sgd.param_groups[0]["lr"] = 0.1 * cosine
        self.sgd.step()
        for p, momentum in self.kernels:
            momentum.mul_(0.9).add_(p.grad)
            x = p.grad.add(momentum, alpha=0.9).reshape(len(p), -1)
            tall = x.shape[0] > x.shape[1]
            x = x.T if tall else x
            x = x / (x.norm() + 1e-7)
            for _ in range(5):
                a = x @ x.T
                x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
            x = x.T if tall else x
            size = 0.06 * cosine * max(1, x.shape[0] / x.shape[1]) ** 0.5
            p.mul_(1 - 0.06 * cosine * 0.01).add_(x.reshape(p.shape), alpha=-size)


def photographs(root):
    """(45,000 training images, 5,000 others, labels of these), uint8 (n, 3, 32, 32)."""
    images = nayer.image_folder(root / "train", 3, 32)
    parts, labels = {True: [], False: []}, []
    seen = [0] * len(images.classes)
    for image, label in images:
        held_out = seen[label] < 500
        seen[label] += 1
        parts[held_out].append(image)
        labels += [label] * held_out
    return torch.stack(parts[False]), torch.stack(parts[True]), torch.tensor(labels)


def trial(name, images, validation, labels):
    reuse, pool, steps = TRIALS[name]
    teacher = nayer.load_model(ROOT / "teachers/cifar10_wrn40_2.safetensors").requires_grad_(False)
    augment = nayer.Augment(teacher.info["mean"], teacher.info["std"], 4, True)
    torch.manual_seed(0)
    student = nayer.build_model("wrn16_1", 10)
    teacher, student = (Bf16(m.to(memory_format=torch.channels_last)) for m in (teacher, student))
    teacher.eval()
    memory = nayer.MemoryBank(len(images), 3, 32)
    memory.add(images)
    optimizer = Optimizer(student, steps, "Muon" in name)
    how = dict(batch=64, temperature=20.0, reuse=reuse, mix=0.5)
    start = time.perf_counter()
    while optimizer.done < steps:
        part = pool * reuse if reuse > 1 else 50  # nayer.distill makes one pool of it
        losses = nayer.distill(teacher, student, memory, optimizer, augment, steps=part, **how)
        print(f"{name}: {optimizer.done} steps, L_KD {losses.mean():.3f}", flush=True)
    seconds = time.perf_counter() - start
    student.eval()
    with torch.no_grad():
        views = [augment.normalize(x.float() / 255) for x in validation.split(250)]
        t, s = (torch.cat([m(x).float() for x in views]) for m in (teacher, student))
    share = [(s.argmax(1) == y).float().mean().item() for y in (labels, t.argmax(1))]
    found = (*share, nayer.distillation_loss(s, t, 20.0).item())
    found = [name, len(images), reuse, pool, steps, round(seconds), *(round(v, 4) for v in found)]
    fresh = not TABLE.exists()
    with open(TABLE, "a", newline="") as file:
        csv.writer(file).writerows([COLUMNS, found] if fresh else [found])
    print(*found, flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-root", type=Path, default=Path("data/cifar10_jpeg"))
    parser.add_argument("--bank", type=Path, default=Path("runs/long"))
    args = parser.parse_args()
    done = {row["trial"] for row in figures.read(TABLE)} if TABLE.exists() else ()
    real, validation, labels = photographs(args.data_root)
    bank = torch.cat([figures.made(args.bank, epoch)[0] for epoch in figures.epochs(args.bank)])
    for name in TRIALS:
        if name not in done:
            trial(name, real if "real" in name else bank, validation, labels)


if __name__ == "__main__":
    nayer.run_script(main)
