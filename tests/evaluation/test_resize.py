import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from torch.nn import functional as F

from zsnr_diffusers.evaluation import quantize, resize_like_tensorflow1


def random_images(*shape, seed=0):
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def resize_by_loops(image, size):
    """One channel [h, w] by the definition of TensorFlow 1's ResizeBilinear, in float64."""
    height, width = image.shape
    result = np.empty((size, size))
    for i in range(size):
        for j in range(size):
            y, x = i * height / size, j * width / size
            top, left = int(y), int(x)
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            upper = image[top, left] + (image[top, right] - image[top, left]) * (x - left)
            lower = image[bottom, left] + (image[bottom, right] - image[bottom, left]) * (x - left)
            result[i, j] = upper + (lower - upper) * (y - top)
    return result


@pytest.mark.parametrize(("height", "width", "size"), [(32, 32, 299), (7, 20, 13), (64, 50, 29), (1, 1, 5), (8, 8, 8)])
def test_resize_equals_its_definition(height, width, size):
    images = random_images(2, 3, height, width)
    found = resize_like_tensorflow1(images, size)
    assert found.shape == (2, 3, size, size)
    assert found.dtype == torch.float32
    expected = resize_by_loops(images[1, 2].numpy().astype(np.float64), size)
    # Positions are float32, as in TensorFlow: wrong by 2^-24 of the side, times a step of at most 255.
    np.testing.assert_allclose(found[1, 2].numpy(), expected, atol=255 * 2 * max(height, width) * 2**-24 + 1e-4)


def test_whole_factors_pick_pixels():
    images = random_images(1, 3, 16, 16)
    assert torch.equal(resize_like_tensorflow1(images, 16), images.float())
    assert torch.equal(resize_like_tensorflow1(images, 4), images[..., ::4, ::4].float())  # not smoothed
    doubled = resize_like_tensorflow1(images, 32)
    assert torch.equal(doubled[..., ::2, ::2], images.float())  # the first pixel stays in the corner
    assert torch.equal(doubled[..., -1, ::2], images[..., -1, :].float())  # the last is repeated


def test_resize_equals_the_grid_of_the_torchscript_file():
    """`inception-2015-12-05.pt` has the same resize as a shifted affine grid."""
    images = random_images(2, 3, 32, 48)
    theta = torch.eye(2, 3).repeat(2, 1, 1)
    theta[:, 0, 2] = 1 / 48 - 1 / 299
    theta[:, 1, 2] = 1 / 32 - 1 / 299
    grid = F.affine_grid(theta, [2, 3, 299, 299], align_corners=False)
    expected = F.grid_sample(images.float(), grid, "bilinear", "border", align_corners=False)
    assert torch.allclose(resize_like_tensorflow1(images, 299), expected, atol=0.01)  # of 255, by float32 positions


def test_half_pixel_centres_are_another_resize():
    images = random_images(1, 3, 32, 32)
    other = F.interpolate(images.float(), (299, 299), mode="bilinear")
    assert (resize_like_tensorflow1(images, 299) - other).abs().mean() > 5


def test_quantize_is_what_diffusers_saves():
    values = torch.linspace(-1.2, 1.2, 3 * 40 * 40).view(1, 3, 40, 40)
    (picture,) = VaeImageProcessor().postprocess(values, output_type="pil")
    assert np.array_equal(quantize(values)[0].permute(1, 2, 0).numpy(), np.asarray(picture))
    every = torch.arange(256, dtype=torch.float32) / 127.5 - 1
    assert torch.equal(quantize(every), torch.arange(256, dtype=torch.uint8))
    for bad in (torch.zeros(2, dtype=torch.uint8), torch.tensor([float("nan")])):
        with pytest.raises(ValueError, match="finite floating-point"):
            quantize(bad)
