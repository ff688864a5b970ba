import ast
import dataclasses
from pathlib import Path

import pytest
import yaml

import zsnr_diffusers
from zsnr_diffusers.training import PixelTrainingConfig, TrainingConfig, main, parse_config
from zsnr_diffusers.training.config import (
    ComputeConfig,
    DataConfig,
    FlowConfig,
    FolderConfig,
    ObjectiveConfig,
    OptimizationConfig,
    OutputConfig,
    RunConfig,
)
from zsnr_diffusers.training.pixels.config import (
    ClassDataConfig,
    NetworkConfig,
    PixelOutputConfig,
    PixelTaskConfig,
    VarianceConfig,
)
from zsnr_diffusers.training.stable_diffusion.config import (
    AdapterConfig,
    BaseConfig,
    CaptionedDataConfig,
    DistillationConfig,
    EncodingConfig,
    GuidedOutputConfig,
    StableDiffusionTaskConfig,
)
from zsnr_diffusers.training.stable_diffusion.presets import PresetConfig

PARTS = {
    RunConfig: {OutputConfig, ComputeConfig, OptimizationConfig, ObjectiveConfig, FlowConfig, DataConfig},
    TrainingConfig: {
        GuidedOutputConfig,
        DistillationConfig,
        AdapterConfig,
        CaptionedDataConfig,
        BaseConfig,
        PresetConfig,
    },
    PixelTrainingConfig: {PixelOutputConfig, VarianceConfig, ClassDataConfig, NetworkConfig},
}
EXAMPLES = Path(zsnr_diffusers.__file__).parents[1] / "examples" / "configs"
LEAST = {"pretrained_model_name_or_path": "base", "train_data_dir": "photos"}
FLOW = {"prediction_type": "flow_prediction"}
LEAST_ARGUMENTS = ["--pretrained_model_name_or_path", "base", "--train_data_dir", "photos"]


def test_command_line_yaml_and_dataclass_are_one(tmp_path):
    file = tmp_path / "run.yaml"
    config = TrainingConfig(**LEAST, learning_rate=3e-4, validation_prompts=["a", "b c"], rescale_betas_zero_snr=True)
    file.write_text(config.to_yaml())
    assert parse_config(["--config", str(file)]) == config
    arguments = [*LEAST_ARGUMENTS, "--learning_rate", "3e-4", "--validation_prompts", "a", "b c"]
    assert parse_config(arguments) == config


