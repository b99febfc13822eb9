"""Scenes as the normalised tensors that both towers read."""

import numpy as np
import torch
from torch import Tensor

from aspo.world.clip import MEAN, STD
from aspo.world.scenes import Scene, render_array


def pixels(batch: list[Scene]) -> Tensor:
    """(B, 3, IMAGE_SIZE, IMAGE_SIZE) fp32, normalised as the image processors do."""
    images = torch.from_numpy(np.stack([render_array(scene) for scene in batch])).permute(0, 3, 1, 2)
    return (images.float() / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
