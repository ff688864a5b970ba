"""Which of the paper's four fixes gives what? Lin et al. 2023 (arXiv:2305.08891) show all at once; here each alone.

    python -m pip install -e ".[examples]" && python examples/ablation/ablation.py --budget cpu

Networks of the ten classes of Fashion-MNIST are trained to epsilon and to v on a schedule that leaks signal, and to v
at zero terminal SNR, from several seeds; each is sampled from a timestep before the last and from the last one, with
guidance rescale and without, in 5 to 50 steps, by diffusers' DDIM and by this package's sampler. What is measured, and
what came of it, stands in `README.md` beside this file.

Everything lands in `--output_dir`: networks, `results/` with a file for every cell, and `tables.md`, `effects.png` and
`samples.png` of all that is there. Run it again and it goes on where it was; several processes may share the seeds.
"""

import argparse
import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

import datasets
import diffusers
import numpy as np
import torch
from arms import ARMS, BUDGETS, PARTS, Arm, Budget, Cell, asked_labels, cells, sampler, trained
from fashion_mnist import CLASSES, DEFAULT_FOLDER, Clothes, read_fashion_mnist, write_training_set
from judge import CLASSIFIER, CLASSIFIER_SHA256, NEIGHBORS, Judge, Row, make_classifier
from PIL import Image
from report import Results, write_report

from zsnr_diffusers import ClassConditionalPipeline
from zsnr_diffusers.evaluation import generate_images, terminal_invariance
from zsnr_diffusers.utils.files import write_json

INVARIANCE = "invariance.json"


def main(
    output_dir: Path = Path("ablation"),
    budget: Budget = BUDGETS["cpu"],
    seeds: Sequence[int] = (0, 1, 2),
    source: str = DEFAULT_FOLDER,
    classifier: Path | None = None,
) -> Results:
    """Train and sample what is not there yet, and report on all that is.

    Args:
        output_dir: where everything goes.
        budget: how much of everything.
        seeds: each decides on the first weights, the order of the data, and the noise.
        source: of Fashion-MNIST, a folder or an id of the Hub.
        classifier: to judge by; by default the one beside this file, or a new one for another size of images.

    Raises:
        FileNotFoundError: there is no data.
        ValueError: damaged data, or a classifier of another hash.
    """
    datasets.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()
    train, test = (read_fashion_mnist(source, part, budget.image_size) for part in ("train", "test"))
    judge = prepare_judge(output_dir, budget, train, test, classifier)
    data = write_training_set(train.first(budget.train_images), output_dir / "data")
    write_floor(output_dir / "results" / "real.json", judge, train, budget)
    for part in PARTS:
        for seed in seeds:
            for arm in ARMS:
                measure(output_dir, arm, seed, cells(part), data, judge, budget)
    results = read_results(output_dir)
    write_report(results, output_dir, describe(judge, budget))
    return results


def prepare_judge(
    output_dir: Path, budget: Budget, train: Clothes, test: Clothes, classifier: Path | None = None
) -> Judge:
    """The classifier of this folder if images have its size, or else a new one in `output_dir`."""
    if classifier is not None:
        judge = Judge(test, classifier, None)
    elif budget.image_size == BUDGETS["cpu"].image_size:
        judge = Judge(test, CLASSIFIER, CLASSIFIER_SHA256)
    else:
        path = output_dir / f"classifier-{budget.image_size}.safetensors"
        if not path.exists():
            print(make_classifier(train, test, path, budget.classifier_epochs))
        judge = Judge(test, path, None)
    print(f"judged by {judge.network.origin}; sha256 {judge.network.origin.sha256}")
    return judge


