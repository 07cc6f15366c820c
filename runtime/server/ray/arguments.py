"""What the Ray Serve application is told: the bundle, the engine, the layout, and the settings of its HTTP side.

In: the `args` of an application in a Serve configuration, which `runtime.server.ray.config` writes. Out: checked
values. Not covered: how many replicas there are, and on what, which is Serve's (`deployment_options` in
`runtime.server.ray.config`).
"""

from dataclasses import replace
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, model_validator

from c2c_export.bundle import read_manifest
from c2c_export.errors import C2CError, UsageError
from engines.select import AUTO
from runtime.scheduler_options import SchedulerOptions
from runtime.server.settings import API_KEYS, ServerSettings, keys_of_environment

Layout = Literal["whole", "disaggregated"]
"""Every replica has all models, or the sharers have replicas of their own."""


class RayArguments(BaseModel):
    """Raises `UsageError`, naming the field, for what cannot be."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bundle: str
    """The bundle folder, at this path on every node."""
    layout: Layout = "whole"
    engine: str = "ort-cpu"
    precision: str | None = None
    num_slots: int = 8
    """Requests that a replica serves at once."""
    num_threads: int | None = None
    """Of each engine on a CPU; None is the node's physical cores."""
    allow_unchecked: bool = False
    allow_failed: bool = False
    api_keys_needed: bool = False
    """API keys are asked for: those in the environment variable C2C_EXPORT_API_KEYS of the nodes."""
    log_level: str = "info"
    scheduler: SchedulerOptions = SchedulerOptions()
    settings: ServerSettings = ServerSettings()

    @model_validator(mode="after")
    def _replicas_are_alike(self) -> Self:
        if AUTO in (self.engine, self.precision):
            raise UsageError(
                "engine and precision: auto is not allowed here, as all replicas must run the same engine for answers "
                "to be the same whichever gives them; name them"
            )
        return self

    @property
    def sharer_numbers(self) -> tuple[int, ...]:
        """The sharers with replicas of their own: all that compute anything. Reads the bundle's manifest."""
        if self.layout == "whole":
            return ()
        sharers = read_manifest(Path(self.bundle)).sharers
        return tuple(number for number, sharer in enumerate(sharers) if sharer.sharer_graph is not None)

    def settings_with_keys(self) -> ServerSettings:
        """The settings with this process's API keys. Raises `C2CError` where keys are needed and there are none."""
        keys = keys_of_environment()
        if self.api_keys_needed and not keys:
            raise C2CError(f"{API_KEYS}: no API keys in this environment variable; set it where Ray is started")
        return replace(self.settings, api_keys=keys)
