"""The networks of FID and FD-DINOv2, small, with weights from seed 0."""

import hashlib
import warnings

import torch
from torch import nn
from torch.nn import functional as F
from transformers import Dinov2Config, Dinov2Model


class TinyInception(nn.Module):
    """The parts and the forward pass of inception-2015-12-05.pt, small: 8 features, 5 classes."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 9, stride=8), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
        )
        self.output = nn.Linear(8, 5)

    def forward(self, img: torch.Tensor, return_features: bool = False, no_output_bias: bool = False):
        n, c, h, w = img.shape
        theta = torch.eye(2, 3)
        theta[0, 2] += theta[0, 0] / w - theta[0, 0] / 299
        theta[1, 2] += theta[1, 1] / h - theta[1, 1] / 299
        grid = F.affine_grid(theta.unsqueeze(0).repeat([n, 1, 1]), [n, c, 299, 299], align_corners=False)
        x = F.grid_sample(img.to(torch.float32), grid, mode="bilinear", padding_mode="border", align_corners=False)
        features = self.layers((x - 128) / 128).reshape(-1, 8)
        if return_features:
            return features
        logits = F.linear(features, self.output.weight) if no_output_bias else self.output(features)
        return F.softmax(logits, dim=1)


def save_scripted(module, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(module), str(path))
    return path


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def tiny_inception():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = TinyInception().eval()
        module.layers[1].running_mean.normal_()
    return module


def tiny_dinov2():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Dinov2Model(
            Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14)
        ).eval()
