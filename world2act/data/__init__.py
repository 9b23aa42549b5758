"""Readers and writers of demonstrations, the camera grid and the video codec."""
