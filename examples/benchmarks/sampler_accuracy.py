"""How far samplers end from the exact probability-flow ODE, ours and stock's, at zero terminal SNR.

    python examples/benchmarks/sampler_accuracy.py
    python examples/benchmarks/sampler_accuracy.py --seed 1 --study --all

The network is replaced by one that is exact for its data (`exact_denoisers.py`), on Stable Diffusion's schedule with
v-prediction, so every difference is the sampler's. Data are Gaussians from fine detail to brightness, and mixtures of
Gaussians. Stock is every diffusers scheduler that has `rescale_betas_zero_snr`, in every spacing, order and solver
type that it offers.
"""

import argparse
import itertools
import json
import math
import re
import textwrap
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from matplotlib.figure import Figure
from samplers import (
    DEFAULT,
    SAME_LEVELS,
    USUAL,
    Sampler,
    multistep_options,
    our_samplers,
    sample,
    stock_samplers,
    zero_snr_schedule,
)
from suites import LARGEST, SMALLEST, Gaussian, Suite, mixtures, ode_suite
from torch import Tensor
from tqdm import tqdm

from zsnr_diffusers import (
    ZeroSNRDDIMScheduler,
    ZeroSNRDDPMScheduler,
    ZeroSNRMultistepScheduler,
)
from zsnr_diffusers.core import multistep, safeguard, spacing

CURVE = (3, 4, 5, 6, 7, 8, 10, 12, 15, 20, 30, 50)
BRIGHTNESS = (4, 10, 20, 50)
NOTHING = "data against data"


def _brief(sampler: Sampler) -> str:
    where = [key for key in sampler.options if key.startswith("use_")] or [sampler.options["timestep_spacing"]]
    return f"{sampler.cls.__name__}, {where[0]}"


def _reason(problem: Exception) -> str:
    """What happened and where, without the numbers that differ from run to run."""
    text = re.sub(r"\d+", "#", str(problem).partition("\n")[0])
    return f"{text or type(problem).__name__} ({traceback.extract_tb(problem.__traceback__)[-1].name})"


class Bench:
    """A suite, its exact solution, and what was found so far."""

    def __init__(self, suite: Suite, exact: Sequence[Tensor]) -> None:
        """Take the suite and where the exact ODE leads."""
        self.suite, self.exact = suite, exact
        self.is_gaussian = torch.tensor([case.is_gaussian for case in suite.cases])
        self.failures: list[tuple[str, str]] = []
        self._known: dict[str | None, Tensor | str] = {}

    def errors(self, sampler: Sampler, n: int) -> Tensor | None:
        """Per case, shape [cases]; None if the sampler fails, which is noted.

        Stock's options that lead to the same noise levels as others, as a spacing beside Karras sigmas does, are run
        once. Ours always are, as the study changes them from below.
        """
        try:
            scheduler, path = sampler.prepared(n), None
            if not sampler.cls.__module__.startswith("zsnr_diffusers"):
                levels = [getattr(scheduler, name, torch.zeros(0)).tolist() for name in ("timesteps", "sigmas")]
                others = [item for item in sampler.options.items() if item[0] in SAME_LEVELS]
                path = str((sampler.cls, float(scheduler.init_noise_sigma), levels, others))
            if path is None or path not in self._known:
                self._known[path] = self._run(scheduler)
            known = self._known[path]
        except Exception as problem:  # whatever stock raises is a finding
            known = _reason(problem)
        if isinstance(known, str):
            self.failures.append((_brief(sampler), known))
            return None
        return known

    def _run(self, scheduler: Any) -> Tensor | str:
        try:
            return self.suite.errors(sample(scheduler, self.suite), self.exact)
        except Exception as problem:
            return _reason(problem)

    def figures(self, errors: Tensor | None) -> tuple[float, float, float]:
        """Geometric means over all cases (Gaussians and mixtures half and half), over Gaussians, over mixtures."""
        if errors is None:
            return math.inf, math.inf, math.inf
        log = errors.clamp(min=1e-12).log()
        flat, mixed = log[self.is_gaussian].mean(), log[~self.is_gaussian].mean()
        return float(((flat + mixed) / 2).exp()), float(flat.exp()), float(mixed.exp())


