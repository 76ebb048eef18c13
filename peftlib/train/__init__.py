"""Training any module: a loop that resumes bit for bit, losses, data; plain functions to read and to change."""

from peftlib.train.batches import Batches
from peftlib.train.data import Example, Preference, Template, read_jsonl
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
from peftlib.train.packing import Encoded, document_mask, encode, pack, pad, padder
from peftlib.train.schedules import constant, cosine, linear
from peftlib.train.step import NonFiniteError, train_step
from peftlib.train.tokens import Tokenizer, as_tokenizer, byte_tokenizer

__all__ = [
    "Batches",
    "EarlyStopping",
    "Encoded",
    "Example",
    "History",
    "JsonlLog",
    "NonFiniteError",
    "Preference",
    "Template",
    "Tokenizer",
    "as_tokenizer",
    "byte_tokenizer",
    "causal_lm",
    "chunked_cross_entropy",
    "classification",
    "constant",
    "cosine",
    "cross_entropy",
    "document_mask",
    "encode",
    "fit",
    "linear",
    "mask_tokens",
    "masked_lm",
    "pack",
    "pad",
    "padder",
    "read_jsonl",
    "regression",
    "train_step",
]
