"""Training any module: a loop that resumes bit for bit, losses, data; plain functions to read and to change."""

from peftlib.train.batches import Batches
from peftlib.train.evaluation import EarlyStopping
from peftlib.train.history import History
from peftlib.train.logs import JsonlLog
from peftlib.train.loop import fit
from peftlib.train.schedules import constant, cosine, linear
from peftlib.train.step import NonFiniteError, train_step

__all__ = [
    "Batches",
    "EarlyStopping",
    "History",
    "JsonlLog",
    "NonFiniteError",
    "constant",
    "cosine",
    "fit",
    "linear",
    "train_step",
]
