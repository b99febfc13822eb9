"""The objectives, by family; importing this registers them all (ASPO's, with its fused kernel, is `aspo_kernels.aspo`).

docs/objectives.md has every equation with its source, what is certain of it and what is our choice.
"""

from aspo_kernels.family import acpo, images, pairs, token_kl, tokens, unpaired  # noqa: F401
