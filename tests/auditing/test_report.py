import json

import diffusers
import pytest
from audited import PLANTED, STEPS, config_of, found, names
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from oracles import BETAS, SAMPLERS, SD, make
from tiny_pipelines import tiny_stable_diffusion, tiny_unconditional

from zsnr_diffusers import ZeroSNRDDIMScheduler, audit, enable_guidance_rescale
from zsnr_diffusers.utils.tables import one_line


# -- what is right passes
def test_the_released_config_passes_and_the_steps_of_stock_ddim_are_noted_with_their_numbers():
    result = audit(config_of(DDIMScheduler))
    assert result.ok
    assert result.verdict == "OK"
    assert result.terminal_snr == result.terminal_alpha == 0
    assert result.first_timesteps == ((5, 999), (20, 999), (50, 999))
    assert result.final_alpha == 1
    step_size = found(result, "step-size")
    assert step_size.severity == "note"
    assert 28 in step_size.steps
    assert not {1, 5, 10, 20, 25, 40, 50, 100} & {*step_size.steps}  # they divide T, and nothing can go wrong
    assert found(result, "extra-timestep").steps == (61,)
    assert {n for n in found(result, "eta-one").steps} >= {25, 28, 30, 50}


def test_brightness_that_ddim_s_steps_cost():
    """Measured before: -6% at 28 steps and -12% at 60, of the mean of a 64 x 64 latent."""
    for n, share in ((28, "-6%"), (60, "-12%")):
        assert f"by up to {share}" in found(audit(config_of(DDIMScheduler), steps=[n]), "step-size").what


@pytest.mark.full
@pytest.mark.parametrize("name", SAMPLERS)
def test_nothing_is_found_of_our_schedulers(name):
    for scheduler in (make(name), json.loads(make(name).to_json_string())):
        assert names(audit(scheduler)) == ({"not-run"} if name == "inverse" else set())


@pytest.mark.full
@pytest.mark.parametrize("cls", [EulerDiscreteScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler])
def test_stock_samplers_that_are_right(cls):
    result = audit(config_of(cls))
    assert result.ok
    assert names(result) <= {"extra-timestep", "half-precision-noise"}


def test_reference_rows_are_table_1_of_the_paper():
    reference = audit(config_of(DDIMScheduler), steps=[5]).to_dict()["reference"]
    for name, ratio, alpha in (
        ("linear", 4.035993e-05, 0.006353),
        ("cosine", 2.428735e-09, 4.928220e-05),  # of float32, five digits
        ("Stable Diffusion", 0.004682, 0.068265),
    ):
        assert reference[name]["terminal_snr"] == pytest.approx(ratio, rel=1e-4)
        assert reference[name]["terminal_alpha"] == pytest.approx(alpha, rel=1e-4)


def test_deep_tries_every_number_of_steps():
    T = 44
    result = audit(config_of(DDIMScheduler, num_train_timesteps=T), deep=True)
    assert result.steps_tried == tuple(range(1, T + 1))
    stock = DDIMScheduler(num_train_timesteps=T, timestep_spacing="trailing")
    longer = [n for n in range(1, T + 1) if stock.set_timesteps(n) or len(stock.timesteps) == n + 1]
    assert [*found(result, "extra-timestep").steps] == longer != []


# -- what it says
def test_the_report_names_every_finding_and_its_remedy():
    result = audit(config_of(DDIMScheduler, timestep_spacing="leading", set_alpha_to_one=False))
    text = str(result)
    for finding in result.findings:
        assert f"{finding.name}: {finding.what}" in text
        assert f"-> {one_line(finding.remedy)}\n" in text
    severities = [finding.severity for finding in result.findings]
    assert severities == sorted(severities, key=["error", "not zero-SNR", "note"].index)
    assert ["Stable", "Diffusion", "0.004682", "0.06826"] in [line.split() for line in text.splitlines()]


@pytest.mark.full
@pytest.mark.parametrize("planted", PLANTED)
def test_remedies_in_code_can_be_run(planted):
    config, name, _ = PLANTED[planted]
    remedy = found(audit(config, steps=STEPS), name).remedy
    pipe = tiny_unconditional()
    cls = getattr(diffusers, config["_class_name"])
    pipe.scheduler = cls.from_config(config)
    exec(remedy, {**vars(diffusers), "pipe": pipe})
    assert name not in names(audit(pipe.scheduler, steps=STEPS))


def test_a_scheduler_of_ours_in_a_stock_pipeline_is_right():
    pipe = enable_guidance_rescale(tiny_stable_diffusion(ZeroSNRDDIMScheduler(**SD)), 0.7)
    assert audit(pipe).findings == ()
    assert BETAS["beta_end"] == audit(pipe).config["beta_end"]
