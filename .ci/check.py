"""The maintainers' rules: python .ci/check.py. A line for each violation, and exit code 1.

Who changes nayer.py for themselves need not keep them: no test knows of them."""

import ast
import contextlib
import csv
import hashlib
import io
import json
import re
import statistics
import subprocess
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "results"), str(ROOT / "teachers")]
import ablations  # noqa: E402
import figures  # noqa: E402
import normalisation  # noqa: E402
import scores  # noqa: E402
import train  # noqa: E402

import nayer  # noqa: E402

LINES, TOKENS, TOKENS_IN_A_LINE, METHOD_LINES = 1400, 9000, 11, 555  # of nayer.py
FUNCTION_LINES, MARKDOWN_COLUMNS = 60, 120
TOP = ".ci .github .gitignore LICENSE README.md nayer.py requirements.txt results teachers"
TOP += " test_nayer.py"
ORDER = [  # what nayer.py has, from top to bottom
    "PRESETS = ",
    "def parse_args(",
    "# ---- Label-text embeddings",
    "def label_text_embeddings(",
    "class NoisyLayer(",
    "class Generator(",
    "class BatchNormLoss:",
    "def adversarial_loss(",
    "def distillation_loss(",
    "class MemoryBank:",
    "class Augment:",
    "def synthesize(",
    "def distill(",
    "def main(",
    "# Here the method ends",
    "def build_model(",
]
NOT_IN_HEADER = {"matplotlib", "pytest"}  # for results/ and the tests


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


# ---- Shape ---------------------------------------------------------------------------------------
def tokens_by_line(source):
    """{line: number of tokens of code}. An f-string is one, as it is before Python 3.12."""
    lines = {}
    before = "NEWLINE"
    depth = 0  # of f-strings
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        kind = tokenize.tok_name[token.type]
        is_docstring = kind == "STRING" and before in ("NEWLINE", "INDENT")
        is_code = token.string.strip() and kind not in ("COMMENT", "ENDMARKER")
        if is_code and not is_docstring and depth == 0:
            lines[token.start[0]] = lines.get(token.start[0], 0) + 1
        depth += (kind == "FSTRING_START") - (kind == "FSTRING_END")
        if kind not in ("NL", "COMMENT"):
            before = kind
    return lines


def shape_of_nayer():
    source = read("nayer.py")
    lines = source.splitlines()
    tokens = tokens_by_line(source)
    total = sum(tokens.values())
    if len(lines) > LINES:
        yield f"nayer.py has {len(lines)} lines, more than {LINES}"
    if total > TOKENS:
        yield f"nayer.py has {total} tokens of code, more than {TOKENS}"
    if total > TOKENS_IN_A_LINE * len(tokens):
        yield f"nayer.py has {total / len(tokens):.1f} tokens in a line of code"
    places = {}
    for text in ORDER:
        starts = [i for i, line in enumerate(lines) if line.startswith(text)]
        if len(starts) != 1:
            yield f"nayer.py: {len(starts)} lines begin with {text!r}"
            return
        places[text] = starts[0]
    if list(places.values()) != sorted(places.values()):
        yield f"nayer.py: the order of its parts is not {ORDER}"
    method = places["# Here the method ends"] - 2 - places["# ---- Label-text embeddings"]
    if method > METHOD_LINES:
        yield f"nayer.py: {method} lines from the label-text embeddings to the end of main"


def functions():
    for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("*/*.py")]):
        name = path.relative_to(ROOT)
        source = path.read_text(encoding="utf-8")
        if "fmt: " + "off" in source:
            yield f"{name}: the formatter is off"
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and node.name not in ("main", "parse_args"):
                lines = node.end_lineno - node.lineno + 1
                if lines > FUNCTION_LINES:
                    yield f"{name}: {node.name} has {lines} lines"


def files():
    command = "git ls-files --cached --others --exclude-standard".split()
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    names = listed.stdout.splitlines()
    for name in sorted({name.partition("/")[0] for name in names} - set(TOP.split())):
        yield f"{name} does not belong at the top"
    for name in names:
        if name.endswith(".md") and (ROOT / name).exists():
            for number, line in enumerate(read(name).splitlines(), 1):
                if len(line) > MARKDOWN_COLUMNS and not line.startswith("|"):  # no row of a table
                    yield f"{name}:{number} has {len(line)} columns"


