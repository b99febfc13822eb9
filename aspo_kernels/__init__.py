"""aspo_kernels: sentence-level preference losses straight from hidden states, without ever holding the logits.

Needs torch alone. Start with `sentence_dpo_loss`; build your own loss from `linear_logps` and `objectives`.
"""

from aspo_kernels import aspo as _aspo  # noqa: F401  registers its objective
from aspo_kernels import objectives, reference
from aspo_kernels.layout import SentenceLayout

__version__ = "0.1.0"

__all__ = [
    "SentenceLayout",
    "objectives",
    "reference",
]
