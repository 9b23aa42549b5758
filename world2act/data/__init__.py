"""Readers and writers of demonstrations (formats.py: all foreign formats through one interface), camera grid, video codec."""
