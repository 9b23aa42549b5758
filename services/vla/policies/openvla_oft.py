"""OpenVLA-OFT's server (vla-scripts/deploy.py): POST /act, port 8777; the answer is the list of actions itself.

Its LIBERO policies close the gripper at 0 and open it at 1, and were fed with images turned by half a turn: the table says so.
Those images had also been through JPEG and a Lanczos filter; ours are resized without either.
"""

from __future__ import annotations

from services.vla.policies.http_act import HttpAct
from services.vla.settings import VlaSettings


def build(settings: VlaSettings) -> HttpAct:
    """Connects on first use. Raises ValueError for a missing address or a wrong table."""
    return HttpAct("openvla_oft", settings)
