"""Stands for RoboCasa365 (v1.0)."""

__version__ = "1.0.0"
