"""A self-contained `pipeline.py` with our guidance, start and sampler, for users without this package.

The file is assembled from this package's source: the required classes and everything they refer to by name.
"""

import ast
import functools
import inspect
import symtable
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from .. import class_conditional, schedulers
from ..class_conditional import ClassConditionalPipeline
from ..core import (
    calibrated,
    choices,
    combination,
    dct,
    flow,
    low_frequencies,
    low_frequency_law,
    multistep,
    noise,
    predictions,
    safeguard,
    solvers,
    spacing,
    spectrum_fit,
)
from ..core import guidance as core_guidance
from ..guidance import checks, intercept, layout, levels, method_patch, mixin, record
from ..guidance.checks import check_has_guidance, has_guidance
from ..guidance.mixin import GuidanceRescaleMixin, stock_class
from ..schedulers import FlowMatchMultistepScheduler, ZeroSNRDDIMScheduler, base, classes, config, sampling
from ..schedulers import flow as flow_schedulers
from ..schedulers.config import own_spacing
from ..schedulers.flow import FlowMatchScheduler
from ..schedulers.sampling import PathSampler
from ..schedulers.stock import is_flow_stand_in
from ..start import base_check, latents
from ..start import mixin as start_mixin
from ..start import start as start_file
from ..start.mixin import StartMixin
from ..start.start import Start
from ..utils import added_mixins, files
from .flow_models import is_made_for_betas

_PARTS: tuple[ModuleType, ...] = (
    *(files, added_mixins),
    *(choices, noise, predictions, core_guidance, dct, low_frequencies, low_frequency_law, combination),
    *(spacing, flow, solvers, safeguard, spectrum_fit, multistep, calibrated),
    *(config, sampling, base, flow_schedulers, classes),
    *(method_patch, layout, levels, intercept, checks, record, mixin, class_conditional),
    *(start_file, latents, base_check, start_mixin),
)
"""Modules that such a file can contain, each after its dependencies."""


_OF_EVERY_SCHEDULER = (
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type"),
)
"""Overrides when our scheduler is built from the saved diffusers scheduler's config."""

_OF_EVERY_FLOW_SCHEDULER = ("num_train_timesteps", "shift", "prediction_type")
"""The same for flow matching."""


def write_custom_pipeline(pipe: Any, folder: Any) -> Path:
    """Write `pipeline.py` next to a saved pipeline, for users without this package.

    `DiffusionPipeline.from_pretrained(repo, custom_pipeline=repo, trust_remote_code=True)`, with the folder's path or
    the id of the Hub repo that it became, then loads the pipeline with its guidance (rescale and kept low
    frequencies), its start, and its sampler, see `bundled_scheduler`. The file needs only torch and diffusers, and is
    assembled from this package's source. Without these arguments it is not executed, and the saved diffusers scheduler
    is used.

    Args:
        pipe: the pipeline, with the guidance, start and scheduler that the file will apply.
        folder: where it was saved.

    Returns:
        The file's path.

    Raises:
        TypeError: the pipeline has no guidance, or its class is not part of diffusers.
    """
    settings = ("default_guidance_rescale", "default_keep_low_frequencies", "guidance_space")
    values = {key: getattr(pipe, key, getattr(GuidanceRescaleMixin, key)) for key in settings}
    path = Path(folder, "pipeline.py")
    path.write_text(
        custom_pipeline_source(
            stock_class(type(pipe)),
            **values,
            sampler=bundled_scheduler(pipe),
            start=getattr(pipe, "default_start", None),
        ),
        encoding="utf-8",
    )
    return path


def bundled_scheduler(pipe: Any) -> PathSampler | None:
    """A pipeline's scheduler, if it is one of ours without an equivalent in diffusers that the file can contain.

    diffusers' Euler equals our DDIM. Our flow-matching schedulers have no equivalent: the UniPC that replaces them in
    Stable Diffusion pipelines rounds timesteps to integers. If a pipeline already has that UniPC, the file contains
    `FlowMatchMultistepScheduler`, as `load_pipeline` would install it. The file contains no scheduler for a pipeline
    without guidance, or whose class is not part of diffusers.
    """
    stock = stock_class(type(pipe))
    scheduler: Any = getattr(pipe, "scheduler", None)
    if is_flow_stand_in(scheduler) and is_made_for_betas(pipe):
        scheduler = FlowMatchMultistepScheduler.from_config(scheduler.config)
    if not isinstance(scheduler, PathSampler) or isinstance(scheduler, ZeroSNRDDIMScheduler):
        return None
    ours = scheduler.__module__ == schedulers.__name__ and stock.__module__.startswith("diffusers.")
    return scheduler if ours and has_guidance(stock) else None


