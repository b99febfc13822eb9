"""aspo_kernels: sentence-level preference losses straight from hidden states, without ever holding the logits.

Needs torch alone; on a GPU its Triton kernels are used, which come with torch. Start with `sentence_dpo_loss`; build
your own loss from `linear_logps` and `objectives`.
"""

from aspo_kernels import aspo as _aspo  # noqa: F401  registers its objective
from aspo_kernels import family as _family  # noqa: F401  registers the others
from aspo_kernels import objectives, reference
from aspo_kernels.layout import SentenceLayout
from aspo_kernels.linear_logps import linear_logps, linear_logps_pair
from aspo_kernels.linear_stats import LinearStats, linear_stats
from aspo_kernels.linear_token_kl import TokenKL, linear_token_kl
from aspo_kernels.sentence_dpo import (
    SentenceDPOOutput,
    gather_hidden,
    sentence_dpo_loss,
    sentence_dpo_loss_from_logits,
)
from aspo_kernels.sequence import SequenceShard
from aspo_kernels.token_logps import token_logps
from aspo_kernels.vocabulary import VocabularyShard, gather_head

__version__ = "0.1.0"

__all__ = [
    "LinearStats",
    "SentenceDPOOutput",
    "SentenceLayout",
    "SequenceShard",
    "TokenKL",
    "VocabularyShard",
    "gather_head",
    "gather_hidden",
    "linear_logps",
    "linear_logps_pair",
    "linear_stats",
    "linear_token_kl",
    "objectives",
    "reference",
    "sentence_dpo_loss",
    "sentence_dpo_loss_from_logits",
    "token_logps",
]