def test_command_line_wins_over_yaml(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("pretrained_model_name_or_path: base\ntrain_data_dir: photos\nlearning_rate: 1e-5\nseed: 3\n")
    config = parse_config(["--config", str(file), "--seed", "4", "--resume"])
    assert (config.learning_rate, config.seed, config.resume) == (1e-5, 4, True)


@pytest.mark.parametrize(
    ("option", "message"), [("max_train_steps: many", "'many'"), ("on_bad_image: x", "fail, skip")]
)
def test_values_in_a_file_are_checked_like_those_of_the_command_line(option, message, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(f"pretrained_model_name_or_path: base\ntrain_data_dir: photos\n{option}\n")
    with pytest.raises(SystemExit) as stop:
        parse_config(["--config", str(file)])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert f"--{option.split(':')[0]}" in error
    assert message in error


def test_yaml_s_own_reading_of_no_is_understood(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("pretrained_model_name_or_path: base\ntrain_data_dir: photos\nmixed_precision: no\n")
    assert parse_config(["--config", str(file)]).mixed_precision == "no"


@pytest.mark.parametrize("config", [TrainingConfig(**LEAST), PixelTrainingConfig(train_data_dir="photos")])
def test_a_run_goes_on_from_the_file_that_it_writes(config, tmp_path):
    """Options that are None included, numbers among them."""
    (tmp_path / "training_config.yaml").write_text(config.to_yaml())
    assert parse_config(["--config", str(tmp_path / "training_config.yaml")], type(config)) == config


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.name)
def test_example_configurations_are_valid(file):
    config = parse_config(["--config", str(file), "--train_data_dir", "photos"])
    assert config.rescale_betas_zero_snr
    assert set(yaml.safe_load(file.read_text())) <= {f.name for f in dataclasses.fields(TrainingConfig)}


def test_next_steps_after_training(monkeypatch, capsys):
    ran = []
    monkeypatch.setattr("zsnr_diffusers.training.run.train", ran.append)
    main([*LEAST_ARGUMENTS, "--output_dir", "my model"])
    out = capsys.readouterr().out
    assert "zsnr audit 'my model'\n" in out
    assert "zsnr evaluate --real photos --pipeline 'my model' [--prompts TEXT ...]\n" in out
    assert out.endswith('zsnr_diffusers.load_pipeline("my model")\n')
    main([*LEAST_ARGUMENTS, "--output_dir", "lora", "--lora_rank", "4", "--quiet"])
    assert "--pipeline base --lora lora" in (out := capsys.readouterr().out)
    assert 'load_lora(pipe, "lora")' in out
    main([*LEAST_ARGUMENTS, "--output_dir", "fast", "--lora_rank", "4", "--distill_steps", "4"])
    assert "--lora fast --num_inference_steps 4 --guidance_scale 1 " in capsys.readouterr().out
    main([*LEAST_ARGUMENTS, "--dry_run"])
    assert capsys.readouterr().out == ""
    assert [config.lora_rank for config in ran] == [None, 4, 4, None]


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_config(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "accelerate launch -m zsnr_diffusers.training" in text
    for option in dataclasses.fields(TrainingConfig):
        assert f"--{option.name}" in text
        assert option.metadata["help"].split()[0] in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prediction_type": "flow"}, "'flow' is unknown; choose one of epsilon, sample, v_prediction"),
        ({"prediction_type": "epsilon"}, "cannot be used at zero signal-to-noise"),
        ({"pretrained_model_name_or_path": ""}, "--pretrained_model_name_or_path is missing"),
        ({"train_data_dir": None}, "one of --dataset_name, --train_data_dir and --train_shards"),
        ({"dataset_name": "x/y"}, "one of --dataset_name, --train_data_dir and --train_shards"),
        ({"max_train_steps": 0}, "--max_train_steps=0 must be above 0"),
        ({"learning_rate": float("nan")}, "--learning_rate=nan must be above 0"),
        ({"train_batch_size": -1}, "--train_batch_size=-1 must be above 0"),
        ({"lr_warmup_steps": -1}, "--lr_warmup_steps=-1 must not be negative"),
        ({"caption_dropout": 1.5}, r"--caption_dropout=1.5 must lie in \[0, 1\]"),
        ({"guidance_rescale": 2.0}, "guidance_rescale=2.0 must lie in"),
        ({"keep_low_frequencies": -1}, "keep_low_frequencies=-1 must be an integer of at least 0"),
        ({"loss_weighting": "min_snr"}, r"gives the last timestep weight 0 at zero .* Use 'min_snr_floored'"),
        ({"loss_weighting": "p2"}, "--loss_weighting='p2' is unknown; choose one of constant, min_snr_floored"),
        ({"loss_weighting": "min_snr_floored", "snr_gamma": 0.5}, "snr_gamma=0.5 must be above 1, the floor"),
        ({"snr_gamma": 0.0}, "--snr_gamma=0.0 must be above 0"),
        ({"timestep_sampling": "even"}, "--timestep_sampling='even' is unknown; choose one of uniform, strat"),
        ({"noise_offset": 0.1}, r"--noise_offset=0.1 cannot be used at zero .* N\(0, I\).* omit it"),
        ({"noise_offset": -0.1}, "--noise_offset=-0.1 must not be negative"),
        (
            {**FLOW, "rescale_betas_zero_snr": False},
            "--rescale_betas_zero_snr=False applies to betas, but flow matching",
        ),
        ({**FLOW, "loss_weighting": "min_snr"}, r"min_snr gives flow time 1.* constant, min_snr_floored, soft_min"),
        ({**FLOW, "noise_offset": 0.1}, r"--noise_offset=0.1 cannot be used with flow matching.* Leave it out"),
        ({**FLOW, "flow_shift": 0.0}, "--flow_shift=0.0 must be above 0"),
        ({**FLOW, "flow_shift": float("inf")}, "shift=inf must be above 0"),
        ({**FLOW, "logit_std": 0.0}, "--logit_std=0.0 must be above 0"),
        ({**FLOW, "flow_time_sampling": "mode"}, "--flow_time_sampling='mode' is unknown; choose one of logit_no"),
        (
            {**FLOW, "flow_time_sampling": "uniform", "logit_mean": 1.0},
            "--logit_mean=1.0: only for --flow_time_sampling lo",
        ),
        ({"flow_shift": 3.0}, "--flow_shift=3.0: only for flow matching; pass --prediction_type flow_prediction"),
        ({"flow_through_bridge": True}, "--flow_through_bridge=True: only for flow matching"),
        ({"logging_steps": 0}, "--logging_steps=0 must be above 0"),
        ({"lora_rank": 4, "sharding": "optimizer"}, "omit --sharding, or --lora_rank"),
        ({"lora_rank": 0}, "--lora_rank=0 must be above 0"),
        ({"lora_rank": 4, "lora_alpha": 0.0}, "--lora_alpha=0.0 must be above 0"),
        ({"lora_alpha": 8.0}, "--lora_alpha=8.0: without --lora_rank the complete UNet is trained"),
        ({"use_dora": True}, "--use_dora=True: without --lora_rank the complete UNet is trained"),
        ({"lora_target_modules": ["to_q"]}, r"--lora_target_modules=\['to_q'\]: without --lora_rank"),
        ({"lora_rank": 4, "lora_target_modules": []}, r"--lora_target_modules=\[\] contains no layer"),
        ({"on_bad_image": "ignore"}, "--on_bad_image='ignore' is unknown; choose one of fail, skip"),
        ({"mixed_precision": "fp8"}, "--mixed_precision='fp8' is unknown; choose one of no, fp16, bf16, auto"),
        ({"lr_scheduler": "cosin"}, "--lr_scheduler='cosin' is unknown; choose one of constant, .* cosine"),
    ],
)
def test_bad_options_name_value_and_remedy(change, message, capsys):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**{**LEAST, **change})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file"),
        ("learning_rat: 1", "unknown options learning_rat"),
        ("- 1\n- 2", "one `name: value` per line"),
        ("a: [", "is not YAML"),
        ("learning_rate: null", "value of the wrong type"),
    ],
)
def test_bad_files_are_named_on_the_command_line(text, message, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(SystemExit) as stop:
        parse_config(["--config", str(file)])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert str(file) in error
    assert message in error


def test_unknown_option_is_refused(capsys):
    with pytest.raises(SystemExit):
        parse_config([*LEAST_ARGUMENTS, "--learning_rat", "1"])
    assert "--learning_rat" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("steps", "warmup"), [(10_000, 500), (501, 500), (500, 50), (60, 6), (9, 0), (1, 0)], ids=lambda value: str(value)
)
def test_the_default_warm_up_fits_into_the_run(steps, warmup, tmp_path):
    config = TrainingConfig(**LEAST, max_train_steps=steps)
    assert config.lr_warmup_steps == warmup
    assert PixelTrainingConfig(train_data_dir="photos", max_train_steps=steps).lr_warmup_steps == warmup
    (tmp_path / "training_config.yaml").write_text(config.to_yaml())
    longer = ["--config", str(tmp_path / "training_config.yaml"), "--max_train_steps", "20000"]
    assert parse_config(longer).lr_warmup_steps == warmup
    assert parse_config([*LEAST_ARGUMENTS, "--max_train_steps", str(steps)]).lr_warmup_steps == warmup


