"""Warnings that other libraries' pipelines give."""

import pytest

PIPELINE_WARNINGS = [
    pytest.mark.filterwarnings("ignore:torch.meshgrid"),
    pytest.mark.filterwarnings("ignore:Default grid_sample"),
    pytest.mark.filterwarnings("ignore:The decode_latents method is deprecated"),
    pytest.mark.filterwarnings("ignore:The class .*StableDiffusionInpaintPipelineLegacy:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),  # AudioLDM2, transformers 4
]
