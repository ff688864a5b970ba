"""Who may import whom, read from the source."""

import ast
from pathlib import Path

import zsnr_diffusers

PACKAGE = Path(zsnr_diffusers.__file__).parent

ALLOWED = {
    "core": set(),
    "image_formats": set(),
    "images": {"image_formats"},
    "hashes": set(),
    "_extras": set(),
    "versions": set(),
    "weight_files": set(),
    "processes": {"_extras"},
    "tables": set(),
    "terminal": {"tables"},
    "scheduler_config": set(),
    "scheduler_base": {"core", "scheduler_config"},
    "schedulers": {"core", "scheduler_base", "scheduler_config"},
    "guided_run": {"core"},
    "hub_errors": {"known_models"},
    "repo_files": {"hub_errors", "weight_files"},
    "guidance": {"core", "guided_run", "repo_files"},
    "class_conditional": {"core", "guidance"},
    "pipelines": {"guidance"},
    "unet": set(),
    "custom_pipeline": {"core", "guided_run", "repo_files", "guidance", "class_conditional"}
    | {"scheduler_base", "scheduler_config", "schedulers"},
    "stock_scheduler": set(),
    "cards": {"core", "custom_pipeline", "guidance", "lora_files", "stock_scheduler", "weight_files"},
    "pushing": {"hub_errors"},
    "checkpoint_layout": {"layouts"},
    "layouts": {"single_file"},
    "damage": {"layouts", "repo_files", "single_file"},
    "marks": {"single_file"},
    "single_file": {"core", "checkpoint_layout", "guidance", "scheduler_config", "weight_files"},
    "known_models": set(),
    "model_facts": {"core", "guidance", "known_models", "scheduler_config", "schedulers", "single_file", "repo_files"}
    | {"marks"},
    "lora_files": {"hub_errors", "layouts", "model_facts", "repo_files", "single_file"},
    "single_file_pipeline": {"damage", "layouts", "lora_files", "model_facts", "repo_files", "single_file"}
    | {"weight_files"},
    "hub": {"core", "guidance", "class_conditional", "scheduler_base", "schedulers", "single_file_pipeline"}
    | {"damage", "model_facts", "hub_errors", "repo_files", "weight_files"},
    "saving": {"cards", "custom_pipeline", "model_facts", "pushing", "repo_files", "scheduler_base", "single_file"}
    | {"stock_scheduler", "weight_files"},
    "bare_pipeline": {"damage", "model_facts", "repo_files"},
    "lora_weights": {"checkpoint_layout", "layouts", "model_facts", "saving", "single_file", "_extras"}
    | {"weight_files"},
    "lora_fit": {"damage", "lora_files", "single_file"},
    "lora": {"cards", "core", "guidance", "hub", "lora_files", "lora_weights", "model_facts", "pushing", "repo_files"}
    | {"lora_fit", "saving", "stock_scheduler", "_extras"},
    "evaluation": {"core", "images", "image_formats", "hashes", "tables", "_extras", "processes"},
    "calibration": {"core", "evaluation", "schedulers", "tables"},
    "auditing": {"core", "schedulers", "scheduler_config", "guidance", "single_file", "model_facts", "hub"}
    | {"known_models", "layouts", "lora_files", "repo_files", "evaluation", "tables"},
    "training": {"core", "images", "image_formats", "hashes", "processes", "scheduler_base", "schedulers", "guidance"}
    | {"pipelines"}
    | {"class_conditional", "unet", "custom_pipeline", "stock_scheduler", "single_file", "hub", "lora", "evaluation"}
    | {"cards", "damage", "lora_files", "model_facts", "pushing", "repo_files", "saving", "tables", "terminal"}
    | {"hub_errors", "lora_fit", "weight_files", "_extras"},
    "commands": {
        "damage",
        "schedulers",
        "hub",
        "model_facts",
        "single_file",
        "evaluation",
        "auditing",
        "_extras",
        "processes",
    }
    | {"bare_pipeline", "calibration", "lora", "lora_files", "repo_files", "saving", "tables", "terminal"},
    "cli": {"commands", "processes"},
    "__init__": {"core", "schedulers", "guided_run", "guidance", "class_conditional", "pipelines"}
    | {"custom_pipeline", "unet", "hub", "lora", "saving", "auditing", "versions"},
}
"""Parts of the package that each part may import."""

THIRD_PARTIES = {
    "core": {"torch"},
    "image_formats": {"PIL"},
    "images": {"PIL", "numpy"},
}
"""Where this is said, nothing else but the standard library."""

ONLY_IN = {
    "accelerate": {"training", "processes"},
    "datasets": {"training"},
    "pyarrow": {"training"},
    "fsspec": {"training"},
    "yaml": {"training", "marks"},
    "matplotlib": {"evaluation"},
    "scipy": {"evaluation"},
    "rich": {"terminal"},
}


def part_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path):
    """(absolute top-level name or None, part of ours or None, inside a function) of every import."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    depth = len(path.relative_to(PACKAGE).parts)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name.split(".")[0], None, id(node) in inside
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield str(node.module).split(".")[0], None, id(node) in inside
        elif isinstance(node, ast.ImportFrom) and node.level == depth:
            for name in [str(node.module).split(".")[0]] if node.module else [alias.name for alias in node.names]:
                yield None, name, id(node) in inside


def test_parts_import_only_what_they_may():
    import sys

    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 20
    for path in files:
        part = part_of(path)
        for library, ours, in_function in imports(path):
            if ours is not None:
                assert ours in ALLOWED[part] | {part}, f"{path} imports {ours}"
                continue
            if library in ONLY_IN:
                assert part in ONLY_IN[library], f"{path} imports {library}"
                if library in ("matplotlib", "scipy"):
                    assert in_function, f"{path} imports {library} outside the function that needs it"
            if part in THIRD_PARTIES and library not in sys.stdlib_module_names:
                assert library in THIRD_PARTIES[part], f"{path} imports {library}"


def test_public_names_are_there():
    for name in zsnr_diffusers.__all__:
        assert getattr(zsnr_diffusers, name).__doc__
    assert set(zsnr_diffusers.__all__) <= set(dir(zsnr_diffusers))
