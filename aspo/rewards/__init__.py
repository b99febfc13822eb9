"""`aspo rewards`: scores of an answer's tokens, from FiSAO's verifier, TLDR's head or what a correction changed."""
