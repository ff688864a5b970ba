"""A sampler of few steps, each of which lands where a teacher's many steps lead.

Between two noise levels the probability-flow ODE is a map from x_t to x_s. One step of DDIM is exact wherever its x_0
is the ODE's own x_0(kappa), averaged over the step's interval of kappa. So the student is taught that mean, which is
read off the two samples: x_0 = (x_s - keep x_t) / gain. Nothing is divided by alpha, so the first step may start from
pure noise, as all sampling does at zero terminal SNR; from there on, the samples that the student meets are those that
it makes. Salimans & Ho 2022 (arXiv:2202.00512, appendix G) have the same target for two steps of DDIM instead of one.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .multistep import multistep_updates, multistep_updates_between
from .noise import NoiseLevel
from .solvers import Update, ddim_updates

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""x_0 [B, ...] of samples x_t [B, ...] at timesteps [B]."""
_ORDER = 2


class SegmentedSampler:
    """A sampler's run in n segments of k steps, for samples that are each in a segment of their own.

    Args:
        timesteps: n rows of k.
        updates: likewise.

    Examples:
        >>> import torch
        >>> from zsnr_diffusers.core import SegmentedSampler, Update
        >>> sampler = SegmentedSampler([[999], [499]], [[Update(0.8, (0.6,), 0.0)], [Update(0.0, (1.0,), 0.0)]])
        >>> sampler.run(torch.ones(1, 2), torch.tensor([1]), lambda x_t, timesteps: 3 * x_t)
        tensor([[3., 3.]])
    """

    def __init__(self, timesteps: Sequence[Sequence[int]], updates: Sequence[Sequence[Update]]) -> None:
        outputs = max(len(update.gains) for row in updates for update in row)
        padded = [[(*update.gains, *[0.0] * (outputs - len(update.gains))) for update in row] for row in updates]
        self.timesteps = torch.tensor([list(row) for row in timesteps])
        self.keep = torch.tensor([[update.keep for update in row] for row in updates], dtype=torch.float64)
        self.gains = torch.tensor(padded, dtype=torch.float64)

    def run(self, x_t: Tensor, segments: Tensor, predict_x_0: Denoiser) -> Tensor:
        """Take each sample through its segment.

        Args:
            x_t: samples at the first level of their segments, shape [B, ...].
            segments: 0 for the noisiest, shape [B], on the CPU.
            predict_x_0: called k times on all samples.

        Returns:
            Samples at the first level of the next segments, or clean ones.
        """
        shape, outputs = (-1, *[1] * (x_t.ndim - 1)), list[Tensor]()
        for step, timesteps in enumerate(self.timesteps[segments].unbind(1)):
            outputs = [predict_x_0(x_t, timesteps.to(x_t.device)), *outputs][: self.gains.shape[-1]]
            x_t = x_t * self.keep[segments, step].to(x_t).reshape(shape)
            for gain, x_0 in zip(self.gains[segments, step].to(x_t).unbind(-1), outputs, strict=False):
                x_t = x_t + gain.reshape(shape) * x_0
        return x_t

    def mean_x_0(self, x_t: Tensor, x_s: Tensor, segments: Tensor) -> Tensor:
        """The x_0 of which one step of DDIM, a segment of one step, leads from x_t to x_s; shape [B, ...].

        Args:
            x_t: samples at the first level of their segments.
            x_s: where they are to land.
            segments: as in `run`.
        """
        shape = (-1, *[1] * (x_t.ndim - 1))
        keep, gain = (table[segments].to(x_t).reshape(shape) for table in (self.keep, self.gains))
        return (x_s - keep * x_t) / gain


def student_sampler(timesteps: Sequence[int], levels: Sequence[NoiseLevel]) -> SegmentedSampler:
    """One step of DDIM from each timestep to the next, and from the last to clean data.

    Args:
        timesteps: strictly decreasing, the first that of pure noise.
        levels: of them.

    Examples:
        >>> from zsnr_diffusers.core import NoiseLevel, student_sampler
        >>> sampler = student_sampler([999, 499], [NoiseLevel(0.0, 1.0), NoiseLevel(0.6, 0.8)])
        >>> sampler.timesteps.tolist()
        [[999], [499]]
    """
    return SegmentedSampler([[timestep] for timestep in timesteps], [[update] for update in ddim_updates(levels)])


def teacher_sampler(timesteps: Sequence[Sequence[int]], levels: Sequence[Sequence[NoiseLevel]]) -> SegmentedSampler:
    """Multistep steps within each step of a student, started again in each, so that samples may be in any of them.

    Args:
        timesteps: k for each step of the student, from its own on; see `subdivided_timesteps`.
        levels: of them.

    Examples:
        >>> from zsnr_diffusers.core import NoiseLevel, teacher_sampler
        >>> levels = [[NoiseLevel(0.0, 1.0), NoiseLevel(0.6, 0.8)], [NoiseLevel(0.8, 0.6), NoiseLevel(0.96, 0.28)]]
        >>> teacher_sampler([[999, 749], [499, 249]], levels).timesteps.shape
        torch.Size([2, 2])
    """
    paths = [[*inside, following[0]] for inside, following in pairwise(levels)]
    updates = [multistep_updates_between(path, _ORDER) for path in paths]
    return SegmentedSampler(timesteps, [*updates, multistep_updates(levels[-1], _ORDER)])
