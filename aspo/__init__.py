"""aspo: a slim trainer for sentence-level preference optimisation of vision-language models."""

from aspo.torchvision_cpu import import_torchvision

import_torchvision()  # before anything imports transformers or open_clip: see aspo/torchvision_cpu.py