def custom_pipeline_source(
    stock: type,
    default_guidance_rescale: float,
    guidance_space: str = "output",
    default_keep_low_frequencies: int = 0,
    sampler: PathSampler | None = None,
    start: Start | None = None,
) -> str:
    """Source of `pipeline.py` for a pipeline of class `stock`, with a sampler that replaces the saved scheduler.

    A start is embedded in the text, since `DiffusionPipeline.download` fetches only the files of components.
    """
    check_has_guidance(stock)
    if not stock.__module__.startswith(("diffusers.", class_conditional.__name__)):
        raise TypeError(f"{stock.__name__} is not a diffusers class, so a self-contained file cannot be based on it.")
    values = {
        "default_guidance_rescale": default_guidance_rescale,
        "default_keep_low_frequencies": int(default_keep_low_frequencies),
        "guidance_space": guidance_space,
    }
    name, ours = stock.__name__, stock is ClassConditionalPipeline
    mixins = [*([StartMixin.__name__] if start else []), GuidanceRescaleMixin.__name__]
    roots = {*([name] if ours else mixins), *([type(sampler).__name__] if sampler else [])}
    imports, definitions = _inline_sources(roots)
    head = f'''"""{name} with guidance rescale (arXiv:2305.08891, Algorithm 2) and kept low frequencies.

Generated from the source of zsnr_diffusers, license Apache-2.0.
"""'''
    if ours:
        tail = "\n".join(f"{name}.{key} = {value!r}" for key, value in values.items())
    else:
        imports.append(f"from diffusers import {name}")
        tail = f"class Rescaled{name}({', '.join(mixins)}, {name}):\n" + "\n".join(
            [
                f'    """{name} with guidance rescale{" and a start" if start else ""}."""\n',
                *(f"    {key} = {value!r}" for key, value in values.items()),
                *(_start_lines(start) if start else []),
                *(_sampler_override_lines(sampler) if sampler else []),
            ]
        )
    blocks = ["\n".join(sorted(imports)), *definitions, tail]
    return head + "\n\n" + "\n\n\n".join(blocks) + "\n"


def _start_lines(start: Start) -> list[str]:
    """Lines of `pipeline.py` that give the pipeline's class a start."""
    lines = textwrap.wrap(start.to_text(), 100)
    return ["    default_start = Start.from_text(", *(f'        "{line}"' for line in lines), "    )"]


def _sampler_override_lines(sampler: PathSampler) -> list[str]:
    """Lines of `pipeline.py` that make the pipeline's class replace its scheduler with our sampler."""
    name, parameters = type(sampler).__name__, inspect.signature(type(sampler).__init__).parameters
    config = {**sampler.config, "timestep_spacing": own_spacing(sampler.config)}
    saved = _OF_EVERY_FLOW_SCHEDULER if isinstance(sampler, FlowMatchScheduler) else _OF_EVERY_SCHEDULER
    own = {key: config[key] for key in parameters if key in config and key not in saved}
    settings = ", ".join(f"{key}={value!r}" for key, value in own.items())
    return [
        "",
        "    def register_modules(self, **parts):",
        f'        if "scheduler" in parts and not isinstance(parts["scheduler"], {name}):',
        f'            parts["scheduler"] = {name}.from_config(parts["scheduler"].config, {settings})',
        "        super().register_modules(**parts)",
    ]


def _inline_sources(roots: set[str]) -> tuple[list[str], list[str]]:
    """Imports and definitions of these names and their dependencies within this package, in dependency order."""
    imports, definitions = _package_definitions()
    needed, open_names = set[str](), set(roots)
    while open_names:
        name = open_names.pop()
        needed.add(name)
        if name in definitions:
            open_names |= _global_names(definitions[name]) - needed
    lines = {imports[name] for name in needed & set(imports)}
    return [*lines], [*dict.fromkeys(text for name, text in definitions.items() if name in needed)]


@functools.cache
def _global_names(text: str) -> set[str]:
    """Module-level names that a definition refers to; a local variable may share a function's name."""

    def found(table: symtable.SymbolTable) -> set[str]:
        own = {symbol.get_name() for symbol in table.get_symbols() if symbol.is_global()}
        return own.union(*map(found, table.get_children()))

    return found(symtable.symtable(text, "pipeline.py", "exec"))


@functools.cache
def _package_definitions() -> tuple[dict[str, str], dict[str, str]]:
    """Import lines and definitions of all bundled modules, by name; cached, since loaded sources do not change."""
    imports: dict[str, str] = {}
    definitions: dict[str, str] = {}
    for part in _PARTS:
        source = Path(str(part.__file__)).read_text(encoding="utf-8")
        for node in ast.parse(source).body:
            for name in _defined_names(node):
                if isinstance(node, ast.Import | ast.ImportFrom):
                    imports.setdefault(name, _import_statement(node, name))
                else:
                    definitions[name] = _definition_source(source, node)
    return imports, definitions


def _defined_names(node: ast.stmt) -> Iterator[str]:
    """Names that a module-level statement defines, except for imports from this package."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        names = (name for target in targets for name in ast.walk(target))
        yield from (name.id for name in names if isinstance(name, ast.Name))
    elif isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and node.level == 0):
        yield from (alias.asname or alias.name.split(".")[0] for alias in node.names)


def _import_statement(node: ast.Import | ast.ImportFrom, name: str) -> str:
    """The import statement for one of the names that a statement imports."""
    aliases = [alias for alias in node.names if (alias.asname or alias.name.split(".")[0]) == name]
    if isinstance(node, ast.Import):
        return ast.unparse(ast.Import(names=aliases))
    return ast.unparse(ast.ImportFrom(module=node.module, names=aliases, level=0))


def _definition_source(source: str, node: ast.stmt) -> str:
    """Source text of a definition, including decorators."""
    first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
    return "\n".join(source.splitlines()[first - 1 : node.end_lineno])
