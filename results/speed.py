"""Speed: python results/speed.py compare | tricks | matrices, from the project's root.

    compare  nayer.py with and without bf16, with R = 4, and a plain loop in the way of the authors,
             in turns, on one device: a GPU if there is one (results/speed_zen5.txt)
    tricks   nayer.py in float32 with each of two tricks left out (results/speed_tricks.txt)
    matrices Z alone with 200 classes: a matrix for each set of classes, or for each image
             (results/speed_matrices.txt)

compare and tricks have CIFAR-10 shapes: wrn40_2 to wrn16_2, 400 images a generator step, 512 a
student step. The plain loop is written for this comparison: float32, PyTorch's usual memory layout,
a list of linear layers for Z, L_BN from composed operations, a teacher that is not frozen, the
memory as PNG files behind a DataLoader of four processes, a line printed at every step.
"""

import argparse
import contextlib
import io
import statistics
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import nayer  # noqa: E402

TEACHER = ROOT / "teachers/cifar10_wrn40_2.safetensors"
STEPS = 10  # timed steps of a phase
ROUNDS = 3
DEVICE, _ = nayer.pick_device("auto")


# ---- A plain loop --------------------------------------------------------------------------------
class PlainNoisyLayers(nn.Module):
    def __init__(self, embedding_size, count):
        super().__init__()
        self.norm = nn.BatchNorm1d(embedding_size)
        self.layers = nn.ModuleList(nn.Linear(embedding_size, 1000) for _ in range(count))

    def forward(self, inputs):
        sets = self.norm(inputs).chunk(len(self.layers))
        return torch.cat([layer(rows) for layer, rows in zip(self.layers, sets)])


def plain_generator():
    """nayer.Generator(1000, 3, 32), up-sampling and convolution one after the other."""
    layers = [nn.Linear(1000, 128 * 64), nn.Unflatten(1, (128, 8, 8)), nn.BatchNorm2d(128)]
    for outputs in (128, 64):
        layers += [nn.Upsample(scale_factor=2), nn.Conv2d(128, outputs, 3, padding=1, bias=False)]
        layers += [nn.BatchNorm2d(outputs), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Conv2d(64, 3, 3, padding=1), nn.Sigmoid())


class StatisticsHook:
    """The part of L_BN that one layer adds."""

    def __init__(self, module):
        module.register_forward_hook(self.read)

    def read(self, module, inputs, output):
        x = inputs[0]
        mean = x.mean((0, 2, 3))
        var = x.permute(1, 0, 2, 3).reshape(x.shape[1], -1).var(1, unbiased=False)
        self.value = (module.running_mean - mean).norm() + (module.running_var - var).norm()


class Pictures(Dataset):
    """The PNG files in a folder, again and again."""

    def __init__(self, folder, normalize):
        self.files = sorted(folder.glob("*.png"))
        crop, flip = transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()
        self.transform = transforms.Compose([crop, flip, transforms.ToTensor(), normalize])

    def __len__(self):
        return 512 * STEPS  # all timed: its processes read 8 batches ahead

    def __getitem__(self, index):
        return self.transform(Image.open(self.files[index % len(self.files)]).convert("RGB"))


def plain_generator_steps(teacher, student, normalize, steps=3):
    """(seconds per step, the last step's images). A step before these is not timed."""
    generator = plain_generator().to(DEVICE)
    noisy = PlainNoisyLayers(384, 40).to(DEVICE)
    labels = torch.arange(10, device=DEVICE).repeat(40)
    embeddings = torch.randn(10, 384, device=DEVICE)
    hooks = [StatisticsHook(m) for m in teacher.modules() if isinstance(m, nn.BatchNorm2d)]
    parameters = [*generator.parameters(), *noisy.parameters()]
    optimizer = torch.optim.Adam(parameters, 4e-3, (0.5, 0.999))
    augment = transforms.Compose([transforms.RandomCrop(32, padding=4), normalize])
    student.eval()
    for step in range(steps + 1):
        if step == 1:
            start = time.perf_counter()
        images = generator(noisy(embeddings[labels]))
        views = augment(images)
        teacher_logits = teacher(views)
        loss_bn = sum(hook.value for hook in hooks)
        loss_ce = F.cross_entropy(teacher_logits, labels)
        loss_adv = nayer.adversarial_loss(student(views), teacher_logits)
        loss = 0.5 * loss_ce + 10 * loss_bn + 1.33 * loss_adv
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        # This waits for the device, so that the clock is read when the step is done.
        print(step, loss_ce.item(), loss_bn.item(), loss_adv.item(), file=sys.stderr)
    return (time.perf_counter() - start) / steps, images.detach()


def plain_student_steps(teacher, student, normalize, folder):
    """Seconds per step."""
    loader = DataLoader(Pictures(folder, normalize), batch_size=512, shuffle=True, num_workers=4)
    optimizer = torch.optim.SGD(student.parameters(), 0.2, 0.9, weight_decay=1e-4)
    student.train()
    start = time.perf_counter()
    for step, views in enumerate(loader):
        views = views.to(DEVICE)
        with torch.no_grad():
            teacher_logits = teacher(views)
        loss = nayer.distillation_loss(student(views), teacher_logits, 20)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(step, loss.item(), file=sys.stderr)
    return (time.perf_counter() - start) / STEPS


