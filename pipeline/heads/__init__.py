"""Heads: published classifiers of fixed embeddings, one a file. Floor 1."""
