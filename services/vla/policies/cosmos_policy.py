"""Cosmos Policy's server (cosmos_policy/experiments/robot/aloha/deploy.py): POST /act, port 8777.

The answer's "actions" is a list of one array an action; its future images and value are not used. The names of the cameras are
the suite's: primary_image with left_wrist_image and right_wrist_image (ALOHA), wrist_image (LIBERO), or wrist_image and
secondary_image (RoboCasa); the server's `suite` must be the layout's.
"""

from __future__ import annotations

from services.vla.policies.http_act import HttpAct
from services.vla.settings import VlaSettings


def build(settings: VlaSettings) -> HttpAct:
    """Connects on first use. Raises ValueError for a missing address or a wrong table."""
    return HttpAct("cosmos_policy", settings)
