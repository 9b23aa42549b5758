"""The world-model service: Triton's model repository and its launcher, and the imagination worker."""
