"""Training any module: a loop that resumes bit for bit, losses, data; plain functions to read and to change."""

from peftlib.train.advantages import gae, grpo_advantages, kl_estimate, masked_mean, whiten
from peftlib.train.batches import Batches, Sampler
from peftlib.train.best_of import Best, best_of
from peftlib.train.chat import ChatTemplate
from peftlib.train.data import Example, Preference, Template, read_jsonl
from peftlib.train.dpo import dpo, kto, sequence_logps
from peftlib.train.evaluation import EarlyStopping
from peftlib.train.fisher import Fisher, fisher
from peftlib.train.generate import Generated, generate
from peftlib.train.groups import groups
from peftlib.train.grpo import grpo
from peftlib.train.history import History
from peftlib.train.logs import JsonlLog, TensorBoardLog
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
from peftlib.train.packing import Encoded, document_mask, encode, pack, pad, padder, split
from peftlib.train.pairs import Judged, Pair, encode_pair, judged_padder, pad_judged, pad_pairs, pair_padder
from peftlib.train.policy import grpo_loss, ppo_policy_loss, ppo_value_loss
from peftlib.train.ppo import AdaptiveKL, ppo
from peftlib.train.preference import dpo_loss, kto_loss, reward_loss
from peftlib.train.regularizers import ewc, l2_sp, with_penalty
from peftlib.train.reward import RewardModel, init_head, reward_accuracy, reward_model, score
from peftlib.train.rollouts import Rollout, completion_logps, roll_out
from peftlib.train.sampling import Balanced, Replay
from peftlib.train.schedules import constant, cosine, linear
from peftlib.train.step import NonFiniteError, train_step
from peftlib.train.tokens import Tokenizer, as_tokenizer, byte_tokenizer
from peftlib.train.weighting import inverse_frequency, with_weights

__all__ = [
    "AdaptiveKL",
    "Balanced",
    "Batches",
    "Best",
    "ChatTemplate",
    "EarlyStopping",
    "Encoded",
    "Example",
    "Fisher",
    "Generated",
    "History",
    "JsonlLog",
    "Judged",
    "Mining",
    "NonFiniteError",
    "Pair",
    "Preference",
    "Replay",
    "RewardModel",
    "Rollout",
    "Sampler",
    "Template",
    "TensorBoardLog",
    "Tokenizer",
    "as_tokenizer",
    "best_of",
    "byte_tokenizer",
    "causal_lm",
    "chunked_cross_entropy",
    "classification",
    "completion_logps",
    "constant",
    "cosine",
    "cross_entropy",
    "document_mask",
    "dpo",
    "dpo_loss",
    "encode",
    "encode_pair",
    "ewc",
    "fisher",
    "fit",
    "gae",
    "generate",
    "groups",
    "grpo",
    "grpo_advantages",
    "grpo_loss",
    "init_head",
    "inverse_frequency",
    "judged_padder",
    "kl_estimate",
    "kto",
    "kto_loss",
    "l2_sp",
    "linear",
    "mask_tokens",
    "masked_lm",
    "masked_mean",
    "pack",
    "pad",
    "pad_judged",
    "pad_pairs",
    "padder",
    "pair_padder",
    "ppo",
    "ppo_policy_loss",
    "ppo_value_loss",
    "read_jsonl",
    "regression",
    "reward_accuracy",
    "reward_loss",
    "reward_model",
    "roll_out",
    "score",
    "sequence_logps",
    "split",
    "train_step",
    "whiten",
    "with_penalty",
    "with_weights",
]
