import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pipelines import tiny_stable_diffusion, tiny_unconditional

from zsnr_diffusers.evaluation import generate_images, iter_images


class Recorder:
    """An unconditional pipeline whose images show the first draw of their generators."""

    flags = None

    def __init__(self):
        self.calls, self._progress_bar_config, self.seen = [], {"desc": "mine"}, []

    def set_progress_bar_config(self, **config):
        self._progress_bar_config = config

    def _run(self, generator, **call):
        self.calls.append(call)
        self.seen.append(dict(self._progress_bar_config))
        greys = [int(torch.randint(256, (1,), generator=g)) for g in generator]
        return SimpleNamespace(
            images=[Image.new("L", (1, 1), grey) for grey in greys], nsfw_content_detected=self.flags
        )

    def __call__(self, batch_size, generator, num_inference_steps=50, output_type=None):
        assert len(generator) == batch_size
        assert output_type == "pil"
        return self._run(generator, batch_size=batch_size, num_inference_steps=num_inference_steps)


class TextRecorder(Recorder):
    def __call__(self, prompt, generator, output_type=None, **kwargs):
        return self._run(generator, prompt=prompt, **kwargs)


class ClassRecorder(Recorder):
    def __call__(self, class_labels, generator, output_type=None):
        return self._run(generator, class_labels=class_labels)


def greys(images):
    return [image.getpixel((0, 0)) for image in images]


def first_draw(seed):
    return int(torch.randint(256, (1,), generator=torch.Generator().manual_seed(seed)))


def test_each_seed_decides_its_image_whatever_the_batch():
    seeds = [5, 1, 5, 9, 2]
    for batch_size in (1, 2, 5, 8):
        images = generate_images(Recorder(), None, seeds, batch_size=batch_size)
        assert greys(images) == [first_draw(seed) for seed in seeds]


def test_batches_and_arguments_reach_the_pipeline():
    pipe = Recorder()
    generate_images(pipe, None, range(5), batch_size=2, num_inference_steps=3)
    assert pipe.calls == [{"batch_size": n, "num_inference_steps": 3} for n in (2, 2, 1)]


def test_prompts_go_with_their_seeds():
    pipe = TextRecorder()
    generate_images(pipe, ["a", "b", "c"], [0, 1, 2], batch_size=2, guidance_scale=7.5)
    assert pipe.calls == [{"prompt": ["a", "b"], "guidance_scale": 7.5}, {"prompt": ["c"], "guidance_scale": 7.5}]
    pipe = TextRecorder()
    generate_images(pipe, "a cat", [0, 1])
    assert pipe.calls == [{"prompt": ["a cat", "a cat"]}]


def test_class_labels():
    pipe = ClassRecorder()
    generate_images(pipe, [7, 8], [0, 1])
    assert pipe.calls == [{"class_labels": [7, 8]}]


def test_own_progress_bar_is_off_meanwhile_and_restored_after_a_failure():
    pipe = Recorder()
    images = iter_images(pipe, None, [0, 1], batch_size=1)
    next(images)
    assert pipe.seen == [{"desc": "mine", "disable": True}]
    images.close()
    assert pipe._progress_bar_config == {"desc": "mine"}


def test_images_come_one_batch_at_a_time():
    pipe = Recorder()
    images = iter_images(pipe, None, range(100), batch_size=2)
    next(images), next(images), next(images)
    assert len(pipe.calls) == 2
    images.close()


def test_no_seeds_no_images():
    assert generate_images(Recorder(), None, []) == []


@pytest.mark.parametrize(
    ("pipe", "prompts", "kwargs", "message"),
    [
        (Recorder(), ["a"], {}, "unconditional"),
        (TextRecorder(), None, {}, "needs a prompt"),
        (ClassRecorder(), None, {}, "needs a class_labels"),
        (TextRecorder(), ["a", "b"], {}, "2 for 1 seeds"),
        (Recorder(), None, {"guidance_scale": 3.0}, "does not take guidance_scale"),
        (Recorder(), None, {"batch_size": 0}, "got 0"),
    ],
)
def test_wrong_calls_are_refused_before_anything_runs(pipe, prompts, kwargs, message):
    with pytest.raises(ValueError, match=message):
        iter_images(pipe, prompts, [0], **kwargs)
    assert pipe.calls == []


def test_black_images_of_a_safety_checker_are_told():
    pipe = Recorder()
    pipe.flags = [False, True]
    with pytest.warns(UserWarning, match="1 of 2 images"):
        generate_images(pipe, None, [0, 1])
    pipe.flags = [False, False]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate_images(pipe, None, [0, 1])


def test_real_pipelines_do_not_depend_on_the_batch_size(tmp_path):
    for pipe, prompts in ((tiny_unconditional(), None), (tiny_stable_diffusion(), ["black cat"] * 3)):
        one, three = (
            np.stack(generate_images(pipe, prompts, [3, 4, 3], batch_size=n, num_inference_steps=2)) for n in (1, 3)
        )
        assert np.abs(one.astype(int) - three).max() <= 1  # rounding to 8 bits
        assert np.array_equal(one[0], one[2])
        assert not np.array_equal(one[0], one[1])
