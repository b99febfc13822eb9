"""aspo: a slim trainer for sentence-level preference optimisation of vision-language models."""

from aspo import torchvision_cpu

torchvision_cpu.install()  # before anything imports transformers or open_clip
