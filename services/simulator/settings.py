"""Settings of the simulator service."""

from __future__ import annotations

from pydantic import Field

from services.runtime.settings import CommonSettings


class SimulatorSettings(CommonSettings):
    """Environment variables W2A_SIMULATOR_*; the port is `simulator_port` of CommonSettings."""

    simulator_name: str = Field("metaworld", description="which simulator: a name in services/simulator/envs")
    simulator_environments: int = Field(2, ge=1, le=256, description="environments in the pool, each in its own process")
    simulator_lease_seconds: float = Field(120.0, gt=0, description="an environment that nobody calls for so long is free again")
    simulator_call_seconds: float = Field(
        60.0, gt=0, description="an environment that takes longer to answer is killed and restarted"
    )
    libero_assets: str = Field("", description="LIBERO's meshes: a folder or an archive of stand-ins; empty: LIBERO's own places")
    libero_image_size: int = Field(64, ge=32, le=512, description="pixels a side of LIBERO's camera images")
    libero_effects: bool = Field(False, description="draw shadows and reflections, as published LIBERO images do; slower")
    robocasa_image_size: int = Field(128, ge=32, le=512, description="pixels a side of RoboCasa's camera images")
