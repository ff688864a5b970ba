"""What samplers are tried on: data whose denoisers are exact, several cases sampled at once."""

import math
from collections.abc import Sequence

import torch
from exact_denoisers import Case, Gaussian, Guided, Mixture, noise_level_of_kappa
from torch import Tensor
from torch.nn.functional import pad

from zsnr_diffusers.core import NoiseLevel, flow_level, noise_level, training_target

SMALLEST, LARGEST = 0.05, 32.0
"""Standard deviations of the Gaussian cases: fine detail, and the mean of a 32x32 image in units of one pixel."""
DIMENSIONS = (2, 4, 8, 16, 32, 64)
TIGHT, WIDE, WIDEST = 0.05, 0.5, 1.5


def gaussians() -> list[Gaussian]:
    """Bands of scales, all of them, and spectra that fall with a power, as those of images do.

    Bands, not single scales: the error of a sampler changes its sign with the scale, and a case that a zero falls on
    would weigh more in a geometric mean than all others.
    """
    scales = torch.logspace(math.log10(SMALLEST), math.log10(LARGEST), 80, dtype=torch.float64)
    k = torch.arange(1, 65, dtype=torch.float64)
    return [
        *(Gaussian(f"scales {band[0]:.2g} to {band[-1]:.2g}", band) for band in scales.split(8)),
        Gaussian("all scales", scales),
        *(Gaussian(f"power {b}", (LARGEST * k**-b).clamp(min=SMALLEST)) for b in (0.5, 1, 2)),
    ]


def mixtures(seed: int) -> list[Mixture]:
    """In each dimension one mixture of tight modes, one of wide ones and one of both; 3 to 12 modes at random."""
    generator = torch.Generator().manual_seed(seed)

    def log_uniform(low: float, high: float, num: int) -> Tensor:
        u = torch.rand(num, dtype=torch.float64, generator=generator)
        return low * (high / low) ** u

    cases = []
    for d in DIMENSIONS:
        for kind in ("tight", "wide", "mixed"):
            modes = int(torch.randint(3, 13, (), generator=generator))
            distance = log_uniform(0.7, 4.0, 1)
            means = distance * torch.randn(modes, d, dtype=torch.float64, generator=generator)
            mixed = log_uniform(TIGHT, WIDEST, modes)
            stds = mixed if kind == "mixed" else torch.full_like(mixed, TIGHT if kind == "tight" else WIDE)
            shares = log_uniform(0.2, 1.0, modes)
            cases.append(Mixture(f"{kind} {modes} modes in {d}-d", means, stds, shares / shares.sum()))
    return cases


