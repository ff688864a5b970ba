"""The main table of `sampler_accuracy.py`: ours, stock's and others' samplers, each in all its configurations."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from accuracy_bench import Bench, Triple, best, candidates, ratios, single_best
from accuracy_tables import show, triple
from samplers import DEFAULT, USUAL, Sampler, our_samplers
from torch import Tensor


class Comparison(NamedTuple):
    """The main table: errors per case and figures of all samplers, by label and step count."""

    stock: list[Sampler]
    rivals: list[Sampler]
    steps: list[int]
    errors: dict[tuple[str, int], Tensor | None]
    figures: dict[tuple[str, int], Triple]

    def notable(self, among: Sequence[Sampler]) -> list[Sampler]:
        """The best at each n, and of each class in the middle; one of those that show the same figures."""
        middle = self.steps[len(self.steps) // 2]
        classes = dict.fromkeys(s.cls for s in among)
        of_class = [best(self.figures, [s for s in among if s.cls is cls], middle) for cls in classes]
        shown = (*self.winners(among), *of_class)
        return list({tuple(f"{self.figures[s.label, n][0]:.3g}" for n in self.steps): s for s in shown}.values())

    def winners(self, among: Sequence[Sampler]) -> list[Sampler]:
        """The best at each n."""
        return [best(self.figures, among, n) for n in self.steps]


def compare(bench: Bench, steps: Sequence[int], which: str) -> Comparison:
    """All samplers in all spacings; `which` of the others is as in `candidates`."""
    stock, rivals = candidates(which)
    samplers = list({s.label: s for s in (*our_samplers(), *USUAL.values(), *stock, *rivals)}.values())
    errors = bench.all_errors(samplers, steps, "all samplers")
    figures = {key: bench.figures(value) for key, value in errors.items()}
    return Comparison(stock, rivals, list(steps), errors, figures)


def show_errors(found: Comparison) -> None:
    """A table of ours, of the usual of stock, of the notable of stock and of others."""
    header, middle = ["", *(f"n = {n}" for n in found.steps)], found.steps[len(found.steps) // 2]
    choice = f"configurations at each n, and of each class at n = {middle}"
    for title, samplers in (
        ("Ours: error over all cases (Gaussians, mixtures)", our_samplers()),
        ("Stock, default options on trailing steps or Lu's", list(USUAL.values())),
        (f"Stock: the best of {len(found.stock)} {choice}", found.notable(found.stock)),
        (f"Other programs: the best of {len(found.rivals)} {choice}", found.notable(found.rivals)),
    ):
        cells = [[s.label, *(triple(found.figures[s.label, n], ".4f") for n in found.steps)] for s in samplers]
        show(title, header, cells)


def show_ratios(bench: Bench, found: Comparison, report: dict[str, Any]) -> None:
    """Ours over the best of stock, the best of anyone, and one stock configuration for all n."""
    clean = [sampler for sampler in found.stock if sampler.reaches_clean_data]
    single = single_best(found.figures, found.stock, found.steps)
    chosen = "which is chosen for each column (below 1: closer)"
    to_clean = {n: ratios(found.figures, DEFAULT, clean, n)[0] for n in found.steps}
    report["ratios"] = {}
    for name, title, among in (
        ("best stock", f"the best stock configuration, {chosen}", found.stock),
        ("best of anyone", f"the best of anyone, {chosen}", [*found.stock, *found.rivals]),
        ("single stock", f"one stock configuration for all n, {single.label}", [single]),
    ):
        values = {n: ratios(found.figures, DEFAULT, among, n) for n in found.steps}
        extra = name == "best stock"
        header = ["n", "all", "Gaussians", "mixtures", *["all, stock to clean data"] * extra, f"{name} on all"]
        rows = [[n, *values[n], *[to_clean[n]] * extra, best(found.figures, among, n).label] for n in found.steps]
        show(f"{DEFAULT.label} over {title}", header, rows)
        report["ratios"][name] = values
        if extra:
            show_worst_cases(bench, found)
    report["single stock"] = single.label
    report["ratio to best stock"] = {n: values[0] for n, values in report["ratios"]["best stock"].items()}


def show_worst_cases(bench: Bench, found: Comparison) -> None:
    """Where ours is farthest behind the best of stock."""
    for n, winner in zip(found.steps, found.winners(found.stock), strict=True):
        ratio = found.errors[DEFAULT.label, n] / found.errors[winner.label, n]
        worst = [f"{bench.suite.cases[i].name} ({ratio[i]:.2f})" for i in ratio.argsort(descending=True)[:5].tolist()]
        print(f"n = {n}: closer than it in {int((ratio < 1).sum())} of {len(ratio)} cases; worst: {', '.join(worst)}")


def report_errors(bench: Bench, found: Comparison, report: dict[str, Any]) -> None:
    """All figures; of ours and the notable the error of each case."""
    names, labels = [case.name for case in bench.suite.cases], dict.fromkeys(label for label, _ in found.figures)
    report["figures"] = {label: {n: found.figures[label, n] for n in found.steps} for label in labels}
    shown = [*our_samplers(), *found.notable(found.stock), *found.notable(found.rivals)]
    report["cases"] = {
        s.label: {
            n: None if (values := found.errors[s.label, n]) is None else dict(zip(names, values.tolist(), strict=True))
            for n in found.steps
        }
        for s in shown
    }
