"""Stands for robosuite 1.5 as RoboCasa v0.2 needs it."""

from tests.stand_ins.kitchen import Kitchen

WANTED = {"robots": "PandaOmron", "has_renderer": False, "has_offscreen_renderer": True, "ignore_done": True, "control_freq": 20}


def make(env_name, layout_and_style_ids, obj_instance_split, use_camera_obs, controller_configs, **kwargs):
    assert controller_configs == {"robot": "PandaOmron"} and WANTED.items() <= kwargs.items(), kwargs
    return Kitchen(env_name, layout_and_style_ids, obj_instance_split, use_camera_obs)
