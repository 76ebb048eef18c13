"""Training any module: a loop that resumes bit for bit, losses, data; plain functions to read and to change."""

from peftlib.train.batches import Batches
from peftlib.train.evaluation import EarlyStopping
from peftlib.train.history import History
from peftlib.train.logs import JsonlLog
from peftlib.train.loop import fit
from peftlib.train.losses import (
    causal_lm,
    chunked_cross_entropy,
    classification,
    cross_entropy,
    masked_lm,
    regression,
)
from peftlib.train.masking import mask_tokens
from peftlib.train.schedules import constant, cosine, linear
from peftlib.train.step import NonFiniteError, train_step

__all__ = [
    "Batches",
    "EarlyStopping",
    "History",
    "JsonlLog",
    "NonFiniteError",
    "causal_lm",
    "chunked_cross_entropy",
    "classification",
    "constant",
    "cosine",
    "cross_entropy",
    "fit",
    "linear",
    "mask_tokens",
    "masked_lm",
    "regression",
    "train_step",
]
