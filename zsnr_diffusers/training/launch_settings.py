"""What `accelerate launch` is configured for under FSDP2, as options of the run.

The network is sharded by `fsdp.py` either way, and accelerate only launches processes.
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from typing import Any, TypeVar

from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import FullyShardedDataParallelPlugin, parse_flag_from_env
from torch.distributed.fsdp import CPUOffloadPolicy

from .config import NetworkConfig
from .speed import check_speed

C = TypeVar("C", bound=NetworkConfig)

_FSDP, _PARALLELISM = "ACCELERATE_USE_FSDP", "ACCELERATE_USE_PARALLELISM_CONFIG"


@contextlib.contextmanager
def fsdp_options(config: C) -> Iterator[C]:
    """A configuration to which accelerate's FSDP2 settings are added, in a context where accelerate has none.

    Raises:
        ValueError: the settings cannot be followed, or differ from options that were given.
    """
    found = _add_settings(config, _read_settings()) if parse_flag_from_env(_FSDP) else config
    with hidden_fsdp_settings():
        yield found


@contextlib.contextmanager
def hidden_fsdp_settings() -> Iterator[None]:
    """Context in which accelerate does not know of FSDP settings, nor transformers.

    accelerate would insist on sharding what is prepared, and transformers 4 fills models in one process only.
    """
    names = [_FSDP, _PARALLELISM] if parse_flag_from_env(_FSDP) else []
    hidden = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _add_settings(config: C, settings: dict[str, Any]) -> C:
    """A configuration with settings of FSDP2, by option, none of which may have been given otherwise."""
    defaults = {one.name: one.default for one in dataclasses.fields(config)}
    for name, value in settings.items():
        if (given := getattr(config, name)) not in (value, defaults[name]):
            raise ValueError(f"--{name}={given}, and accelerate is configured for {value}: leave out one of them.")
    try:
        found = dataclasses.replace(config, **settings)
        check_speed(found)
    except ValueError as error:
        raise ValueError(
            f"accelerate is configured for FSDP2, which is --sharding={settings['sharding']} here. {error} Without "
            "FSDP2: launch with --multi_gpu, see examples/configs/accelerate/one_machine.yaml."
        ) from error
    return found


def _read_settings() -> dict[str, Any]:
    """The settings of FSDP2 in the environment that are not at their defaults, by the option that each is."""
    plugin = _read_plugin()
    settings: dict[str, Any] = {"sharding": "parameters" if plugin.reshard_after_forward else "optimizer"}
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        settings["fsdp_offload_params"] = True
    if plugin.activation_checkpointing:
        settings["gradient_checkpointing"] = True
    if parse_flag_from_env(_PARALLELISM):
        settings["dp_replicate_size"] = _read_copies()
    return settings


def _read_plugin() -> FullyShardedDataParallelPlugin:
    """accelerate's own reading of the environment."""
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ValueError(
            "accelerate is configured for FSDP1, which flattens parameters, so they could not be saved by name and "
            "shape for all. Set fsdp_version: 2 in its configuration, by hand or by `accelerate to-fsdp2`, or pass "
            "--fsdp_version 2; see examples/configs/accelerate/fsdp2.yaml."
        )
    try:
        plugin = FullyShardedDataParallelPlugin()
    except ValueError as error:
        raise ValueError(
            f"accelerate's fsdp_config is none for FSDP2 ({error}); see `accelerate to-fsdp2`."
        ) from error
    for name in ("ignored_modules", "activation_checkpointing_offload"):
        if getattr(plugin, name, None):
            raise ValueError(f"fsdp_{name} is not supported: remove it from the configuration of accelerate.")
    return plugin


def _read_copies() -> int:
    """How many groups of processes have a copy of the network, by accelerate's `parallelism_config`."""
    found, processes = ParallelismConfig(), int(os.environ.get("WORLD_SIZE", 1))
    sizes = {name: getattr(found, name, 1) for name in ("tp_size", "cp_size", "sp_size")}
    if others := ", ".join(f"{name}={size}" for name, size in sizes.items() if size > 1):
        raise ValueError(
            f"accelerate's parallelism_config has {others}, and here one process computes an image: take "
            "dp_replicate_size and dp_shard_size."
        )
    if found.dp_replicate_size * found.dp_shard_size != processes:
        raise ValueError(
            f"accelerate's parallelism_config is one for {found.dp_replicate_size} x {found.dp_shard_size} processes "
            f"(dp_replicate_size x dp_shard_size), and there are {processes}."
        )
    return int(found.dp_replicate_size)
