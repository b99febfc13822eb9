"""`aspo online`: FiSAO's on-policy loop: generate, score, update (docs/fisao.md)."""
