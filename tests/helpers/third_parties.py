"""Warnings that other libraries' pipelines give."""

import pytest

PIPELINE_WARNINGS = [
    pytest.mark.filterwarnings("ignore:torch.meshgrid"),
    pytest.mark.filterwarnings("ignore:Default grid_sample"),
    pytest.mark.filterwarnings("ignore:The decode_latents method is deprecated"),
    pytest.mark.filterwarnings("ignore:The class .*StableDiffusionInpaintPipelineLegacy:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),  # AudioLDM2, transformers 4
]

FLOW_WARNINGS = [
    pytest.mark.filterwarnings("ignore:In CPU autocast"),  # Mochi
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated"),  # Chroma, ControlNets of Flux
    pytest.mark.filterwarnings("ignore:`LoraLoaderMixin` is deprecated"),  # PRX
    pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated"),  # sounds
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),  # Kandinsky 6
    pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated"),  # Ideogram 4, transformers 5.24
]