def time_plain():
    """(seconds per generator step, seconds per student step)"""
    teacher = nayer.load_model(TEACHER)
    normalize = transforms.Normalize(teacher.info["mean"], teacher.info["std"])
    teacher = teacher.to(DEVICE)
    student = nayer.build_model("wrn16_2", 10).to(DEVICE)
    generator_step, images = plain_generator_steps(teacher, student, normalize)
    with tempfile.TemporaryDirectory() as folder:
        pixels = (images * 255).byte().permute(0, 2, 3, 1).cpu().numpy()
        for k, image in enumerate(pixels):
            Image.fromarray(image).save(f"{folder}/{k}.png")
        student_step = plain_student_steps(teacher, student, normalize, Path(folder))
    return generator_step, student_step


# ---- nayer.py ------------------------------------------------------------------------------------
def timed(phase, seconds):
    """Within this context, the seconds of the last call of nayer.synthesize or nayer.distill are
    in `seconds`, by its name."""

    def run(*args, **settings):
        start = time.perf_counter()
        result = phase(*args, **settings)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        seconds[phase.__name__] = time.perf_counter() - start
        return result

    return patch.object(nayer, phase.__name__, run)


def time_nayer(flags):
    """(seconds per generator step, seconds per student step) of the second epoch. The first is
    warm-up."""
    seconds = {}
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
        command = (
            f"--dataset cifar10 --warmup-epochs 0 --epochs 2 --batches 1 --no-eval "
            f"--agree-batches 0 --generator-steps {STEPS} --student-steps {STEPS} "
            f"--out {out}/run {flags}"
        )
        with timed(nayer.synthesize, seconds), timed(nayer.distill, seconds):
            nayer.main(command.split())
    steps = nayer.parse_args(command.split()).student_steps
    return seconds["synthesize"] / STEPS, seconds["distill"] / steps


class ComposedStatistics:
    """What takes the place of nayer.BatchStatistics."""

    @staticmethod
    def apply(x):
        var, mean = torch.var_mean(x.float(), (0, 2, 3), correction=0)
        return mean, var


def upsample_then_convolve(self, maps):
    """What takes the place of nayer.UpsampleConv.forward."""
    maps = F.interpolate(maps, scale_factor=2)
    return F.conv2d(maps, self.weight, padding=1)


# ---- Z alone -------------------------------------------------------------------------------------
def time_noisy_layer(batch, images_per_matrix, steps=3):
    """Seconds of a forward and a backward pass and a step of Adam, after one that is not timed."""
    noisy_layer = nayer.NoisyLayer(384, batch // images_per_matrix, images_per_matrix).to(DEVICE)
    optimizer = torch.optim.Adam(noisy_layer.parameters(), 4e-3, (0.5, 0.999), fused=True)
    inputs = torch.randn(batch, 384, device=DEVICE)
    for step in range(steps + 1):
        if step == 1:
            start = time.perf_counter()
        loss = noisy_layer(inputs).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()  # waits for the device
    return (time.perf_counter() - start) / steps


def matrices():
    """Weights, gradients and Adam's two averages are four tensors of the same size."""
    print("| images | images of a matrix | matrices | memory, MB | a step, s |")
    print("|---|---|---|---|---|")
    for batch in (200, 400):
        for images_per_matrix in (200, 1):
            count = batch // images_per_matrix
            megabytes = 4 * 4 * count * 384 * nayer.HIDDEN_SIZE / 1e6
            seconds = [time_noisy_layer(batch, images_per_matrix) for _ in range(ROUNDS)]
            cells = [batch, images_per_matrix, count, f"{megabytes:,.0f}"]
            print(f"| {' | '.join(map(str, cells))} | {median_and_range(seconds, 4)} |")


# ---- In turns ------------------------------------------------------------------------------------
def time_kind(kind):
    if kind == "plain":
        return time_plain()
    if kind == "plainup":
        with patch.object(nayer.UpsampleConv, "forward", upsample_then_convolve):
            return time_nayer("--no-amp")
    if kind == "composed":
        with patch.object(nayer, "BatchStatistics", ComposedStatistics):
            return time_nayer("--no-amp")
    # With reuse R, the student steps are R passes over 16 batches.
    return time_nayer(kind.replace("nayer.py", "").replace("--reuse 4", REUSE))


REUSE = "--reuse 4 --student-steps 64"
KINDS = dict(
    compare=["plain", "nayer.py --no-amp", "nayer.py", "nayer.py --reuse 4"],
    tricks=["nayer.py --no-amp", "plainup", "composed"],
)


def median_and_range(values, digits):
    low, high = min(values), max(values)
    return f"{statistics.median(values):.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def main():
    parser = argparse.ArgumentParser("speed.py", usage=argparse.SUPPRESS, description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("action", choices=[*KINDS, "matrices"])
    action = parser.parse_args().action
    if action == "matrices":
        matrices()
        return
    kinds = KINDS[action]
    found = {kind: [] for kind in kinds}
    for _ in range(ROUNDS):  # in turns, so that all run on the same machine
        for kind, pairs in found.items():
            pairs.append(time_kind(kind))
            print(kind, f"{pairs[-1][0]:.3f} {pairs[-1][1]:.3f}", flush=True)
    print("\n| | generator step (400), s | ratio | student step (512), s | ratio |")
    print("|---|---|---|---|---|")
    for kind, pairs in found.items():
        cells = [kind]
        for phase in (0, 1):
            values = [pair[phase] for pair in pairs]
            ratios = [one[phase] / pair[phase] for one, pair in zip(found[kinds[0]], pairs)]
            cells.append(median_and_range(values, 2))
            cells.append(median_and_range(ratios, 1))
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    nayer.run_script(main)
