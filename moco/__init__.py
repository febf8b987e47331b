"""Contrastive pretraining of image encoders with synthetic hard negatives."""

__version__ = "0.1.0"
