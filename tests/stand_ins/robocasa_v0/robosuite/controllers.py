"""Stands for robosuite.controllers."""


def load_composite_controller_config(controller, robot):
    assert controller is None
    return {"robot": robot}