def show(title: str, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print a table: texts to the left, numbers to the right with four digits."""
    rows = [list(row) for row in rows]
    cells = [list(header), *([f"{v:.4g}" if isinstance(v, float) else str(v) for v in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    sides = ["<" if isinstance(value, str) else ">" for value in rows[0]]
    print(f"\n{title}\n{'-' * len(title)}")
    for row in cells:
        print("  ".join(f"{c:{side}{w}}" for c, side, w in zip(row, sides, widths, strict=True)).rstrip())


def compare(bench: Bench, steps: Sequence[int], report: dict[str, Any]) -> list[Sampler]:
    """All samplers in all spacings; returns the stock configurations that are best somewhere."""
    ours, stock, usual = our_samplers(), stock_samplers(stochastic=False), list(USUAL.values())
    jobs = tqdm(
        [(sampler, n) for sampler in (*ours, *usual, *stock) for n in steps],
        desc="all samplers",
        leave=False,
        disable=None,
    )
    errors = {(sampler.label, n): bench.errors(sampler, n) for sampler, n in jobs}
    figures = {key: bench.figures(value) for key, value in errors.items()}

    def best(among: Sequence[Sampler], n: int, kind: int = 0) -> Sampler:
        return min(among, key=lambda sampler: figures[sampler.label, n][kind])

    winners = {n: best(stock, n) for n in steps}
    middle = steps[len(steps) // 2]
    of_class = [best([s for s in stock if s.cls is cls], middle) for cls in dict.fromkeys(s.cls for s in stock)]
    shown = list(
        {tuple(f"{figures[s.label, n][0]:.3g}" for n in steps): s for s in (*winners.values(), *of_class)}.values()
    )
    header = ["", *(f"n = {n}" for n in steps)]
    for title, samplers in (
        ("Ours: error over all cases (Gaussians, mixtures)", ours),
        ("Stock, default options on trailing steps or Lu's", usual),
        (f"Stock: the best of {len(stock)} configurations at each n, and of each class at n = {middle}", shown),
    ):
        cells = ([s.label, *("{:.4f} ({:.4f}, {:.4f})".format(*figures[s.label, n]) for n in steps)] for s in samplers)
        show(title, header, cells)
    clean = [sampler for sampler in stock if sampler.reaches_clean_data]
    ratios = {
        n: [
            figures[DEFAULT.label, n][kind] / figures[best(among, n, kind).label, n][kind]
            for among, kind in ((stock, 0), (stock, 1), (stock, 2), (clean, 0))
        ]
        for n in steps
    }
    show(
        f"{DEFAULT.label} over the best stock configuration, which is chosen anew for each column (below 1: closer)",
        ["n", "all", "Gaussians", "mixtures", "all, stock to clean data", "best stock on all"],
        [[n, *ratios[n], winners[n].label] for n in steps],
    )
    for n in steps:
        ratio = errors[DEFAULT.label, n] / errors[winners[n].label, n]
        worst = [f"{bench.suite.cases[i].name} ({ratio[i]:.2f})" for i in ratio.argsort(descending=True)[:5].tolist()]
        print(f"n = {n}: closer than it in {int((ratio < 1).sum())} of {len(ratio)} cases; worst: {', '.join(worst)}")
    report["figures"] = {s.label: {n: figures[s.label, n] for n in steps} for s in (*ours, *usual, *stock)}
    names = [case.name for case in bench.suite.cases]
    report["cases"] = {
        s.label: {
            n: None if (values := errors[s.label, n]) is None else dict(zip(names, values.tolist(), strict=True))
            for n in steps
        }
        for s in (*ours, *shown)
    }
    report["ratio to best stock"] = {n: ratios[n][0] for n in steps}
    return shown


def compare_trailing(bench: Bench, steps: Sequence[int], report: dict[str, Any]) -> None:
    """Everyone on the same steps: the update rule without the spacing's part."""
    ours = [Sampler(ZeroSNRMultistepScheduler, multistep_options("trailing", order)) for order in (2, 3)]
    stock = [
        sampler
        for sampler in stock_samplers(stochastic=False)
        if sampler.options["timestep_spacing"] == "trailing" and not any(k.startswith("use_") for k in sampler.options)
    ]
    header = ["n", "order 2", "order 3", "best stock", "ratio", "ratio, stock to clean data", f"best of {len(stock)}"]
    rows = []
    for n in tqdm(steps, desc="trailing steps", leave=False, disable=None):
        figures = {sampler.label: bench.figures(bench.errors(sampler, n))[0] for sampler in (*ours, *stock)}
        order2, order3 = (figures[sampler.label] for sampler in ours)
        best = min((s.label for s in stock), key=lambda label: figures[label])
        clean = min(figures[s.label] for s in stock if s.reaches_clean_data)
        rows.append([n, order2, order3, figures[best], order2 / figures[best], order2 / clean, best])
    show("Trailing steps only: ZeroSNRMultistep with corrector, and stock", header, rows)
    report["trailing"] = [dict(zip([*header[:6], "label"], row, strict=True)) for row in rows]


def recovered(alpha_bar: Tensor, steps: Sequence[int], report: dict[str, Any]) -> None:
    """Recovered over true standard deviation of Gaussian modes, by scale; the largest scale is brightness."""
    scales = torch.logspace(math.log10(SMALLEST), math.log10(LARGEST), 57, dtype=torch.float64)
    suite = Suite([Gaussian("", scales)], [torch.ones(1, len(scales), dtype=torch.float64)], alpha_bar)
    trailing: dict[str, Any] = {"timestep_spacing": "trailing"}
    samplers = {
        "ours (kappa)": DEFAULT,
        "ours (trailing)": Sampler(ZeroSNRMultistepScheduler, trailing),
        "our DDIM": Sampler(ZeroSNRDDIMScheduler, trailing),
        **USUAL,
    }
    found = {name: {n: _ratios(sampler, suite, scales, n) for n in steps} for name, sampler in samplers.items()}
    show(
        f"Brightness: recovered over true standard deviation of a mode of scale {LARGEST:g}",
        ["", *(f"n = {n}" for n in steps)],
        [[name, *(values[-1] for values in by_n.values())] for name, by_n in found.items()],
    )
    report["recovered"] = {"scales": scales.tolist(), "ratios": found}


def _ratios(sampler: Sampler, suite: Suite, scales: Tensor, n: int) -> list[float]:
    try:
        return (sample(sampler.prepared(n), suite)[0] / scales).tolist()
    except Exception:
        return [math.nan] * len(scales)


def compare_sde(alpha_bar: Tensor, seed: int, num: int, n: int, report: dict[str, Any], repeats: int = 2) -> None:
    """Energy distance to the data after sampling with fresh noise at every step, over the mean distance in the data.

    2 E|x - d| - E|x - x'| - E|d - d'| over pairs of different draws, which makes it unbiased (Szekely & Rizzo 2013),
    and may make it negative. Data against other data shows how much of it is chance.
    """
    cases = [case for case in mixtures(seed) if case.means.shape[1] in (2, 8, 32)]
    draws = []
    for repeat in range(repeats):
        generator = torch.Generator().manual_seed(1000 * (seed + 1) + repeat)
        noises = [torch.randn(num, case.means.shape[1], dtype=torch.float64, generator=generator) for case in cases]
        data, others = ([case.draw(num, generator) for case in cases] for _ in range(2))
        draws.append((Suite(cases, noises, alpha_bar), data, list(map(_within, data)), others))

    def distance(repeat: int, parts: Sequence[Tensor]) -> float:
        terms = zip(parts, *draws[repeat][1:3], strict=True)
        return sum((2 * float(torch.cdist(x, d).mean()) - _within(x)) / dd - 1 for x, d, dd in terms) / len(cases)

    ours = [
        *(
            Sampler(ZeroSNRMultistepScheduler, multistep_options(where, order, eta=1.0))
            for where in ("kappa", "trailing")
            for order in (2, 3, 1)
        ),
        Sampler(ZeroSNRDDPMScheduler, {"timestep_spacing": "trailing"}),
    ]
    stock, failures = stock_samplers(stochastic=True), []
    found = {NOTHING: [distance(repeat, draw[3]) for repeat, draw in enumerate(draws)]}
    for sampler in tqdm([*ours, *stock], desc="SDE", leave=False, disable=None):
        try:
            found[sampler.label] = [
                distance(
                    i, draw[0].split(sample(sampler.prepared(n), draw[0], torch.Generator().manual_seed(i)).double())
                )
                for i, draw in enumerate(draws)
            ]
        except Exception as problem:
            failures.append((_brief(sampler), _reason(problem)))
    ranked = sorted((s for s in stock if s.label in found), key=lambda s: (sum(found[s.label]), len(s.label)))
    unique = list({tuple(found[s.label]): s for s in reversed(ranked)}.values())[::-1]
    plain = [
        s for s in unique if s.options["timestep_spacing"] == "trailing" and s.options.get("solver_order", 2) == 2
    ]
    labels = dict.fromkeys(s.label for s in (*ours, *unique[:3], *plain))
    show(
        f"SDE, {n} steps: energy distance to the data, of ours, the best 3 of {len(stock)} stock, and the usual ones",
        ["", "mean", *(f"draw {i + 1}" for i in range(repeats))],
        [[label, sum(found[label]) / repeats, *found[label]] for label in (NOTHING, *labels)],
    )
    _show_failures(failures, f"in the SDE part, of {len(stock)} runs")
    report["sde"], report["sde failures"] = found, failures


def _within(x: Tensor) -> float:
    """Mean distance between different draws."""
    return float(torch.cdist(x, x).sum() / (len(x) * (len(x) - 1)))


def _show_failures(failures: Sequence[tuple[str, str]], where: str) -> None:
    print(f"\nStock runs that crashed or gave NaN {where}: {len(failures)}")
    for (configuration, reason), count in sorted(Counter(failures).items()):
        print(f"  {count:4d}  {configuration}: {reason}")


@contextmanager
def constants(**values: Any) -> Iterator[None]:
    """Other values for what `core.spacing`, `core.multistep` and `core.safeguard` have by these names in the block."""
    saved = []
    for name, value in values.items():
        for module in (spacing, multistep, safeguard):
            if hasattr(module, name):
                saved.append((module, name, getattr(module, name)))
                setattr(module, name, value)
    try:
        yield
    finally:
        for module, name, value in saved:
            setattr(module, name, value)


NO_FIT = {"TRUST": 1e6}
STUDIED: dict[str, Sequence[float]] = {
    "LARGEST_SCALE": (8, 16, 32, 64, 128),
    "SMALLEST_SCALE": (0.005, 0.01, 0.02, 0.05, 0.1),
    "DETAIL": (0.02, 0.05, 0.1, 0.2),
    "TRUST": (0.1, 0.2, 0.4, 0.8, 1.6, NO_FIT["TRUST"]),
}


def study(bench: Bench, steps: Sequence[int], report: dict[str, Any]) -> None:
    """What the defaults rest on: each constant varied alone; order, corrector and fit in all combinations."""
    report["study"] = {}

    def tabulate(title: str, rows: dict[str, tuple[dict[str, float], Sampler]]) -> None:
        found = {}
        for name, (values, sampler) in rows.items():
            with constants(**values):
                found[name] = [bench.figures(bench.errors(sampler, n)) for n in steps]
        cells = ([name, *(f"{every:.4f} ({mixed:.4f})" for every, _, mixed in row)] for name, row in found.items())
        show(f"{title}: error over all cases (mixtures)", ["", *(f"n = {n}" for n in steps)], cells)
        report["study"][title] = {name: dict(zip(steps, row, strict=True)) for name, row in found.items()}

    for name, values in STUDIED.items():
        default = getattr(multistep, name, None) or getattr(spacing, name)
        marks = {v: " (default)" if v == default else " (no fit)" if v == NO_FIT["TRUST"] else "" for v in values}
        tabulate(name, {f"{v:g}{marks[v]}": ({name: v}, DEFAULT) for v in values})
    for where, fits in (("kappa", (False, True)), ("trailing", (False,))):  # the fit leaves trailing steps alone
        tabulate(
            f"Order, corrector{', fit' * len(fits[1:])}; {where} steps",
            {
                f"order {order}{' + corrector' * corrector}{' + fit' * fit}": (
                    {} if fit else NO_FIT,
                    Sampler(ZeroSNRMultistepScheduler, multistep_options(where, order, corrector)),
                )
                for order, corrector, fit in itertools.product((1, 2, 3), (False, True), fits)
            },
        )


def plot(folder: Path, report: dict[str, Any], steps: Sequence[int], n: int) -> None:
    """`error.png` and `recovered.png`."""
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    axes = figure.subplots()
    for name, values in report["curves"].items():
        ours = name.startswith("ZeroSNR")
        axes.loglog(steps, values, "o-" if ours else "s--", linewidth=3 if ours else 1.2, markersize=4, label=name)
    axes.set_xticks(steps, map(str, steps))
    axes.minorticks_off()
    axes.set(
        xlabel="network calls (lines end where a sampler fails)",
        ylabel="error to the exact ODE, in units of the data's spread (geometric mean)",
    )
    axes.set_title("Distance to the exact probability-flow ODE at zero terminal SNR")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="lower left")
    figure.savefig(folder / "error.png", dpi=150)

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    for name, by_n in report["recovered"]["ratios"].items():
        ours = name.startswith("ours")
        axes.semilogx(
            report["recovered"]["scales"], by_n[n], "-" if ours else "--", linewidth=3 if ours else 1.2, label=name
        )
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(
        xlabel="standard deviation of the mode: detail to brightness", ylabel="recovered over true", ylim=(0.3, 1.2)
    )
    axes.set_title(f"Standard deviation of Gaussian data after {n} steps")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(folder / "recovered.png", dpi=150)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Measure samplers against the exact probability-flow ODE, with denoisers that are exact.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=textwrap.dedent("""\
            The error of a case is the RMS difference between a sampler's result and the exact ODE's from the same
            noise, per dimension in units of the data's standard deviation there. A sampler's figure is the geometric
            mean over cases, Gaussians and mixtures half and half: 0.1 is off by a tenth of the spread. The weights of
            ZeroSNRMultistep are fitted to Gaussians, so mixtures, which they are not, stand beside it.

            Some of stock's configurations stop at the noise level of timestep 0 (final_sigmas_type="sigma_min") and
            may come closer for it, with that noise left in; "stock to clean data" is the best of the others.

            Printed in turn: all samplers in all spacings; trailing steps only; how much of a bright or dark picture's
            mean is recovered; the SDE, by energy distance. Everything is also in OUTPUT_DIR/report.json; the pictures
            are error.png (against the number of steps) and recovered.png (by scale)."""),
    )
    parser.add_argument("--seed", type=int, default=0, help="of the mixtures and the noise; another one is a test of "
                        "what was chosen on this one (default: 0)")  # fmt: skip
    parser.add_argument(
        "--steps", type=int, nargs="+", default=[5, 10, 20], help="of the main table (default: 5 10 20)"
    )
    parser.add_argument("--samples", type=int, default=128, help="per mixture, for the ODE (default: 128)")
    parser.add_argument(
        "--sde_samples", type=int, default=2000, help="per mixture, for the SDE; 0 skips it (default: 2000)"
    )
    parser.add_argument("--all", action="store_true", help="every number of steps from 3 to 50 on trailing steps, "
                        "instead of a dozen of them; some minutes more")  # fmt: skip
    parser.add_argument("--study", action="store_true", help="vary spacing scales, order, corrector and fit")
    parser.add_argument("--output_dir", type=Path, default=Path("sampler_accuracy"), help="default: sampler_accuracy/")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables and write report and pictures."""
    args, start = parse(arguments), time.perf_counter()
    schedule = zero_snr_schedule()
    suite = ode_suite(schedule, args.seed, args.samples)
    exact = suite.endpoints(1000)
    certainty = float(suite.errors(suite.join(suite.endpoints(500)), exact).max())
    print(
        f"Seed {args.seed}, {len(suite.cases)} cases; "
        f"doubling the steps of the exact ODE moves none of them by more than {certainty:.1g}."
    )
    bench = Bench(suite, exact)
    report: dict[str, Any] = {"seed": args.seed, "diffusers": diffusers.__version__, "exact to": certainty}

    steps = sorted(set(args.steps))
    stock = compare(bench, steps, report)
    _show_failures(bench.failures, f"in the main table, of {len(stock_samplers(False)) * len(steps)} runs")
    report["failures"] = list(bench.failures)
    trailing = range(3, 51) if args.all else CURVE
    compare_trailing(bench, trailing, report)
    others = [Sampler(ZeroSNRMultistepScheduler, multistep_options(*o)) for o in (("kappa", 3), ("trailing", 2))]
    report["curves"] = {
        s.label: [bench.figures(bench.errors(s, n))[0] for n in CURVE]
        for s in tqdm([DEFAULT, *others, *stock], desc="curves", leave=False, disable=None)
    }
    recovered(schedule, BRIGHTNESS, report)
    if args.sde_samples:
        compare_sde(schedule, args.seed, args.sde_samples, 20, report)
    if args.study:
        study(bench, (4, 5, 7, 10, 15, 20, 30, 50), report)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    plot(args.output_dir, report, CURVE, 10)
    (args.output_dir / "report.json").write_text(json.dumps(_plain(report), indent=1) + "\n")
    summarise(report)
    print(f"\n{time.perf_counter() - start:.0f} s; report.json, error.png and recovered.png are in {args.output_dir}/")


def summarise(report: dict[str, Any]) -> None:
    """The findings in words."""
    ratios = ", ".join(f"{r:.2f} at n = {n}" for n, r in report["ratio to best stock"].items())
    trailing = {row["n"]: row["ratio"] for row in report["trailing"]}
    above = sum(ratio > 1 for ratio in trailing.values())
    print("\nSummary: errors over the best stock configuration's\n" + "-" * 50)
    print(f"{DEFAULT.label}: {ratios}")
    low, high = min(trailing.values()), max(trailing.values())
    print(f"On trailing steps: {low:.2f} to {high:.2f}; above 1 at {above} of {len(trailing)} n")
    if "sde" in report:
        sums = {label: sum(values) for label, values in report["sde"].items() if label != NOTHING}
        first = next(iter(sums))
        best = min((label for label in sums if not label.startswith("ZeroSNR")), key=lambda label: sums[label])
        chance = max(abs(value) for value in report["sde"][NOTHING])
        draws = len(report["sde"][NOTHING])
        print(
            f"SDE, energy distance: {sums[first] / draws:.2g} for {first}, {sums[best] / draws:.2g} for {best}, up to "
            f"{chance:.1g} for {NOTHING}"
        )


def _plain(value: Any) -> Any:
    """With None for numbers that JSON does not know."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    main()