# ---- What is written twice -----------------------------------------------------------------------
def dependencies():
    header = re.search(r"# dependencies = \[\n(.*?)# \]", read("nayer.py"), re.S)[1]
    in_header = set(re.findall(r'"(.*?)"', header))
    required = {line.split("#")[0].strip() for line in read("requirements.txt").splitlines()}
    wanted = {line for line in required if re.split("[>=<]", line)[0] not in NOT_IN_HEADER}
    for line in sorted(in_header ^ wanted):
        yield f"{line}: in one of requirements.txt and the head of nayer.py alone"


def checksums():
    written = re.findall(r"^([0-9a-f]{64})  (\S+)$", read("teachers/README.md"), re.M)
    found = []
    for path in sorted((ROOT / "teachers").iterdir()):
        if path.suffix in (".safetensors", ".json"):
            found.append((hashlib.sha256(path.read_bytes()).hexdigest(), path.name))
    for digest, name in sorted(set(found) - set(written)):
        yield f"teachers/README.md lacks {digest}  {name}"
    for digest, name in sorted(set(written) - set(found)):
        yield f"teachers/README.md has {digest}  {name}, which is not so"


def class_names():
    """Those in the shipped files are those of class_names.json, in the order of the labels."""
    _, about = nayer.read_safetensors(ROOT / "teachers/label_embeddings.safetensors")
    for dataset in train.NAMES:
        names = train.names_by_label(dataset)
        args = nayer.parse_args(["--dataset", dataset])
        if json.loads(about[dataset]) != [args.text_encoder, args.prompt, names]:
            yield f"label_embeddings.safetensors: {dataset} is not of today's names and prompt"
        for path in (ROOT / "teachers").glob(f"{dataset}_*.safetensors"):
            if nayer.load_model(path).info["class_names"] != names:
                yield f"{path.name} has other names than class_names.json"


def paper_map():
    """README's table of the parts of the paper."""
    names = re.findall(r"^\| [^|]+ \| `(\w+)` \| [^|]{15,} \|$", read("README.md"), re.M)
    if len(names) < 12:
        yield f"README.md maps {len(names)} parts of the paper"
    for name in names:
        if not getattr(getattr(nayer, name, None), "__doc__", None):
            yield f"README.md: nayer.py has no documented {name}"


# ---- Figures against their files -----------------------------------------------------------------
def missing(name, *texts):
    """What a Markdown file should have, by the files that its figures are from."""
    found = " ".join(read(name).split())
    for text in texts:
        if " ".join(text.split()) not in found:
            yield f"{name} lacks {text!r}, which follows from the files"


def mean_and_std(values, digits):
    return f"{statistics.fmean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def rows_of(name):
    with open(ROOT / "results" / name, newline="") as file:
        return list(csv.DictReader(file))


def accuracy(place, flags):
    """In %, of a run in results/. An error if the flags would make other settings today."""
    summary = json.loads(read(f"results/{place}"))
    for key, value in vars(nayer.parse_args(flags.split())).items():
        then = str(summary["settings"].get(key, value))
        if key == "bank_size" and then == "None":  # so a bank without a limit was written
            then = "0"
        if key not in nayer.MAY_CHANGE and value is not None and then != str(value):
            if Path(str(value)).name != Path(then).name:
                raise ValueError(f"results/{place} has {key} {then}, not {value}")
    return 100 * summary["student_accuracy"]


def digits():
    rows = {}  # {flags: those of all its seeds}
    for row in rows_of("digits/seeds.csv"):
        rows.setdefault(row["flags"], []).append(row)
    usual = {key: [float(row[key]) for row in rows[""]] for key in ("accuracy", "agree", "seconds")}
    means = {}
    for key, digits in dict(accuracy=2, agree=2, seconds=1).items():
        means[key] = mean_and_std(usual[key][:5], digits)
        cells = " | ".join(f"{value:.1f}" for value in usual[key][:5])
        yield from missing("results/README.md", f"| {cells} | {means[key]} |")
    fast, slow = min(usual["seconds"]), max(usual["seconds"])
    yield from missing("README.md", f"**{means['accuracy']} %**", f"| {fast:.0f} to {slow:.0f} s |")
    off = [abs(one - other) for one, other in zip(usual["accuracy"], usual["agree"])]
    text = f"differs from the accuracy by {statistics.fmean(off):.1f} points in the mean, and by "
    yield from missing("results/README.md", text + f"{max(off):.1f} at most")
    others = ", ".join(f"{value:.4g}" for value in usual["accuracy"][5:9])
    text = f"on seeds 5 to 9: {others} and {usual['accuracy'][9]:.4g} %."
    exact = [float(row["seconds"]) for row in rows["--no-amp"]]
    text += f" In float32 (`--no-amp`, seeds 0 to 2) the command takes {min(exact):.0f} to"
    cells = [row["accuracy"] for row in rows["--no-amp"]]
    text += f" {max(exact):.0f} s, and S has {cells[0]}, {cells[1]} and {cells[2]} %."
    without = statistics.fmean(float(row["seconds"]) for row in rows["--agree-batches 0"])
    text += f" Without the held-out images (`--agree-batches 0`) it takes {without:.0f} s."
    yield from missing("results/README.md", text)
    info = figures.info_of(ROOT / "results/digits")
    if info["settings"] != nayer.settings_of(nayer.parse_args([]), info):
        yield "results/digits is of other settings than today's"
    console = read("results/digits/console.txt").splitlines()
    shown = re.findall(r"^ +\d+ +\d+ .*$", read("README.md"), re.M)
    if len(shown) < 3 or not set(shown) < set(console):
        yield "README.md shows other epochs than results/digits/console.txt"


