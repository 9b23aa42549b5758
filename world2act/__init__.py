"""World2Act: reward-free post-training of robot policies in the latent space of a skill-compositional world model.

The method as a library (arXiv 2603.10422): no network, no queue, no service is imported here.
"""

__version__ = "0.1.0"