def test_a_warm_up_that_is_set_is_kept():
    assert TrainingConfig(**LEAST, max_train_steps=60, lr_warmup_steps=500).lr_warmup_steps == 500


@pytest.mark.parametrize("kind", [TrainingConfig, PixelTrainingConfig])
def test_help_shows_the_layouts_of_folders(capsys, kind):
    with pytest.raises(SystemExit):
        parse_config(["--help"], kind)
    text = capsys.readouterr().out
    for line in {
        TrainingConfig: ("    0001.txt\n", "metadata.jsonl", "metadata.csv", "metadata.parquet", "train/0001.jpg"),
        PixelTrainingConfig: ("    cat/0001.png", "animals/test/cat/..."),
    }[kind]:
        assert line in text


# -- parts


@pytest.mark.parametrize("whole", PARTS)
def test_every_option_is_one_of_a_part_of_at_most_25(whole):
    parts = {part: {one.name for one in dataclasses.fields(part)} for part in PARTS[whole] | PARTS[RunConfig]}
    assert set.union(*parts.values()) == {one.name for one in dataclasses.fields(whole)}
    assert max(map(len, parts.values())) <= 25


@pytest.mark.parametrize("part", [StableDiffusionTaskConfig, PixelTaskConfig])
def test_a_task_knows_nothing_of_steps_and_output(part):
    others = (OutputConfig, ComputeConfig, OptimizationConfig)
    unknown = {one.name for other in others for one in dataclasses.fields(other)}
    unknown -= {one.name for one in dataclasses.fields(FolderConfig)}  # of the data's caches
    assert not unknown & {one.name for one in dataclasses.fields(part)}


def test_the_whole_is_taken_where_a_run_is_put_together_and_nowhere_else():
    takers = set()
    for path in Path(zsnr_diffusers.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                kinds = {ast.unparse(one.annotation) for one in arguments if one.annotation}
                if kinds & {kind.__name__ for kind in PARTS}:
                    takers.add((path.name, node.name))
    assert takers == {("run.py", "train"), ("kinds.py", "open_task")}


@pytest.mark.parametrize(
    ("part", "options", "message"),
    [
        (DataConfig, {"dataset_name": "x/y", "train_data_dir": "photos"}, "Pass the data as one of"),
        (DataConfig, {"shuffle_shards": 0}, "--shuffle_shards=0 must be above 0"),
        (ObjectiveConfig, {"loss_weighting": "min_snr"}, "gives the last timestep weight 0"),
        (StableDiffusionTaskConfig, {**LEAST, "distill_steps": 4}, "the student is a LoRA of it: pass --lora_rank"),
        (EncodingConfig, {"pretrained_model_name_or_path": "base"}, "Pass the data as one of"),
        (PixelTaskConfig, {**FLOW, "flow_through_bridge": True}, "converts a base, but a new network has none"),
        (OutputConfig, {"measure": True}, "--measure trains nothing: pass --dry_run with it"),
        (AdapterConfig, {"use_dora": True}, "without --lora_rank the complete UNet is trained"),
        (BaseConfig, {}, "--pretrained_model_name_or_path is missing"),
        (NetworkConfig, {"unet": "none"}, "--unet='none' is not a preset"),
    ],
)
def test_a_part_checks_its_own_options(part, options, message):
    with pytest.raises(ValueError, match=message):
        part(**options)