def cifar10():
    base = "--dataset folder --teacher teachers/cifar10_wrn40_2.safetensors --preset cpu"
    of_s = accuracy("cpu_recipe/summary.json", base)
    other = accuracy("cpu_recipe/seed1/summary.json", f"{base} --seed 1")
    long = accuracy("cpu_long/summary.json", f"{base} --warmup-epochs 18 --epochs 120")
    gpu = json.loads(read("results/gpu/summary.json"))
    on_gpu, agree = 100 * gpu["student_accuracy"], 100 * gpu["agree"]
    texts = [f"**{of_s:.2f} %**", f"**{long:.2f} %**", f"**{on_gpu:.2f} %**", f"{agree:.2f} %"]
    yield from missing("README.md", *texts)
    text = f"**{of_s:.2f} % (seed 0) and {other:.2f} % (seed 1)"
    yield from missing("results/README.md", text, f"{long:.2f} % (seed 0)", f"{agree:.2f} %")
    yield from missing("results/gpu/README.md", f"{on_gpu:.2f} %", f"{agree:.2f} %")
    rows = {row["run"]: row for row in rows_of("scores.csv")}
    again = rows["results/cpu_recipe"]  # `agree` on today's held-out images
    yield from missing("README.md", f"| {float(again['agree']):.1f} % | {of_s:.2f} % |")
    off = []
    for name in ("cpu_recipe", "cpu_recipe/seed1", "cpu_long"):
        row = rows[f"results/{name}"]
        off.append(f"{float(row['agree']) - float(row['accuracy']):.1f}")
    text = f"it is {off[0]}, {off[1]} and {off[2]} points too high"
    yield from missing("results/README.md", text)
    for name in ("cpu_recipe", "gpu"):
        batches = figures.losses_of(ROOT / "results" / name)
        text = f"| {figures.best_is_last(batches)} of {len(batches)} |"
        yield from missing("results/answers.md", f"`{name}/` {text}")


def tiny_imagenet():
    """The run with 200 classes, and what limits it."""
    rows = rows_of("tiny_imagenet/log.csv")
    last = rows[-1]
    of_s = f"{100 * float(last['accuracy']):.2f} %"
    minutes = f"{float(last['seconds']) / 60:.0f} min"
    yield from missing("README.md", f"**{of_s}**", minutes)
    agree = f"`agree` is {100 * float(last['agree']):.1f} %"
    yield from missing("results/README.md", f"**{of_s} of 8,000", minutes, agree)
    for name in ("limits", "tries"):
        for row in rows_of(f"tiny_imagenet/{name}.csv"):
            yield from missing("results/README.md", f"| {' | '.join(row.values())} |")
    for line in read("results/speed_matrices.txt").splitlines():
        if line.startswith("|"):
            yield from missing("results/README.md", line)


def printed(function):
    """The rows of tables that a program prints, as a list of lines with single spaces."""
    with contextlib.redirect_stdout(io.StringIO()) as console:
        function()
    return [" ".join(line.split()) for line in console.getvalue().splitlines() if line]


