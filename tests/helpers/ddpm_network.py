"""The network of Ho et al. 2020 (arXiv:2006.11239, appendix B) in plain torch, to compare with.

Written from the paper, in the terms of its code (`ch`, `ch_mult`, `attn_resolutions`); nothing here is of diffusers.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F


def sinusoid(t, ch):
    """[sin, cos] of t at ch / 2 frequencies from 1 to 1/10000, the last included; shape [B, ch]."""
    frequencies = torch.exp(-math.log(10000) * torch.arange(ch // 2, dtype=torch.float64) / (ch // 2 - 1))
    angles = t.double()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1).float()


def swish(x):
    return x * torch.sigmoid(x)


class Norm(nn.Module):
    """Group normalisation by its formula."""

    def __init__(self, channels, groups):
        super().__init__()
        self.groups = groups
        self.scale = nn.Parameter(torch.empty(channels))
        self.shift = nn.Parameter(torch.empty(channels))

    def forward(self, x):
        grouped = x.reshape(len(x), self.groups, -1)
        centred = grouped - grouped.mean(dim=2, keepdim=True)
        variance = centred.square().mean(dim=2, keepdim=True)
        normal = (centred / (variance + 1e-6).sqrt()).reshape(x.shape)
        return normal * self.scale[:, None, None] + self.shift[:, None, None]


class Residual(nn.Module):
    def __init__(self, channels_in, channels, ch, groups, dropout):
        super().__init__()
        self.norm_a, self.norm_b = Norm(channels_in, groups), Norm(channels, groups)
        self.conv_a = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.conv_b = nn.Conv2d(channels, channels, 3, padding=1)
        self.time = nn.Linear(4 * ch, channels)
        self.shortcut = nn.Conv2d(channels_in, channels, 1) if channels_in != channels else None
        self.dropout = dropout

    def forward(self, x, time):
        h = self.conv_a(swish(self.norm_a(x))) + self.time(swish(time))[:, :, None, None]
        h = self.conv_b(F.dropout(swish(self.norm_b(h)), self.dropout, self.training))
        return h + (x if self.shortcut is None else self.shortcut(x))


class Attention(nn.Module):
    """Every position looks at every other, with one head of all channels."""

    def __init__(self, channels, groups):
        super().__init__()
        self.norm = Norm(channels, groups)
        self.q, self.k, self.v, self.out = (nn.Linear(channels, channels) for _ in range(4))

    def forward(self, x):
        positions = self.norm(x).flatten(2).transpose(1, 2)
        q, k, v = self.q(positions), self.k(positions), self.v(positions)
        weights = torch.softmax(torch.einsum("bic,bjc->bij", q, k) / math.sqrt(q.shape[2]), dim=2)
        return x + self.out(torch.einsum("bij,bjc->bic", weights, v)).transpose(1, 2).reshape(x.shape)


class Network(nn.Module):
    """epsilon(x_t, t), shapes [B, C, H, W] and [B]; two residual blocks per level."""

    def __init__(self, ch, ch_mult, resolution, attn_resolutions, groups=32, channels=3, classes=None, dropout=0.0):
        super().__init__()
        self.ch = ch
        widths = [ch * factor for factor in ch_mult]
        attends = [resolution // 2**level in attn_resolutions for level in range(len(widths))]

        def stage(channels_in, level):
            parts = {"residual": Residual(channels_in, widths[level], ch, groups, dropout)}
            if attends[level]:
                parts["attention"] = Attention(widths[level], groups)
            return nn.ModuleDict(parts)

        self.time_a, self.time_b = nn.Linear(ch, 4 * ch), nn.Linear(4 * ch, 4 * ch)
        self.labels = nn.Embedding(classes, 4 * ch) if classes else None
        self.first = nn.Conv2d(channels, ch, 3, padding=1)
        self.down, self.shrink = nn.ModuleList(), nn.ModuleList()
        h, kept = ch, [ch]
        for level, width in enumerate(widths):
            self.down.append(nn.ModuleList([stage(h, level), stage(width, level)]))
            h, kept = width, [*kept, width, width]
            if level < len(widths) - 1:
                self.shrink.append(nn.Conv2d(width, width, 3, stride=2))
                kept.append(width)
        self.middle = nn.ModuleList(
            [Residual(h, h, ch, groups, dropout), Attention(h, groups), Residual(h, h, ch, groups, dropout)]
        )
        self.up, self.grow = nn.ModuleList(), nn.ModuleList()
        for level in reversed(range(len(widths))):
            stages = []
            for _ in range(3):
                stages.append(stage(h + kept.pop(), level))
                h = widths[level]
            self.up.append(nn.ModuleList(stages))
            if level > 0:
                self.grow.append(nn.Conv2d(h, h, 3, padding=1))
        self.last_norm, self.last = Norm(ch, groups), nn.Conv2d(ch, channels, 3, padding=1)

    def forward(self, x, t, labels=None):
        time = self.time_b(swish(self.time_a(sinusoid(t, self.ch))))
        if self.labels is not None:
            time = time + self.labels(labels)

        def run(stage, h):
            h = stage["residual"](h, time)
            return stage["attention"](h) if "attention" in stage else h

        kept = [self.first(x)]
        for level, stages in enumerate(self.down):
            for stage in stages:
                kept.append(run(stage, kept[-1]))
            if level < len(self.shrink):
                # TensorFlow's SAME: a side of even length is padded at its end only
                kept.append(self.shrink[level](F.pad(kept[-1], (0, 1, 0, 1))))
        before, attention, after = self.middle
        h = after(attention(before(kept[-1], time)), time)
        for level, stages in enumerate(self.up):
            for stage in stages:
                h = run(stage, torch.cat([h, kept.pop()], dim=1))
            if level < len(self.grow):
                h = self.grow[level](h.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))
        assert not kept
        return self.last(swish(self.last_norm(h)))