def write_floor(path: Path, judge: Judge, train: Clothes, budget: Budget) -> None:
    """Judge real images, as many as are generated, of the classes in equal number: what nobody can beat."""
    if path.exists():
        return
    kept = np.concatenate([np.flatnonzero(train.labels == c)[-budget.samples // 10 :] for c in range(len(CLASSES))])
    kept = kept[: budget.samples]
    real = Clothes(train.images[kept], train.labels[kept])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, dataclasses.asdict(judge(real.pictures(), real.labels.tolist())))


def measure(
    output_dir: Path, arm: Arm, seed: int, wanted: list[Cell], data: Path, judge: Judge, budget: Budget
) -> None:
    """Train an arm if need be, and judge it in all cells that are not there yet."""
    folder = output_dir / "results" / f"{arm.name}-{seed}"
    missing = [cell for cell in wanted if not (folder / f"{cell.name}.json").exists()]
    if not missing and (folder / INVARIANCE).exists():
        return
    print(f"== {arm.name}, seed {seed}", flush=True)
    network = trained(arm, output_dir / f"{arm.name}-{seed}", data, budget, seed)
    pipe = ClassConditionalPipeline.from_pretrained(network)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / INVARIANCE).exists():
        pipe.scheduler = sampler("trailing", arm, budget)
        found = terminal_invariance(pipe, range(len(CLASSES)), decode=False)
        write_json(folder / INVARIANCE, {"share": found.share, "alpha": found.alpha})
    labels = list(asked_labels(budget.samples))
    for cell in missing:
        images = generate(pipe, arm, cell, labels, seed, budget)
        strip(images[: len(CLASSES)]).save(folder / f"{cell.name}.png")
        row = judge(images, labels)
        write_json(folder / f"{cell.name}.json", {"cell": dataclasses.asdict(cell), "row": dataclasses.asdict(row)})
        print(f"{cell.name}: FD {row.frechet_distance:.2f}, W1 {row.w1:.3f}, {row.accuracy:.1%} right", flush=True)


def generate(pipe: Any, arm: Arm, cell: Cell, labels: list[int], seed: int, budget: Budget) -> list[Image.Image]:
    """An image of each label; all arms and cells of a seed start from the same noise."""
    pipe.scheduler = sampler(cell.sampler, arm, budget)
    noises = [10_000 * seed + i for i in range(len(labels))]
    return generate_images(
        pipe,
        labels,
        noises,
        batch_size=budget.batch_size,
        progress=False,
        num_inference_steps=cell.steps,
        guidance_scale=cell.guidance_scale,
        guidance_rescale=cell.guidance_rescale,
        keep_low_frequencies=cell.keep_low_frequencies,
    )


def strip(images: list[Image.Image]) -> Image.Image:
    """Images side by side."""
    width, height = images[0].size
    row = Image.new("L", (width * len(images), height))
    for i, image in enumerate(images):
        row.paste(image, (i * width, 0))
    return row


def read_results(output_dir: Path) -> Results:
    """Everything that has been measured."""
    folder = output_dir / "results"
    rows, invariance = {}, {}
    for arm in ARMS:
        for one in sorted(folder.glob(f"{arm.name}-[0-9]*")):
            seed = int(one.name.removeprefix(f"{arm.name}-"))
            for path in sorted(one.glob("*-*.json")):
                found = json.loads(path.read_text())
                rows[arm.name, Cell(**found["cell"]), seed] = Row(**found["row"])
            if (one / INVARIANCE).exists():
                invariance[arm.name, seed] = json.loads((one / INVARIANCE).read_text())["share"]
    real = Row(**json.loads((folder / "real.json").read_text()))
    return Results(rows, invariance, real)


def describe(judge: Judge, budget: Budget) -> str:
    """What all figures depend on."""
    reference = judge.reference
    return (
        f"{budget.samples} images of {budget.image_size} x {budget.image_size} per cell and seed, all classes in "
        f"equal number; network: {budget.preset} with {dict(budget.network)}, {budget.train_steps} steps of "
        f"{budget.train_batch_size} from {budget.train_images} images; features: {judge.network.origin}; Fréchet "
        f"distance to {reference.count} images of the test part, kernel distance, precision and recall to "
        f"{NEIGHBORS} of them."
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("ablation"), help="default: ablation")
    parser.add_argument("--budget", choices=BUDGETS, default="cpu", help="how much of everything (default: cpu)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument(
        "--fashion_mnist", default=DEFAULT_FOLDER, help=f"folder or Hub id (default: {DEFAULT_FOLDER})"
    )
    parser.add_argument("--classifier", type=Path, help="to judge by, in place of the one beside this file")
    given = parser.parse_args()
    try:
        main(given.output_dir, BUDGETS[given.budget], given.seeds, given.fashion_mnist, given.classifier)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
