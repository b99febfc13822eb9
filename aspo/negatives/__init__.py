"""`aspo negatives`: images that contradict an answer, made or retrieved; MISP-DPO's choice of them (docs/misp.md)."""
