"""How many views should S meet before it meets one again? Students of ten minutes, on a fixed bank.

    python results/pools.py --data-root data/cifar10_jpeg --bank runs/long --out runs/pools

Each trial distils the teacher into a new wrn16_1 by nayer.distill, from the images of the finished
run --bank, and is scored on the 5,000 training images of search.py. Per trial one row in
results/pools.csv; a row that is there already is not measured again. A student step is the preset
`cpu`'s; the rate falls with every step.
"""

import argparse
import math
import os
import sys
import time
from pathlib import Path

import figures
import search
import torch
import torch.nn as nn

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "results/pools.csv"
sys.path.insert(0, str(ROOT))
import nayer  # noqa: E402

POOLS, REUSE, STEPS = (16, 256), 4, 14336  # batches in a pool; R; student steps


class Bf16(nn.Module):
    """A network that computes in bf16 and keeps its weights in float32."""

    def __init__(self, model):
        super().__init__()
        self.model = model.to(memory_format=torch.channels_last)

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.model(x)


def trial(pool, images, validation):
    teacher = nayer.load_model(ROOT / search.TEACHER).requires_grad_(False)
    augment = nayer.Augment(teacher.info["mean"], teacher.info["std"], 4, True)
    torch.manual_seed(0)
    teacher, student = Bf16(teacher).eval(), Bf16(nayer.build_model("wrn16_1", 10))
    memory = nayer.MemoryBank(len(images), 3, 32)
    memory.add(images)
    how = dict(momentum=0.9, weight_decay=5e-4, nesterov=True)
    optimizer = torch.optim.SGD(student.parameters(), 0.1, **how)
    cosine = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / STEPS))
    )
    how = dict(steps=pool * REUSE, batch=64, temperature=20.0, reuse=REUSE, mix=0.5)
    start = time.perf_counter()
    for _ in range(STEPS // (pool * REUSE)):  # nayer.distill makes one pool for its steps
        nayer.distill(teacher, student, memory, optimizer, augment, tick=cosine.step, **how)
    row = dict(pool=pool, images=len(images), steps=STEPS)
    row["seconds"] = round(time.perf_counter() - start)
    row["accuracy"] = nayer.accuracy(student, validation, augment)
    with torch.no_grad():
        views = [augment.normalize(part.float() / 255) for part, _ in validation]
        losses = [nayer.distillation_loss(student(x), teacher(x), 20.0).item() for x in views]
    row["loss_kd"] = round(sum(losses) / len(losses), 4)
    figures.add(TABLE, row)
    print(row, flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-root", type=Path, default=Path("data/cifar10_jpeg"))
    parser.add_argument("--bank", type=Path, default=Path("runs/long"))
    parser.add_argument("--out", type=Path, default=Path("runs/pools"))
    args = parser.parse_args()
    search.validation(args.data_root, args.out)
    names = sorted(os.listdir(args.out / "data/test"))
    validation = nayer.test_batches("folder", args.out / "data", names, 3, 32, "cpu")
    bank = torch.cat([figures.made(args.bank, epoch)[0] for epoch in figures.epochs(args.bank)])
    done = {row["pool"] for row in figures.read(TABLE)} if TABLE.exists() else ()
    for pool in POOLS:
        if str(pool) not in done:
            trial(pool, bank, validation)


if __name__ == "__main__":
    nayer.run_script(main)
