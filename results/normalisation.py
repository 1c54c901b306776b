"""Does L_BN name T's normalisation? python results/normalisation.py [TEACHER ...]

For the shipped teachers, for CIFAR-10's behind a swap of the channels and with its normalisation
inside, and for each TEACHER (as for --teacher), whose .info must be right. Two kinds of images:

    photos  squares of two photographs, as in which_normalisation.py; seeds 0 and 1
    made    by G, as for `agree`: the last of five batches of 100 images, ten steps each; seed 0; of
            the swapped orders only the right candidate's

A row for each network, kind, seed and candidate goes to results/normalisation.csv; what is there is
not measured again. Then the tables are printed.
"""

import statistics
import sys
from pathlib import Path

import figures
import torch
import torch.nn as nn
import which_normalisation

import nayer

FILE = figures.ROOT / "results/normalisation.csv"
SCORES = ("loss_bn", "loss_ce", "saturated")
DIGITS = "teachers/digits_wrn10_2.safetensors"
CIFAR10 = "teachers/cifar10_wrn40_2.safetensors"
HERE = str(Path(__file__).resolve())
DERIVED = (f"{HERE}:swapped", f"{HERE}:inside")  # of CIFAR10: G makes the same images for them
AMP = torch.autocast("cpu", torch.bfloat16, enabled=nayer.pick_device("cpu")[1])


class Before(nn.Module):
    """A network behind a function of the images."""

    def __init__(self, function, network, mean, std):
        super().__init__()
        self.function, self.network = function, network
        self.info = network.info | dict(mean=mean, std=std)

    def forward(self, images):
        return self.network(self.function(images))


def swap(images):
    return images.flip(1)  # RGB <-> BGR


def swapped():
    """The shipped network for CIFAR-10, as if it had been trained on BGR."""
    network = nayer.load_model(CIFAR10)
    mean, std = network.info["mean"], network.info["std"]
    return Before(swap, network, mean, std)


def inside():
    """The same, with its normalisation inside."""
    network = nayer.load_model(CIFAR10)
    augment = nayer.Augment(network.info["mean"], network.info["std"], padding=0, flip=False)
    return Before(augment.normalize, network, [0.0] * 3, [1.0] * 3)


