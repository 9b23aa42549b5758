"""One file per simulator; `base.make(name)` builds one."""

import os

# MuJoCo reads this once, on import. OSMesa is as fast as EGL without a GPU (both about 5 ms a frame) and needs no device.
os.environ.setdefault("MUJOCO_GL", "osmesa")
# Mesa's software rasteriser in the calling thread: at 64x64 its thread pool costs 20 % more CPU than it saves.
os.environ.setdefault("LP_NUM_THREADS", "0")
