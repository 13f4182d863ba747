"""Real models on real data, sized to the device.

`scale` here is the function; the module of the same name is reached by `from memlab.workloads.scale
import …`.
"""

from . import gpt, images, text, vit
from .scale import Scale, scale

__all__ = ["Scale", "gpt", "images", "scale", "text", "vit"]
