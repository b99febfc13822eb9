"""The shared-prefix step: responses to one prompt and image read behind one copy of both (docs/step.md).

`tree` says where each token lies, `grid` places a batch so, `attention` tells the model who sees whom, `forward` gives
log-probabilities, and `exact` measures that they are what the model would have computed row by row.
"""