class Suite:
    """Several cases sampled at once, a row [D] for each sample, so that a scheduler runs once for all of them.

    Rows are as long as the longest sample; what others lack is 0, of the data and of the noise.
    """

    prediction_type = "v_prediction"

    def __init__(self, cases: Sequence[Case], noises: Sequence[Tensor], alpha_bar: Tensor | None) -> None:
        """Take cases, the noise [N, d] that each is sampled from, and the schedule; None if levels have no table."""
        self.cases = list(cases)
        self._shapes = [noise.shape for noise in noises]
        self.noise = self.join(noises)
        if alpha_bar is None:
            return
        alpha, sigma = noise_level(alpha_bar, torch.arange(len(alpha_bar)))
        self._kappas = (alpha / sigma).tolist()

    def split(self, sample: Tensor) -> list[Tensor]:
        """The part of each case, [N, d], of all rows."""
        parts = sample.split([num for num, _ in self._shapes])
        return [part[:, :d] for part, (_, d) in zip(parts, self._shapes, strict=True)]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The rows of the parts."""
        longest = max(d for _, d in self._shapes)
        return torch.cat([pad(part, (0, longest - part.shape[1])) for part in parts])

    def level(self, timestep: float) -> NoiseLevel:
        """The noise level at a timestep; between two of them log kappa is interpolated, as stock does to find it.

        Before the last timestep, where log kappa has no end, kappa itself is. Timesteps below 0 are taken for 0.
        """
        t = min(max(float(timestep), 0.0), len(self._kappas) - 1.0)
        below = min(int(t), len(self._kappas) - 2)
        low, high, share = self._kappas[below], self._kappas[below + 1], t - below
        kappa = low ** (1 - share) * high**share if high > 0 else (1 - share) * low
        return noise_level_of_kappa(kappa)

    def velocity(self, x_t: Tensor, timestep: float) -> Tensor:
        """What a perfect network returns for the rows `x_t`."""
        level = self.level(timestep)
        alpha, sigma = float(level.alpha), float(level.sigma)
        y = x_t.double() / sigma
        parts = [case.x_0(part, alpha / sigma) for case, part in zip(self.cases, self.split(y), strict=True)]
        x_0 = self.join(parts)
        return training_target(self.prediction_type, x_0, (x_t.double() - alpha * x_0) / sigma, level)

    def endpoints(self, num_steps: int) -> list[Tensor]:
        """Where the exact ODE leads, per case."""
        noises = self.split(self.noise)
        return [case.endpoint(noise, num_steps) for case, noise in zip(self.cases, noises, strict=True)]

    def errors(self, sample: Tensor, exact: Sequence[Tensor]) -> Tensor:
        """Per case the RMS difference to the exact ODE, each dimension in units of its spread; shape [cases]."""
        parts = zip(self.cases, self.split(sample.double()), exact, strict=True)
        return torch.stack([((part - end) / case.spread).square().mean().sqrt() for case, part, end in parts])


class FlowSuite(Suite):
    """Cases under flow matching: at timestep 1000 s the level is (1 - s, s), and the network returns noise - x_0."""

    prediction_type = "flow_prediction"

    def level(self, timestep: float) -> NoiseLevel:
        """The level at 1000 s; timesteps below 1/2, as of sigmas that were rounded away, are taken for that."""
        return flow_level(min(max(float(timestep), 0.5), 1000.0) / 1000)


def guided_pairs(seed: int) -> list[tuple[Case, Case]]:
    """Unconditional and conditional data: Gaussians, and mixtures of which the condition leaves some of the modes.

    The mean of a conditional Gaussian is drawn by what the law of total variance leaves for it.
    """
    generator = torch.Generator().manual_seed(10_000 + seed)
    pairs: list[tuple[Case, Case]] = []
    for narrowest in (0.9, 0.6, 0.4, 0.2):
        std = SMALLEST * (LARGEST / SMALLEST) ** torch.rand(64, dtype=torch.float64, generator=generator)
        share = narrowest ** torch.rand(64, dtype=torch.float64, generator=generator)
        mean = std * (1 - share**2).sqrt() * torch.randn(64, dtype=torch.float64, generator=generator)
        narrow = (std * share).clamp(min=SMALLEST)
        pairs.append((Gaussian("", std), Gaussian(f"down to {narrowest:g} of the spread", narrow, mean)))
    for mixture in mixtures(seed + 1000):
        modes = len(mixture.weights)
        kept = slice(int(torch.randint(1, modes // 2 + 1, (), generator=generator)))
        weights = mixture.weights[kept]
        name = f"{mixture.name}, {len(weights)} kept"
        pairs.append((mixture, Mixture(name, mixture.means[kept], mixture.stds[kept], weights / weights.sum())))
    return pairs


def _suite(cases: Sequence[Case], noises: Sequence[Tensor], alpha_bar: Tensor | None) -> Suite:
    return FlowSuite(cases, noises, None) if alpha_bar is None else Suite(cases, noises, alpha_bar)


def guided_suite(alpha_bar: Tensor | None, seed: int, num_samples: int, scale: float, rescale: float = 0.0) -> Suite:
    """All pairs at one guidance scale, from the same noise at each.

    With `rescale`, phi of guidance rescale, without those in two dimensions, whose spread passes zero.
    """
    generator, cases, noises = torch.Generator().manual_seed(seed + 1), [], []
    for unconditional, conditional in guided_pairs(seed):
        case = Guided(unconditional, conditional, scale, rescale)
        noise = torch.randn(num_samples, len(case.spread), dtype=torch.float64, generator=generator)
        if rescale == 0 or noise.shape[1] > 2:
            cases.append(case)
            noises.append(noise)
    return _suite(cases, noises, alpha_bar)


def ode_suite(alpha_bar: Tensor | None, seed: int, num_samples: int) -> Suite:
    """The Gaussian cases and a seed's mixtures, on a schedule or, without one, under flow matching.

    A sampler is linear in Gaussian data, dimension by dimension, so a single sample of ones shows all of its error.
    """
    generator, flat, mixed = torch.Generator().manual_seed(seed + 1), gaussians(), mixtures(seed)
    noises = [torch.ones(1, len(case.std), dtype=torch.float64) for case in flat]
    noises += [
        torch.randn(num_samples, case.means.shape[1], dtype=torch.float64, generator=generator) for case in mixed
    ]
    return _suite([*flat, *mixed], noises, alpha_bar)
