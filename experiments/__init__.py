"""Experiments: what the method is worth, measured in one process per cell; `world2act experiment --help`.

They use the method as a library and a simulator's environments directly: no service runs, so that many cells run side by side.
"""