def tables():
    """Those of ablations.py, scores.py and of `figures.py counts`; and README's claims."""
    made = printed(ablations.report) + printed(scores.report)
    lines = [" ".join(line.split()) for line in read("results/README.md").splitlines()]
    starts = ("| score |", "| odd seeds")
    heads = {line for line in made if "accuracy, %" in line or line.startswith(starts)}
    yield from (f"results/README.md lacks the table {head}" for head in sorted(heads - set(lines)))
    titles = {f"| {variant} |" for plan in ablations.PLAN.values() for variant in plan.variants}
    titles |= {f"| {score} |" for score in [*scores.OLDER.values(), *scores.NUMBERS.values()]}
    for line in lines:  # a table there may have fewer rows
        if line.startswith(tuple(titles)) and line not in made:
            yield f"results/README.md: ablations.py does not print {line}"
    ranked = printed(lambda: normalisation.report(figures.read(normalisation.FILE)))
    for line in [*printed(figures.counts), *ranked]:
        if line not in lines:
            yield f"results/README.md lacks {line}, of figures.py counts or normalisation.py"
    claims = re.findall(r"`([^`]+)`:? ([+-][\d.]+ \[.*?\])", read("README.md"))
    for variant, words in claims:
        if not any(f"| {variant} |" in line and f"| {words} |" in line for line in made):
            yield f"README.md: ablations.py does not print {words} for {variant}"
    lower = re.findall(r"by ([\d.]+) \[([\d.]+), ([\d.]+)\]", read("README.md"))
    onehot = [line for line in made if line.startswith("| label-input onehot |")]
    for mean, low, high in lower:
        if not any(f"| -{mean} [-{high}, -{low}] |" in line for line in onehot):
            yield f"README.md: L_CE of no table is lower by {mean} with one-hot vectors"
    if len(lower) < 4:
        yield f"README.md has {len(lower)} intervals of L_CE"
    if len(claims) < 9:
        yield f"README.md has {len(claims)} claims with an interval"


def answers():
    """The means in results/answers.md."""
    rows = {}
    for row in rows_of("ablations_20_seeds.csv"):
        rows.setdefault(row["variant"], []).append(row)

    def text(variant, key, digits):
        return mean_and_std([float(row[key]) for row in rows[variant]], digits)

    for variant in ("default", "noisy-layer fixed", "noisy-layer off"):
        cells = [text(variant, "ce_5", 2), text(variant, "accuracy", 1)]
        diversity = text(variant, "diversity", 4 if "off" in variant else 2)
        yield from missing("results/answers.md", f"| {cells[0]} | {diversity} | {cells[1]} |")
    for variant in ("default", "bn-momentum 0, alpha-bn 0.3", "alpha-bn 0"):
        cells = [text(variant, "ce_20", 3), text(variant, "accuracy", 1)]
        yield from missing("results/answers.md", f"| {cells[0]} | {cells[1]} |")
    ratios = {}
    for row in rows_of("exercises_gradients.csv"):
        ratios.setdefault(row["flags"], []).append(float(row["ratio"]))
    digits = {"": 2, "--bn-momentum 0": 1, "--bn-momentum 0 --alpha-bn 0.3": 2}
    means = [mean_and_std(values, digits[flags]) for flags, values in ratios.items()]
    yield from missing("results/answers.md", *(f"| {mean} |" for mean in means))
    accuracies = {}
    last = []
    for row in rows_of("exercises.csv"):
        accuracies.setdefault(row["exercise"], []).append(float(row["accuracy"]))
        last.append(row["best_is_last"])
    means = [f"{mean_and_std(values, 1)} %" for values in accuracies.values()]
    text = f"| digits, default | {last[0]}, {last[1]} and {last[2]} of 20"
    yield from missing("results/answers.md", text, *means)


def lines_to_copy():
    lines = read("nayer.py").splitlines()
    first = next(i for i, line in enumerate(lines, 1) if line.startswith("# ---- Label-text"))
    end = next(i for i, line in enumerate(lines, 1) if line.startswith("# ---- The algorithm"))
    yield from missing("README.md", f"take the lines {first} to {end - 1} of `nayer.py`")


def small_runs():
    """Tables of a few seeds each: a wrong .info, the loop of exercise 6, the generators of 8."""
    for rows in by(rows_of("wrong_info.csv"), "function"):
        bn = mean_and_std([float(row["bn_first_epoch"]) for row in rows], 1)
        agree = mean_and_std([100 * float(row["agree"]) for row in rows], 1)
        accuracy = mean_and_std([100 * float(row["accuracy"]) for row in rows], 1)
        yield from missing("README.md", f"| {bn} | {agree} % | {accuracy} % |")
    rows = rows_of("exercises_loop.csv")
    for key in ("labels_batch_1", "labels_batch_2", "accuracy"):
        mean = mean_and_std([100 * float(row[key]) for row in rows], 0)
        yield from missing("results/answers.md", f"{mean} %")
    for rows in by(rows_of("exercises_generators.csv"), "generator"):
        bn = mean_and_std([float(row["loss_bn"]) for row in rows], 1)
        accuracy = mean_and_std([100 * float(row["accuracy"]) for row in rows], 1)
        yield from missing("results/answers.md", f"| {bn} | {accuracy} |")


