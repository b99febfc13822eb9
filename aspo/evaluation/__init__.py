"""What a model's answers are worth: judged to counts, counts to figures, figures to intervals (docs/evaluation.md)."""
