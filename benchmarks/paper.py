"""The tables and figures of the Xception paper (arXiv:1610.02357), run again on data that you have.

    python benchmarks/paper.py                                # all of it on a small data set, on a CPU
    python benchmarks/paper.py --quick                        # two steps of each, to see that it runs
    python benchmarks/paper.py --data DIR --only table1,fig6  # your images, a folder per class, at the paper's size

  table1    Xception and Inception V3, ImageNet's recipe           fig6    their training profiles
  table2    the same with JFT's, with and without two FC layers    fig7    without FC layers      fig8  with
  table3    parameters and training steps per second (throughput.py)
  fig9      Xception with and without residual connections
  fig10     no, ReLU or ELU activation between depthwise and pointwise
  spectrum  section 5's: from depthwise to regular convolutions, by the number of segments
  stack     section 4.6's: a VGG-style net of separable convolutions without residuals

Neither ImageNet nor JFT comes with this package: without --data the networks learn scikit-learn's handwritten digits,
at a quarter of their widths.  Whatever the data, top-1 and top-5 accuracy stand for JFT's MAP@100.  Variants of a
figure start from the same seed.  Written to --out: results.md, and a CSV of each table, a CSV and a PNG of each figure.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any, NamedTuple, Sequence

import common
import paper_training
import throughput
import torch
from tqdm import tqdm

from xsep.train.recipes import RECIPES


class Variant(NamedTuple):
    """A network and how it is trained; the same variant is trained once, wherever it appears."""

    label: str
    network: str
    recipe: str = "imagenet"
    options: tuple[tuple[str, Any], ...] = ()


class Experiment(NamedTuple):
    title: str
    variants: tuple[Variant, ...]


XCEPTION = Variant("Xception", "xception")
INCEPTION = Variant("Inception V3", "inception_v3")
WITHOUT_FC = (
    Variant("Inception V3, no FC layers", "inception_v3", "jft"),
    Variant("Xception, no FC layers", "xception", "jft"),
)
WITH_FC = (
    Variant("Inception V3 with FC layers", "inception_v3", "jft", (("fc_layers", 2),)),
    Variant("Xception with FC layers", "xception", "jft", (("fc_layers", 2),)),
)
SEGMENTS = (8, 4, 2, 1)

TABLES = {
    "table1": Experiment("Table 1: Xception and Inception V3, ImageNet's recipe", (INCEPTION, XCEPTION)),
    "table2": Experiment("Table 2: with and without FC layers, JFT's recipe", WITHOUT_FC + WITH_FC),
}
FIGURES = {
    "fig6": Experiment("Figure 6: training profile, ImageNet's recipe", (INCEPTION, XCEPTION)),
    "fig7": Experiment("Figure 7: training profile without FC layers, JFT's recipe", WITHOUT_FC),
    "fig8": Experiment("Figure 8: training profile with FC layers, JFT's recipe", WITH_FC),
    "fig9": Experiment(
        "Figure 9: with and without residual connections",
        (XCEPTION, Variant("Xception without residuals", "xception", options=(("residual", False),))),
    ),
    "fig10": Experiment(
        "Figure 10: activation between depthwise and pointwise",
        (
            XCEPTION,
            Variant("Xception with ReLU between", "xception", options=(("activation", "relu"),)),
            Variant("Xception with ELU between", "xception", options=(("activation", "elu"),)),
        ),
    ),
    "spectrum": Experiment(
        "Section 5: segments of the spatial convolution, and the depthwise Xception",
        (XCEPTION, *(Variant(f"{n} segment{'s' * (n > 1)}", "xception", options=(("segments", n),)) for n in SEGMENTS)),
    ),
    "stack": Experiment(
        "Section 4.6: a VGG-style stack of separable convolutions",
        (INCEPTION, XCEPTION, Variant("VGG-style, separable", "vgg_separable")),
    ),
}
NAMES = ("table1", "table2", "table3", *FIGURES)

# The paper's own numbers: top-1 and top-5 on ImageNet, MAP@100 on FastEval14k, parameters and steps per second.
PAPER = {
    "table1": {"Inception V3": "0.782 / 0.941", "Xception": "0.790 / 0.945"},
    "table2": dict(zip((variant.label for variant in WITHOUT_FC + WITH_FC), ("6.36", "6.70", "6.50", "6.78"))),
}
PAPER_COLUMN = {"table1": "paper: top-1 / top-5, ImageNet", "table2": "paper: MAP@100, JFT"}
PAPER_PARAMETERS = {"xception": 22_855_952, "inception_v3": 23_626_728}

Profiles = dict[tuple[Variant, int], list[paper_training.Point]]


def needed(names: Sequence[str], seeds: int, divisor: int) -> dict[str, list[tuple[Variant, int]]]:
    """The variants and seeds that each table and figure shows; figures show the first seed."""
    found = {}
    for name in names:
        if name in TABLES:
            found[name] = [(variant, seed) for seed in range(seeds) for variant in TABLES[name].variants]
        elif name in FIGURES:
            found[name] = [(variant, 0) for variant in FIGURES[name].variants if _divides(variant, divisor)]
    return found


def _divides(variant: Variant, divisor: int) -> bool:
    """Whether a narrow network still has channels for the variant's segments."""
    return (728 // divisor) % dict(variant.options).get("segments", 1) == 0


def table(name: str, runs: list[tuple[Variant, int]], profiles: Profiles) -> list[dict]:
    """A row per variant: means over the seeds at the last step, with standard deviations where there are several."""
    rows = []
    for variant in dict.fromkeys(variant for variant, _ in runs):
        last = [profiles[run][-1] for run in runs if run[0] == variant]
        row: dict[str, Any] = {"network": variant.label, "seeds": len(last)}
        for metric in ("top1", "top5"):
            values = [getattr(point, metric) for point in last]
            row[metric] = f"{statistics.mean(values):.4f}"
            row[f"{metric}_deviation"] = f"{statistics.stdev(values):.4f}" if len(values) > 1 else ""
        rows.append({**row, PAPER_COLUMN[name]: PAPER[name][variant.label]})
    return rows


def figure(runs: list[tuple[Variant, int]], profiles: Profiles) -> list[dict]:
    """A row per variant and evaluation."""
    return [{"network": v.label, "seed": seed, **point._asdict()} for v, seed in runs for point in profiles[v, seed]]


def plot(path: Path, title: str, trained: str, rows: list[dict]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn, axes = plt.subplots(figsize=(6, 4))
    for label in dict.fromkeys(row["network"] for row in rows):
        mine = [row for row in rows if row["network"] == label]
        axes.plot([row["step"] for row in mine], [row["top1"] for row in mine], marker=".", label=label)
    axes.set(xlabel="gradient descent steps", ylabel="validation top-1 accuracy")
    axes.set_title(f"{title}\n{trained}", fontsize=8, wrap=True)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    drawn.tight_layout()
    drawn.savefig(path, dpi=120)
    plt.close(drawn)


def table3(args: argparse.Namespace) -> list[dict]:
    """Table 3 at full width, by throughput.py: medians of interleaved training steps, on xsep, fused, and on torch."""
    smallest = ("--batch-size", "2", "--img-size", "75", "--num-warm-iter", "1", "--num-bench-iter", "2")
    options = throughput.parse(["--device", args.device, *(smallest if args.quick else ())])
    rows = throughput.measure(throughput.make_runs(options), "train", options)
    by_run = {(row["model"], row["variant"]): row for row in rows}
    found = []
    for model in throughput.MODELS:
        ours = by_run.get((model, "fused"), by_run[model, "xsep"])  # only Xception has what can be fused
        theirs = by_run[model, "torch"]
        found.append(
            {
                "network": {"xception": "Xception", "inception_v3": "Inception V3"}[model],
                "parameters": ours["parameters"],
                "paper: parameters": PAPER_PARAMETERS[model],
                "steps/s, xsep": f"{ours['steps_per_s']:.3f}",
                "steps/s, torch": f"{theirs['steps_per_s']:.3f}",
                "xsep / torch": f"{ours['ratio_to_torch']:.2f}",
                "paper: steps/s, 60 K80": throughput.PAPER[model],
                "batch": f"{options.batch_size} x 3 x {options.img_size} x {options.img_size}",
            }
        )
    speeds = [[float(row[f"steps/s, {variant}"]) for row in found] for variant in ("xsep", "torch")]
    ratios = [f"{xception / inception:.3f}" for xception, inception in speeds]
    paper = throughput.PAPER["xception"] / throughput.PAPER["inception_v3"]
    last = ("Xception / Inception V3", "", "", *ratios, "", f"{paper:.3f}", "")
    return [*found, dict(zip(found[0], last))]


def markdown(rows: list[dict]) -> str:
    names = list(rows[0])
    lines = [names, ["---"] * len(names), *([str(row[name]) for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def last_points(rows: list[dict]) -> list[dict]:
    """The end of every profile of a figure."""
    last = {row["network"]: row for row in rows}
    columns = ("network", "step", "loss", "top1", "top5")
    return [{c: f"{row[c]:.4f}" if isinstance(row[c], float) else row[c] for c in columns} for row in last.values()]


class Report:
    """``results.md`` and the files beside it, written anew with each result, so that a run cut short leaves its own."""

    def __init__(self, folder: Path, found: dict[str, str], introduction: str, trained: str):
        self.folder, self.header, self.trained = folder, found, trained
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            common.fail(f"--out: cannot make {folder}: {error}")
        self.parts = ["# The Xception paper's tables and figures, run here", introduction]
        self.parts.append(markdown([{"": key, "this run": value} for key, value in found.items()]))

    def add(self, name: str, title: str, rows: list[dict], shown: list[dict], picture: bool) -> None:
        header = self.header if name == "table3" else {**self.header, "trained on": self.trained}
        common.write_results(self.folder / f"{name}.csv", "csv", header, rows)
        self.parts += [f"## {title}", markdown(shown)]
        if picture:
            plot(self.folder / f"{name}.png", title, self.trained, rows)
            self.parts.append(f"![{title}]({name}.png)")
        (self.folder / "results.md").write_text("\n\n".join(self.parts) + "\n")
        print(f"\n{title}\n{markdown(shown)}", flush=True)


def trained_on(args: argparse.Namespace, data: paper_training.Data) -> str:
    """What the figures and the CSVs say of themselves, wherever they are shown."""
    kind = "" if args.data else "not ImageNet: "
    return f"{kind}{data.name}; width {args.width}, batch {args.batch_size}, {args.image_size} px"


def introduction(args: argparse.Namespace, data: paper_training.Data) -> str:
    width = "at their full width" if args.divisor == 1 else f"1/{args.divisor} as wide as the paper's"
    warning = "A quick run: it shows that the program works, and its numbers mean nothing. " if args.quick else ""
    foreign = "" if args.data else "**This is not ImageNet, and these are not the paper's results.** "
    return (
        f"{warning}{foreign}Trained on {data.name}: {len(data.train)} images, {len(data.validation)} others for "
        f"validation, {data.classes} classes. Networks {width}, {args.steps} steps of {args.batch_size} images of "
        f"{args.image_size} px, {args.seeds} seed{'s' * (args.seeds > 1)}; Glorot uniform, BatchNorm with epsilon 1e-3 "
        "and momentum 0.1, accuracy of averaged weights, in all networks; recipes as in section 4 of the paper and in "
        "docs/training.md (JFT's learns one label per image by its logistic regressions). Figures show the first seed."
    )


def names_of(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in NAMES]
    if unknown or not names:
        raise argparse.ArgumentTypeError(f"no {', '.join(unknown) or 'name given'}; there are {', '.join(NAMES)}")
    return [name for name in NAMES if name in names]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, metavar="DIR", help="a folder of images per class, or DIR/train and DIR/val of such")
    add("--out", type=Path, default=Path("results/paper"), metavar="DIR", help="default: results/paper")
    add("--only", type=names_of, default=list(NAMES), metavar="NAME,...", help="of the above; default: all")
    add("--steps", type=int, help="training steps of a run (default 100; with --data 10 epochs)")
    add("--seeds", type=int, help="runs of a variant in tables 1 and 2, from seed 0 on (default 2)")
    add("--evaluations", type=int, help="points of a training profile (default 6; with --data 20)")
    add("--batch-size", type=int, help="default 32")
    add("--image-size", type=int, help="height and width, at least 75 (default 75; with --data 299)")
    add(
        "--width",
        choices=("1", "1/2", "1/4", "1/8"),
        help="of the networks, but not in table 3 (default 1/4; with --data 1)",
    )
    add("--device", choices=("cpu", "cuda"), help="default: cuda if torch can use a GPU")
    add("--amp", action="store_true", help="autocast to bfloat16 in training (not in table 3)")
    add("--workers", type=int, default=0, help="processes that load images (default 0: none besides this one)")
    add("--quick", action="store_true", help="other defaults: 2 steps, a seed, batch 4, 1/8 wide; table 3 at 75 px")
    args = parser.parse_args(arguments)
    defaults = dict(steps=100, seeds=2, evaluations=6, batch_size=32, image_size=75, width="1/4")
    if args.data:
        defaults.update(steps=None, evaluations=20, image_size=299, width="1")
    if args.quick:
        defaults.update(steps=2, seeds=1, evaluations=2, batch_size=4, image_size=75, width="1/8")
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    least = dict(steps=1, seeds=1, evaluations=1, batch_size=2, image_size=75, workers=0)
    for name, minimum in least.items():
        if getattr(args, name) is not None and getattr(args, name) < minimum:
            common.fail(f"--{name.replace('_', '-')} must be at least {minimum}; got {getattr(args, name)}")
    args.divisor = int(args.width.removeprefix("1/"))
    if args.device is None:
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device == "cuda" and not torch.cuda.is_available():
        common.fail("--device cuda: torch finds no GPU that it can use")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    data = paper_training.folders(args.data, args.image_size) if args.data else paper_training.digits(args.image_size)
    if len(data.train) < args.batch_size:
        common.fail(f"--batch-size {args.batch_size} is more than the {len(data.train)} training images")
    if args.steps is None:
        args.steps = max(1, 10 * len(data.train) // args.batch_size)
    found = common.header(args.device)
    common.print_header(found)
    report = Report(args.out, found, introduction(args, data), trained_on(args, data))
    if "table3" in args.only:
        rows = table3(args)
        report.add("table3", "Table 3: training speed, whole networks on photographs", rows, rows, picture=False)

    settings = paper_training.Settings(
        args.steps, args.evaluations, args.batch_size, args.divisor, args.device, args.amp, args.workers
    )
    wanted = needed(args.only, args.seeds, args.divisor)
    distinct = {run for runs in wanted.values() for run in runs}
    profiles: Profiles = {}
    with tqdm(total=len(distinct) * args.steps, unit="step", disable=None) as progress:
        for name, runs in wanted.items():
            for variant, seed in runs:
                if (variant, seed) in profiles:
                    continue
                progress.set_description(f"{name}: {variant.label}, seed {seed}")
                options, recipe = dict(variant.options), RECIPES[variant.recipe]
                try:
                    profiles[variant, seed] = paper_training.train(
                        variant.network, options, recipe, data, settings, seed, progress.update
                    )
                except OSError as error:
                    common.fail(str(error))
            if name in TABLES:
                rows = table(name, runs, profiles)
                report.add(name, TABLES[name].title, rows, rows, picture=False)
            else:
                rows = figure(runs, profiles)
                report.add(name, FIGURES[name].title, rows, last_points(rows), picture=True)
    print(f"\nwritten to {args.out}")


if __name__ == "__main__":
    main()
