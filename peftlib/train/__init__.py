"""Training any module: a loop that resumes bit for bit, losses, data; plain functions to read and to change."""

from peftlib.train.batches import Batches, Sampler
from peftlib.train.data import Example, Preference, Template, read_jsonl
from peftlib.train.evaluation import EarlyStopping
from peftlib.train.fisher import Fisher, fisher
from peftlib.train.groups import groups
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
from peftlib.train.mining import Mining
from peftlib.train.packing import Encoded, document_mask, encode, pack, pad, padder
from peftlib.train.regularizers import ewc, l2_sp, with_penalty
from peftlib.train.sampling import Balanced, Replay
from peftlib.train.schedules import constant, cosine, linear
from peftlib.train.step import NonFiniteError, train_step
from peftlib.train.tokens import Tokenizer, as_tokenizer, byte_tokenizer
from peftlib.train.weighting import inverse_frequency, with_weights

__all__ = [
    "Balanced",
    "Batches",
    "EarlyStopping",
    "Encoded",
    "Example",
    "Fisher",
    "History",
    "JsonlLog",
    "Mining",
    "NonFiniteError",
    "Preference",
    "Replay",
    "Sampler",
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
    "ewc",
    "fisher",
    "fit",
    "groups",
    "inverse_frequency",
    "l2_sp",
    "linear",
    "mask_tokens",
    "masked_lm",
    "pack",
    "pad",
    "padder",
    "read_jsonl",
    "regression",
    "train_step",
    "with_penalty",
    "with_weights",
]
