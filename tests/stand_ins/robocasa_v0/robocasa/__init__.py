"""Stands for RoboCasa v0.2: its tasks are registered with robosuite on import."""

__version__ = "0.2.0"
