"""Choose the settings of the CPU recipe on images that are not test images.

    python results/search.py --data-root data/cifar10_jpeg --out runs/search

Two halves, each trial a row of results/search.csv, written as it ends; a row that is there already
is not measured again. Synthesis: banks of equal cost (generator steps x images), all without L_adv,
teach the same student. Distillation: students of equal cost learn from one bank. Scored on 5,000
JPEG *training* images (the first 500 of each class), which wrn40_2 has seen in its training and no
student here. nayer.py reads none of them.
"""

import argparse
import csv
import math
import sys
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Subset

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import nayer  # noqa: E402

BANK = dict(batch=200, steps=15, lr=4e-3, ce=0.5, bn=10.0)
STUDENT = dict(reuse=4, mix=0.5, batch=64, lr=0.2, temperature=20.0, cost=140.0)
COLUMNS = ["trial", "seed", *(f"bank_{key}" for key in BANK), *STUDENT]
COLUMNS += ["images", "seconds_bank", "seconds_student", "accuracy"]
IMAGE_STEP, VIEW, ANSWER = 6.1e-3, 1.05e-3, 1.7e-3  # seconds: an image in G's step; S's; T's


def validation(root):
    """5,000 training images as batches, as nayer.test_batches gives test images."""
    data = nayer.image_folder(root / "train", 3, 32)
    chosen = [k for y in range(10) for k in torch.tensor(data.targets).eq(y).nonzero()[:500, 0]]
    return list(DataLoader(Subset(data, chosen), batch_size=500))


class Trials:
    def __init__(self, args):
        self.args, self.table = args, ROOT / "results/search.csv"
        self.teacher = nayer.load_model(ROOT / "teachers/cifar10_wrn40_2.safetensors")
        self.teacher.requires_grad_(False)
        info = self.teacher.info
        self.augment = nayer.Augment(info["mean"], info["std"], 4, True)
        prompt = "a photo of {class}"
        names = info["class_names"]
        self.words = nayer.label_text_embeddings(names, nayer.TEXT_ENCODER, prompt)
        self.place(self.teacher)
        self.images = validation(args.data_root)

    @staticmethod
    def place(model):
        model.to(memory_format=torch.channels_last)
        model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
        return model

    def bank(self, seed, cost, batch, steps, lr, ce, bn):
        """uint8 images made in about `cost` seconds, and the seconds that it took."""
        path = self.args.out / f"bank_{seed}_{cost}_{batch}_{steps}_{lr}_{ce}_{bn}.pt"
        if path.exists():
            return torch.load(path)
        torch.manual_seed(seed)
        student = self.place(nayer.build_model("wrn16_1", 10))
        generator = self.place(nayer.Generator(1000, 3, 32))
        noisy, made = nayer.NoisyLayer(384, batch // 10, 10), []
        bn_loss, labels = nayer.BatchNormLoss(self.teacher, 0.9), nayer.class_sets(10, batch)
        start = time.perf_counter()
        for _ in range(round(cost / IMAGE_STEP / batch / steps)):
            noisy.reinitialize()
            networks = (self.teacher, student, bn_loss, self.augment)
            how = dict(steps=steps, lr=lr, alpha_ce=ce, alpha_bn=bn, alpha_adv=0.0)
            inputs = self.words[labels]
            images, losses = nayer.synthesize(generator, noisy, inputs, labels, *networks, **how)
            bn_loss.update()
            made.append(images)
        bn_loss.close()
        print(f"L_CE {losses[-1, 0]:.3f}, L_BN {losses[-1, 1]:.3f} at the end")
        state = dict(images=torch.cat(made), seconds=time.perf_counter() - start)
        nayer.write_atomically(path, lambda file: torch.save(state, file))
        return state

    def student(self, seed, images, reuse, mix, batch, lr, temperature, cost):
        """Accuracy of a student that learns from `images` for about `cost` seconds."""
        torch.manual_seed(seed)
        memory = nayer.MemoryBank(len(images), 3, 32)
        memory.add(images)
        student = self.place(nayer.build_model("wrn16_1", 10))
        optimizer = torch.optim.SGD(student.parameters(), lr, 0.9, weight_decay=1e-4, fused=True)
        rounds = 12
        steps = round(cost / (VIEW + ANSWER / reuse) / batch / rounds)
        for k in range(rounds):
            rate = 2e-4 + (lr - 2e-4) * (1 + math.cos(math.pi * k / rounds)) / 2
            optimizer.param_groups[0]["lr"] = rate
            how = dict(steps=steps, batch=batch, temperature=temperature, reuse=reuse, mix=mix)
            nayer.distill(self.teacher, student, memory, optimizer, self.augment, **how)
        return nayer.accuracy(student, self.images, self.augment)

    def run(self, trial, seed, cost=240.0, bank=(), student=()):
        """One row of the table, unless it is there."""
        rows = list(csv.DictReader(self.table.open())) if self.table.exists() else []
        if any(row["trial"] == trial and row["seed"] == str(seed) for row in rows):
            return
        bank, student = BANK | dict(bank), STUDENT | dict(student)
        made = self.bank(seed, cost, **bank)
        start = time.perf_counter()
        accuracy = self.student(seed, made["images"], **student)
        seconds = time.perf_counter() - start
        row = [trial, seed, *bank.values(), *student.values(), len(made["images"])]
        row += [round(made["seconds"], 1), round(seconds, 1), accuracy]
        with self.table.open("a") as file:
            writer = csv.writer(file)
            if not rows:
                writer.writerow(COLUMNS)
            writer.writerow(row)
        print(*row, flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-root", type=Path, default=Path("data/cifar10_jpeg"))
    parser.add_argument("--out", type=Path, default=Path("runs/search"))
    trials = Trials(parser.parse_args())
    trials.run("15 steps for 200 images", 0)
    few = dict(steps=8)
    trials.run("8 steps for 200 images", 0, bank=few)
    trials.run("8 steps for 100 images", 0, bank=dict(steps=8, batch=100))
    trials.run("R = 16", 0, bank=few, student=dict(reuse=16))
    trials.run("batch 32, rate 0.1", 0, bank=few, student=dict(batch=32, lr=0.1))
    trials.run("tau = 4", 0, bank=few, student=dict(temperature=4.0))
    trials.run("no mixing", 0, bank=few, student=dict(mix=0.0))
    trials.run("all views mixed", 0, bank=few, student=dict(mix=1.0))


if __name__ == "__main__":
    nayer.run_script(main)
