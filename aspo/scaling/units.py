"""Unit costs of a job: those that a CPU can show were measured (`python -m benchmarks.units`), the rest is assumed.

`MEASURED` is benchmarks/results/units.csv, rounded up to two digits; a test compares them.
"""

from __future__ import annotations

# Seconds on one core, and bytes.
MEASURED = {
    "pair_seconds": 0.012,  # a row to a batch: a JPEG of 640 x 480 decoded and resized to 336, two answers tokenised
    "length_seconds": 0.0013,  # a row's length in tokens (packing by tokens)
    "jpeg_bytes": 81_000,  # the picture of that row
    "row_bytes": 1_700,  # texts, sentences and similarities of a scored row, in a saved dataset
    "reference_row_bytes": 58,  # of a row in the cache of reference log-probabilities, beside its numbers
    "reference_token_bytes": 4,  # of a token there
    "saved_number_bytes": 12,  # of a trained number in a checkpoint: weights and AdamW's state in fp32
}

# Assumed.
ANSWERS_AT_ONCE = 64  # answers that one GPU generates together
SENTENCES = 6  # of an answer that are scored
CLIP_IMAGE_FLOPS = 2 * 0.304e9 * 577  # CLIP ViT-L/14 at 336 pixels: 2 x parameters of the image tower x patches
CLIP_SENTENCE_FLOPS = 2 * 0.085e9 * 77  # 12 layers of width 768, 77 tokens
