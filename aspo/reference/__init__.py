"""The reference's log-probabilities: computed ahead of training, found by content, checked against the model."""