# ---- Scores, the lowest of which should be that of the right candidate ---------------------------
def on_made_images(name, candidate):
    """SCORES of a batch of images that G made, as if the candidate were right."""
    teacher, info = nayer.load_teacher(nayer.parse_args(["--teacher", name]))
    mean, std, order = candidate
    if order == "BGR":
        teacher = Before(swap, teacher, mean, std)
    digits = info["channels"] == 1
    args = nayer.parse_args(["--preset", "digits" if digits else "cifar10"])
    C, channels, size = len(info["class_names"]), info["channels"], info["image_size"]
    bn_loss = nayer.BatchNormLoss(nayer.batch_norms(teacher), args.bn_momentum)
    augment = nayer.Augment(mean, std, args.crop_padding, args.flip)
    torch.manual_seed(0)
    K = min(C, 100)
    noisy_layer = nayer.NoisyLayer(C, 100 // K, K)
    generator = nayer.Generator(nayer.HIDDEN_SIZE, channels, size, width=32)
    alphas = dict(loss_ce=args.alpha_ce, loss_bn=args.alpha_bn, loss_adv=0.0)
    for _ in range(5):
        noisy_layer.reinitialize()
        labels = nayer.class_sets(C, 100)
        student = nn.Identity()  # L_adv is off
        fixed = (torch.eye(C)[labels], labels, teacher, student, bn_loss, augment, AMP)
        images, losses = nayer.synthesize(
            generator, noisy_layer, *fixed, steps=10, lr=args.generator_lr, alphas=alphas
        )
    found = {key: losses[key][-1].item() for key in ("loss_bn", "loss_ce")}
    found["saturated"] = ((images == 0) | (images == 255)).float().mean().item()
    return found


def candidates_of(info):
    """{name: (mean, std, order of the channels)}"""
    known = dict(which_normalisation.KNOWN)
    if info["channels"] == 1:
        known = {name: ([mean[1]], [std[1]]) for name, (mean, std) in known.items()}
    if (info["mean"], info["std"]) not in known.values():
        known[".info"] = (info["mean"], info["std"])
    orders = ("RGB", "BGR") if info["channels"] == 3 else ("RGB",)
    found = {}
    for name, (mean, std) in known.items():
        for order in orders:
            found[f"{name}, {order}"] = (mean, std, order)
    return found


def right_one(name, info):
    """The right candidate: .info, or the known one that has the same values."""
    order = "BGR" if name.endswith(":swapped") else "RGB"
    for known, values in which_normalisation.KNOWN.items():
        if values == (info["mean"], info["std"]):
            return f"{known}, {order}"
    return f".info, {order}"


def measure(name, rows):
    """Add the rows of a network that are not there."""
    _, info = nayer.load_teacher(nayer.parse_args(["--teacher", name]))
    word = Path(name).name
    done = {(row["network"], row["images"], int(row["seed"])) for row in rows}
    common = dict(network=word, right=right_one(name, info))
    for seed in (0, 1):
        if info["channels"] == 3 and (word, "photos", seed) not in done:
            torch.manual_seed(seed)
            found = which_normalisation.rank(name)
            for candidate in candidates_of(info):
                row = common | dict(images="photos", seed=seed, candidate=candidate)
                rows.append(row | dict(loss_bn=found[candidate], loss_ce="", saturated=""))
    if (word, "made", 0) not in done and name not in DERIVED:
        for candidate, values in candidates_of(info).items():
            if candidate.endswith("BGR") and candidate[:-3] != common["right"][:-3]:
                continue
            row = common | dict(images="made", seed=0, candidate=candidate)
            rows.append(row | on_made_images(name, values))
    figures.write(FILE, rows)


# ---- Tables --------------------------------------------------------------------------------------
def print_table(rows, images, score):
    """A row for each network, a column for each candidate: the mean over the seeds."""
    names = list(dict.fromkeys(row["candidate"] for row in rows))
    print()
    figures.print_row(f"{images}, {score}", "right", *names)
    print("|---" * (len(names) + 2) + "|")
    for network in dict.fromkeys(row["network"] for row in rows):
        own = [row for row in rows if row["network"] == network and row["images"] == images]
        cells = []
        for name in names:
            found = [float(row[score]) for row in own if row["candidate"] == name]
            cells.append(f"{statistics.fmean(found):.3g}" if found else "")
        if own:
            figures.print_row(network, own[0]["right"], *cells)


def print_counts(rows, images, score):
    """In how many networks the right candidate has the lowest score in each seed."""
    named, networks = 0, dict.fromkeys(r["network"] for r in rows if r["images"] == images)
    for network in networks:
        own = [row for row in rows if row["network"] == network and row["images"] == images]
        lowest = []
        for seed in {row["seed"] for row in own}:
            values = [row for row in own if row["seed"] == seed]
            best = min(float(row[score]) for row in values)
            right = [float(r[score]) for r in values if r["candidate"] == r["right"]]
            lowest.append(right[0] == best)
        named += all(lowest)
    figures.print_row(f"{images}, {score}", f"{named} of {len(networks)}")


def report(rows):
    for images, score in (("photos", "loss_bn"), ("made", "loss_bn")):
        print_table(rows, images, score)
    print()
    figures.print_row("images, score", "right one is the lowest")
    print("|---" * 2 + "|")
    print_counts(rows, "photos", "loss_bn")
    for score in SCORES:
        print_counts(rows, "made", score)


def main():
    rows = figures.read(FILE) if FILE.exists() else []
    for name in [DIGITS, CIFAR10, *DERIVED, *sys.argv[1:]]:
        measure(name, rows)
    report(rows)


if __name__ == "__main__":
    nayer.run_script(main)
