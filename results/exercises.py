"""The exercises that edit nayer.py (results/exercises.md): python results/exercises.py ACTION

    edits      4 and 5, beside nayer.py as it is (results/exercises.csv)
    gradients  2: how large those of L_CE and L_BN over the weights of G are, mean over the steps of
               all batches but the first (results/exercises_gradients.csv)
    generators 8: G as it is, a single linear layer, and that with a BatchNorm
               (results/exercises_generators.csv)

Each edit is made in a copy of nayer.py, in runs/exercises/, which distils the digits with seeds 0
to 2.
"""

import re
import shutil
import statistics
import subprocess
import sys

import ablations
import figures

ROOT = ablations.ROOT
KEEP = "best_images = torch.where(better, images.detach(), best_images)"
LOSS = "loss = sum(alphas[name] * value for name, value in losses.items())"
ACROSS = "(images[..., 1:] - images[..., :-1]).abs().mean()"
DOWN = "(images[..., 1:, :] - images[..., :-1, :]).abs().mean()"
GRADIENTS = """
        for name in ("loss_ce", "loss_bn"):
            term = alphas[name] * losses[name]
            slopes = torch.autograd.grad(term, list(generator.parameters()), retain_graph=True)
            print("gradient", sum(slope.square().sum() for slope in slopes).sqrt().item())"""
EDITS = {  # exercise: (the text of nayer.py, what takes its place)
    "as it is": (KEEP, KEEP),
    "4: keep the last step's images": (KEEP, "best_images = images.detach()"),
    "5: add the total variation, weight 10": (LOSS, f"{LOSS} + 10 * ({ACROSS} + {DOWN})"),
    "5: add the total variation, weight 50": (LOSS, f"{LOSS} + 50 * ({ACROSS} + {DOWN})"),
}
GENERATOR = "generator = Generator(hidden_size, channels, size, args.generator_width)"
LINEAR = """class LinearGenerator(nn.Module):
            def __init__(self, hidden_size, image_shape):
                super().__init__()
                self.image_shape = image_shape
                self.linear = nn.Linear(hidden_size, math.prod(image_shape))
                self.norm = NORM

            def forward(self, hidden):
                numbers = self.norm(self.linear(hidden))
                return numbers.float().sigmoid().view(-1, *self.image_shape)

        generator = LinearGenerator(hidden_size, (channels, size, size))"""
GENERATORS = {  # what takes the place of GENERATOR
    "as it is": GENERATOR,
    "linear": LINEAR.replace("NORM", "nn.Identity()"),
    "linear, BatchNorm": LINEAR.replace("NORM", "nn.BatchNorm1d(math.prod(image_shape))"),
}
BALANCES = ("", "--bn-momentum 0", "--bn-momentum 0 --alpha-bn 0.3")
SEEDS = range(3)


def edited_copy(name, old, new):
    """A folder in runs/exercises/ with nayer.py, in which one text is replaced, and teachers/."""
    folder = ROOT / "runs/exercises" / name
    source = (ROOT / "nayer.py").read_text(encoding="utf-8")
    assert source.count(old) == 1, f"nayer.py has changed: {old}"
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier call
    shutil.copytree(ROOT / "teachers", folder / "teachers")
    (folder / "nayer.py").write_text(source.replace(old, new), encoding="utf-8")
    return folder


def distil(folder, flags):
    """Run the nayer.py in `folder`. Returns what it printed."""
    command = [sys.executable, "nayer.py", *flags.split()]
    done = subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout


def edits():
    rows = []
    for number, (name, (old, new)) in enumerate(EDITS.items()):
        folder = edited_copy(str(number), old, new)
        for seed in SEEDS:
            distil(folder, f"--seed {seed} --out {seed} --agree-batches 0")
            found = figures.measured(folder / str(seed))
            row = dict(exercise=name, seed=seed)
            rows.append(row | {key: found[key] for key in ("accuracy", "best_is_last", "batches")})
    figures.write(ROOT / "results/exercises.csv", rows)


def generators():
    rows = []
    for name, text in GENERATORS.items():
        folder = edited_copy(name, GENERATOR, text)
        for seed in SEEDS:
            distil(folder, f"{ablations.CUT} --seed {seed} --out {seed}")
            last = figures.read(folder / f"{seed}/log.csv")[-1]
            numbers = {key: last[key] for key in ("loss_ce", "loss_bn", "accuracy")}
            rows.append(dict(generator=name, seed=seed) | numbers)
    figures.write(ROOT / "results/exercises_generators.csv", rows)


def gradients():
    folder = edited_copy("gradients", LOSS, LOSS + GRADIENTS)
    rows = []
    for number, flags in enumerate(BALANCES):
        for seed in SEEDS:
            out = f"--seed {seed} --out {number}_{seed} --agree-batches 0 --no-eval"
            printed = distil(folder, f"{ablations.CUT} {flags} {out}")
            sizes = [float(text) for text in re.findall("gradient (.*)", printed)]
            steps = 20  # of the first batch, for which L_BN has no average yet
            of_ce = statistics.fmean(sizes[2 * steps :: 2])
            of_bn = statistics.fmean(sizes[2 * steps + 1 :: 2])
            rows.append(dict(flags=flags, seed=seed, ce=of_ce, bn=of_bn, ratio=of_bn / of_ce))
    figures.write(ROOT / "results/exercises_gradients.csv", rows)


if __name__ == "__main__":
    parser = figures.parser_of("exercises.py", __doc__)
    parser.add_argument("action", choices=["edits", "gradients", "generators"])
    actions = dict(edits=edits, gradients=gradients, generators=generators)
    actions[parser.parse_args().action]()