def by(rows, key):
    """The rows in groups of the same value, a list for each."""
    groups = {}
    for row in rows:
        groups.setdefault(row[key], []).append(row)
    return groups.values()


def agree():
    """How far `agree` is from the accuracy in single students of the ablations."""
    ranges = []
    for action in ablations.SCORED:
        off = []
        for row in ablations.read(action):
            if row["variant"] not in ablations.FLOOR_AND_CEILING:
                off.append(float(row["agree_fresh"]) - float(row["accuracy"]))
        ranges.append(f"{min(off):.0f} to {max(off):+.0f}")
    text = f"by {ranges[0]} points on digits, and by {ranges[1]} on CIFAR-10"
    yield from missing("results/README.md", text)


def medians(name):
    """{kind: (median seconds of a generator step, of a student step)} in a file of speed.py."""
    found = {}
    for line in read(f"results/{name}").splitlines():
        row = re.match(r"(\w\S*(?: --\S+)?(?: \d)?) +(?:gen )?([\d.]+) (?:stu )?([\d.]+)", line)
        if row:
            found.setdefault(row[1], []).append((float(row[2]), float(row[3])))
    return {kind: [statistics.median(half) for half in zip(*rows)] for kind, rows in found.items()}


def speed():
    for line in read("results/speed_zen5.txt").splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) == 5 and cells[0] in ("plain", "nayer.py --no-amp", "nayer.py"):
            yield from missing("results/README.md", f"| {cells[1]} |", f"| {cells[3]} |")
    of = medians("speed_zen5.txt")
    shorter = 100 * (1 - of["nayer.py --reuse 4"][1] / of["nayer.py"][1])
    yield from missing("README.md", f"makes a student step {shorter:.0f} % shorter on Zen 5")
    yield from missing("nayer.py", f"R = 4 takes {shorter:.0f} % less time")
    of = medians("speed_tricks.txt")
    up, composed = (100 * (of[kind][0] / of["base"][0] - 1) for kind in ("plainup", "composed"))
    yield from missing("nayer.py", f"takes {up:.0f} % longer", f"takes {composed:.0f} % longer")
    text = (
        f"a generator step takes {up:.0f} % longer; with composed batch statistics {composed:.0f} %"
    )
    yield from missing("results/README.md", text)

    # On a GPU, where the table itself is all that was kept.
    rows = re.findall(
        r"^\| (.*?) \| ([\d.]+).*?\|.*?\| ([\d.]+)", read("results/gpu/README.md"), re.M
    )
    steps = {name: (float(g), float(s)) for name, g, s in rows}
    ours, theirs = steps["nayer.py (bf16)"], steps["the authors' code, as its script runs it"]
    ratios = [f"{b / a:.1f}" for a, b in zip(ours, theirs)]
    text = f"{ratios[0]} and {ratios[1]} times"
    yield from missing("README.md", text)
    yield from missing("results/README.md", text)
    text = f"{ratios[0]} times, a student step {ratios[1]} times"
    yield from missing("results/gpu/README.md", text)


def counted_times():
    """The table of results/README.md: | run | steps × s | steps × s | epochs × s | sum |"""
    product = r"([\d,]+) × ([\d.]+)"
    row = rf"^\|(.*)\| {product} \| {product} \|(.*)\| (\d+) (h|min) \|$"
    rows = re.findall(row, read("results/README.md"), re.M)
    for name, *numbers, ends, total, unit in rows:
        seconds = 0.0
        products = [numbers[:2], numbers[2:], *re.findall(product, ends)]
        for count, each in products:
            seconds += float(count.replace(",", "")) * float(each)
        value = seconds / (3600 if unit == "h" else 60)
        if round(value) != int(total):
            yield f"results/README.md: {name.strip()} takes {value:.1f} {unit}"
    if len(rows) < 6:
        yield f"results/README.md has {len(rows)} counted times"


CHECKS = [shape_of_nayer, functions, files, dependencies, checksums, class_names, paper_map]
CHECKS += [lines_to_copy, digits, cifar10, tiny_imagenet, tables, answers, small_runs, agree]
CHECKS += [speed, counted_times]

if __name__ == "__main__":
    found = []
    for check in CHECKS:
        try:
            found += check()
        except Exception as error:  # a file is not there, or not as it was
            found.append(f"{check.__name__}: {type(error).__name__}: {error}")
    print(*found, sep="\n", end="\n" if found else "")
    sys.exit(1 if found else 0)
