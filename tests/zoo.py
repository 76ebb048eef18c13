"""Hosts and methods as data: what the contract is checked on.

A :class:`Host` is a small model with inputs and the places it offers, a :class:`Case` a method and the kind of place
it needs. A new method, or a new host, joins every test of the contract with one entry here.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

import peftlib
from peftlib import (
    Adapter,
    BitFit,
    FullFineTuning,
    LoRA,
    NewHead,
    PartialFineTuning,
    PrefixTuning,
    PromptTuning,
    PTuningV1,
    PTuningV2,
)
from peftlib.methods.base import Method

VOCABULARY, WIDTH, LENGTH, BATCH = 23, 8, 5, 2


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def tensors_in(output: Any, path: str = "output") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in an output of tensors, tuples, mappings and dataclasses, by its path."""
    if isinstance(output, Tensor):
        yield path, output
    elif isinstance(output, (tuple, list)):
        for i, value in enumerate(output):
            yield from tensors_in(value, f"{path}.{i}")
    elif isinstance(output, Mapping):
        for key, value in output.items():
            yield from tensors_in(value, f"{path}.{key}")
    elif is_dataclass(output):
        for key, value in vars(output).items():
            yield from tensors_in(value, f"{path}.{key}")


@dataclass(frozen=True)
class Host:
    """A model, inputs for one forward, and where a method can go.

    Attributes:
        build: makes the model; called once, copies are handed out.
        inputs: makes the arguments of one forward: a tuple, or a dict of keywords.
        places: kind of place -> targets there; ``None`` stands for the method's own default.
        training: the mode the model is used in.
        exact: whether an open site computes bit for bit what the closed one does; ``nn.MultiheadAttention`` and the
            fused encoder layer do not, they add in another order.
        same_in_training: whether train and eval give the same outputs (no batch norm).
        compiles: whether the plain model is one graph for ``torch.compile``.
        pickles: whether the plain model can be pickled.
        needs: a package it is made of.
        only: cases it is there for, where it differs from another host in what few of them can notice.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    places: Mapping[str, Any]
    training: bool = False
    exact: bool = True
    same_in_training: bool = True
    compiles: bool = True
    pickles: bool = True
    needs: str | None = None
    only: tuple[str, ...] | None = None
    dtype: torch.dtype = torch.float32

    def model(self) -> nn.Module:
        """A copy of the model, the same weights each time."""
        return copy.deepcopy(_prototype(self))

    def base(self) -> nn.Module:
        """The frozen model. Torch may compute in another order where a weight requires gradients."""
        return self.model().requires_grad_(False)

    def on_meta(self) -> nn.Module:
        """The model without values, tied weights still tied."""
        with torch.device("meta"):
            return self.build().to(self.dtype).train(self.training)

    def example(self) -> Any:
        """The same inputs each time."""
        with seeded(1):
            return tree_map_only(Tensor, self._typed, self.inputs())

    def run(self, model: nn.Module, inputs: Any = None) -> dict[str, Tensor]:
        """One forward with the same random numbers each time; the output's tensors by their path in it."""
        inputs = self.example() if inputs is None else inputs
        with seeded(2):
            out = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
        return dict(tensors_in(out))

    def _typed(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def __hash__(self) -> int:
        return hash(self.name)

    def __str__(self) -> str:
        return self.name


@functools.cache
def _prototype(host: Host) -> nn.Module:
    with seeded(0):
        model = host.build().to(host.dtype).train(host.training)
        # Statistics that are nobody's defaults, and whatever the model caches in its first forward.
        model.train()
        host.run(model)
        for parameter in model.parameters():
            parameter.grad = None
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter, std=0.1)
        return model.train(host.training)


@dataclass(frozen=True)
class Case:
    """A method and what it declares about itself.

    Attributes:
        place: the kind of place it needs.
        identity: attaching it changes no output.
        dropout: it drops in training, so train and eval differ.
        variant: a setting of a method that is here already; tried on :data:`SAMPLE` only.
    """

    name: str
    method: Method
    place: str
    identity: bool = True
    dropout: bool = False
    variant: bool = False

    def __str__(self) -> str:
        return self.name


# -- models ------------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Causal self-attention through SDPA."""

    def __init__(self, width: int = WIDTH, heads: int = 2):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.o_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.o_proj(out.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    def __init__(self, width: int = WIDTH):
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    def __init__(self, width: int = WIDTH):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), Attention(width)
        self.norm2, self.mlp = nn.LayerNorm(width), MLP(width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))


class Decoder(nn.Module):
    """A GPT nobody has heard of: learned positions, blocks in a module list, its own head."""

    def __init__(self, depth: int = 2, tied: bool = False, checkpointed: bool = False):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.position = nn.Embedding(2 * LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=not tied)
        self.checkpointed = checkpointed
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.position(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return self.head(self.norm(x))


class Recycled(nn.Module):
    """One block that runs twice and lies under two names, and one linear used on two streams."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.first = Block()
        self.again = self.first
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        y = self.mix(x)
        return self.head(self.mix(self.again(self.first(y))))


class KeywordOnly(nn.Module):
    """Takes keywords alone, inside as well, and returns a dict."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Linear(WIDTH, WIDTH)
            self.attn = Attention()

        def forward(self, *, hidden: Tensor, mask: Tensor) -> dict[str, Tensor]:
            return {"hidden": hidden + self.attn(self.mix(hidden), mask=mask), "mask": mask}

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleDict({"a": self.Layer(), "b": self.Layer()})
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, *, ids: Tensor, mask: Tensor) -> dict[str, Any]:
        state = {"hidden": self.embed(ids), "mask": mask[:, None, None, :]}
        for layer in self.layers.values():
            state = layer(**state)
        return {"logits": self.head(state["hidden"].mean(1)), "states": [state["hidden"]]}


KeywordOnly.Layer.__qualname__ = "KeywordOnly.Layer"


@dataclass
class Answer:
    logits: Tensor
    hidden: tuple[Tensor, ...]
    note: str = ""


class Structured(nn.Module):
    """Blocks that return tuples, and a root that returns a dataclass."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> tuple[Tensor, int]:
            return x + torch.tanh(self.left(x)) * self.right(x), x.shape[-1]

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(self.Pair() for _ in range(2))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Answer:
        hidden = []
        for block in self.blocks:
            x, width = block(x)
            hidden.append(x)
        return Answer(self.head(x), tuple(hidden), note=f"{width} wide")


class Encoder(nn.Module):
    """``nn.TransformerEncoder`` with a head."""

    def __init__(self, **kwargs: Any):
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, dropout=0.0, **kwargs)
        nested = bool(kwargs.get("batch_first")) and not kwargs.get("norm_first")
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, **masks: Any) -> Tensor:
        out = self.head(self.encoder(x, **masks))
        padded = masks.get("src_key_padding_mask")
        # What stands at padding is nobody's business: zero in eval, anything in training.
        return out if padded is None else out.masked_fill(padded[..., None], 0.0)


class CrossDecoder(nn.Module):
    """``nn.TransformerDecoder`` over a given memory."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerDecoderLayer(
            WIDTH, 2, 2 * WIDTH, dropout=0.0, batch_first=True, norm_first=True
        )
        self.decoder = nn.TransformerDecoder(layer, 2)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, memory: Tensor, **masks: Any) -> Tensor:
        return self.head(self.decoder(x, memory, **masks))


class WholeTransformer(nn.Module):
    """``nn.Transformer``, sequence first, as it comes."""

    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it asks for nested tensors, then warns that it cannot have them
            self.transformer = nn.Transformer(WIDTH, 2, 1, 1, 2 * WIDTH, dropout=0.0)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, source: Tensor, target: Tensor, **masks: Any) -> Tensor:
        return self.head(self.transformer(source, target, **masks))


class ConvNet(nn.Module):
    """Channel-first: plain, grouped, depthwise and pointwise convolutions under batch norms."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.depthwise = nn.Conv2d(8, 16, 3, padding=1, groups=8, bias=False)
        self.pointwise = nn.Conv2d(16, 8, 1)
        self.norm2 = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norm(self.stem(x)))
        x = F.gelu(self.norm2(self.pointwise(self.depthwise(self.grouped(x)))))
        return self.head(x.mean((2, 3)))


class LSTMClassifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.lstm = nn.LSTM(WIDTH, 6, batch_first=True, bidirectional=True)
        self.head = nn.Linear(12, 3)

    def forward(self, ids: Tensor) -> Tensor:
        out, _ = self.lstm(self.embed(ids))
        return self.head(out[:, -1])


class MixerBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.tokens = nn.LayerNorm(WIDTH), MLP(LENGTH)
        self.norm2, self.channels = nn.LayerNorm(WIDTH), MLP(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Linear(6, WIDTH)
        self.blocks = nn.Sequential(MixerBlock(), MixerBlock())
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.patch(x)).mean(1))


class Int8Linear(nn.Module):
    """Linear-like without a floating weight: the base is opaque."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        weight = torch.randn(out_features, in_features)
        scale = weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("packed", (weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("offset", torch.randn(out_features))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.packed.to(x.dtype) * self.scale.to(x.dtype), self.offset.to(x.dtype))


class Quantized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = Int8Linear(WIDTH, 2 * WIDTH), Int8Linear(2 * WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x + self.down(torch.tanh(self.up(x)))))


class Experts(nn.Module):
    """Weights without a module: stacked experts, and a linear whose weight is read directly."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 2 * WIDTH, WIDTH) / 3)
        self.down = nn.Parameter(torch.randn(3, WIDTH, 2 * WIDTH) / 3)
        self.router = nn.Linear(WIDTH, 3)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        share = self.router(x).softmax(-1)
        hidden = torch.tanh(torch.einsum("eoi,bti->beto", self.up, x))
        x = x + torch.einsum("bte,eoi,beti->bto", share, self.down, hidden)
        return F.linear(x, self.head.weight, self.head.bias)


# -- models others made ------------------------------------------------------------------------------------------------


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=16,
        n_embd=WIDTH,
        n_layer=2,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
        attn_implementation="sdpa",
    )
    return GPT2LMHeadModel(config)


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        use_cache=False,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=3,
        attn_implementation="sdpa",
    )
    return BertForSequenceClassification(config)


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        d_kv=4,
        d_ff=16,
        num_layers=1,
        num_decoder_layers=1,
        num_heads=2,
        dropout_rate=0.0,
        use_cache=False,
        decoder_start_token_id=0,
        attn_implementation="sdpa",
    )
    return T5ForConditionalGeneration(config)


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=8,
        patch_size=4,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="sdpa",
    )
    return ViTForImageClassification(config)


def x_transformer() -> nn.Module:
    from x_transformers import Decoder as XDecoder
    from x_transformers import TransformerWrapper

    return TransformerWrapper(
        num_tokens=VOCABULARY,
        max_seq_len=16,
        attn_layers=XDecoder(
            dim=WIDTH, depth=2, heads=2, attn_dim_head=32, attn_flash=True, rotary_pos_emb=True
        ),
    )


# -- inputs ------------------------------------------------------------------------------------------------------------


def ids(length: int = LENGTH) -> Tensor:
    return torch.randint(1, VOCABULARY, (BATCH, length))


def vectors(*shape: int) -> Tensor:
    return torch.randn(*(shape or (BATCH, LENGTH, WIDTH)))


def padding(length: int = LENGTH) -> Tensor:
    """True where padded; the first row is whole."""
    return torch.arange(length) >= torch.tensor([[length], [length - 2]])


def causal(length: int = LENGTH) -> Tensor:
    return nn.Transformer.generate_square_subsequent_mask(length)


# -- the lists ---------------------------------------------------------------------------------------------------------

BLOCKS = {
    "all": None,
    "bias": None,
    "linear": None,
    "module": None,
    "head": ["head"],
    "part": ["blocks.1", "head"],
}
TRANSFORMER = BLOCKS | {"attention": None}
TORCH_ENCODER = TRANSFORMER | {"part": ["encoder.layers.1", "head"], "beside": ["linear1", "linear2"]}

TYPED = ("lora", "dora", "adapter", "adapter-parallel", "prefix", "full")


def hosts() -> Iterator[Host]:
    decoder = TRANSFORMER | {"beside": ["mlp"], "prompt": None}
    yield Host("decoder", Decoder, lambda: (ids(),), decoder)
    yield Host("decoder-training", Decoder, lambda: (ids(),), decoder, training=True)
    yield Host("block", lambda: Decoder(depth=1), lambda: (ids(),), decoder | {"part": ["blocks.0", "head"]})
    yield Host(
        "decoder-checkpointed",
        lambda: Decoder(checkpointed=True),
        lambda: (ids(),),
        decoder,
        training=True,
        only=("lora", "adapter", "prefix", "partial"),
    )
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        name = f"decoder-{str(dtype).removeprefix('torch.')}"
        yield Host(name, Decoder, lambda: (ids(),), decoder, dtype=dtype, only=TYPED)
    yield Host("tied", lambda: Decoder(tied=True), lambda: (ids(),), decoder)
    yield Host(
        "recycled",
        Recycled,
        lambda: (ids(),),
        TRANSFORMER | {"module": ["mix", "first"], "beside": ["mlp"], "part": ["first.mlp", "head"]},
    )
    yield Host(
        "keyword-only",
        KeywordOnly,
        lambda: {"ids": ids(), "mask": ~padding()},
        TRANSFORMER | {"module": ["layers.a", "mix"], "beside": ["mix"], "part": ["layers.b", "head"]},
    )
    yield Host("structured", Structured, lambda: (vectors(),), BLOCKS | {"beside": ["blocks.*"]})
    yield Host(
        "encoder",
        lambda: Encoder(batch_first=True, norm_first=True),
        lambda: (vectors(),),
        TORCH_ENCODER,
        exact=False,
    )
    yield Host(
        "encoder-causal",
        lambda: Encoder(batch_first=True),
        lambda: {"x": vectors(), "mask": causal(), "is_causal": True},
        TORCH_ENCODER,
        exact=False,
    )
    yield Host("encoder-training", Encoder, lambda: (vectors(),), TORCH_ENCODER, training=True, exact=False)
    yield Host(
        "encoder-padded",
        lambda: Encoder(batch_first=True),
        lambda: {"x": vectors(), "src_key_padding_mask": padding()},
        TORCH_ENCODER,
        exact=False,
        compiles=False,
    )
    yield Host(
        "cross-decoder",
        CrossDecoder,
        lambda: {
            "x": vectors(),
            "memory": vectors(BATCH, 7, WIDTH),
            "tgt_mask": causal(),
            "tgt_is_causal": True,
            "memory_key_padding_mask": padding(7),
        },
        TORCH_ENCODER | {"part": ["decoder.layers.1", "head"]},
        exact=False,
    )
    yield Host(
        "transformer",
        WholeTransformer,
        lambda: {
            "source": vectors(7, BATCH, WIDTH),
            "target": vectors(LENGTH, BATCH, WIDTH),
            "tgt_mask": causal(),
            "tgt_is_causal": True,
        },
        TORCH_ENCODER
        | {"part": ["transformer.decoder", "head"], "module": ["encoder.layers.0", "decoder.layers.0"]},
        exact=False,
    )
    conv = {
        "all": None,
        "bias": None,
        "linear": ["stem", "grouped", "pointwise"],
        "module": ["stem", "norm2"],
        "beside": ["stem", "grouped"],
        "part": ["norm2", "head"],
        "head": ["head"],
    }
    image = lambda: (vectors(4, 3, 6, 6),)  # noqa: E731
    yield Host("conv", ConvNet, image, conv, same_in_training=False)
    yield Host("conv-training", ConvNet, image, conv, training=True, same_in_training=False)
    yield Host(
        "conv-bfloat16", ConvNet, image, conv, dtype=torch.bfloat16, same_in_training=False, only=TYPED
    )
    yield Host(
        "lstm",
        LSTMClassifier,
        lambda: (ids(),),
        {
            "all": None,
            "bias": None,
            "linear": ["head"],
            "module": ["embed", "lstm"],
            "beside": ["lstm"],
            "part": ["lstm"],
            "head": ["head"],
        },
        compiles=False,  # the compiler refuses nn.LSTM itself
    )
    yield Host(
        "mixer", Mixer, lambda: (vectors(BATCH, LENGTH, 6),), BLOCKS | {"beside": ["tokens", "channels"]}
    )
    yield Host(
        "quantized",
        Quantized,
        lambda: (vectors(),),
        BLOCKS | {"part": ["norm", "head"], "beside": ["up", "down"]},
    )
    yield Host(
        "experts",
        Experts,
        lambda: (vectors(),),
        {
            "all": None,
            "bias": None,
            "parameter": ["up", "down", "head.weight"],
            "part": ["up", "head.weight"],
        },
    )
    hf = TRANSFORMER | {"prompt": None}
    unbiased = {k: v for k, v in hf.items() if k != "bias"}
    yield Host(
        "gpt2",
        gpt2,
        lambda: {"input_ids": ids(), "attention_mask": torch.ones(BATCH, LENGTH, dtype=torch.long)},
        hf | {"part": ["h.1"], "head": ["lm_head"], "beside": ["mlp"]},
        needs="transformers",
    )
    yield Host(
        "llama",
        llama,
        lambda: {"input_ids": ids(), "attention_mask": torch.ones(BATCH, LENGTH, dtype=torch.long)},
        unbiased | {"part": ["layers.1", "lm_head"], "head": ["lm_head"], "beside": ["mlp"]},
        needs="transformers",
    )
    yield Host(
        "bert",
        bert,
        lambda: {"input_ids": ids(), "attention_mask": (~padding()).long()},
        hf
        | {"part": ["layer.1", "classifier"], "head": ["classifier"], "beside": ["attention.output.dense"]},
        needs="transformers",
    )
    yield Host(
        "t5",
        t5,
        lambda: {"input_ids": ids(), "attention_mask": (~padding()).long(), "decoder_input_ids": ids(4)},
        unbiased | {"part": ["decoder"], "head": ["lm_head"], "beside": ["DenseReluDense"]},
        needs="transformers",
    )
    yield Host(
        "vit",
        vit,
        lambda: {"pixel_values": vectors(BATCH, 3, 8, 8)},
        TRANSFORMER
        | {"part": ["layers.1", "classifier"], "head": ["classifier"], "beside": ["attention.o_proj"]},
        needs="transformers",
    )
    yield Host(
        "x-transformers",
        x_transformer,
        lambda: (ids(),),
        unbiased | {"part": ["to_logits"], "head": ["to_logits"], "beside": ["ff"]},
        pickles=False,
        needs="x_transformers",
    )


def cases() -> Iterator[Case]:
    yield Case("lora", LoRA(rank=2), "linear")
    yield Case("dora", LoRA(rank=2, use_dora=True), "linear")
    yield Case("rslora", LoRA(rank=2, alpha=3, use_rslora=True, init="gaussian"), "linear", variant=True)
    yield Case("lora-dropout", LoRA(rank=2, dropout=0.5), "linear", dropout=True, variant=True)
    yield Case("lora-parameter", LoRA(rank=2), "parameter")
    yield Case("adapter", Adapter(dim=2, activation="gelu"), "module")
    yield Case(
        "adapter-parallel", Adapter(dim=2, placement="parallel", scale=4.0, activation="tanh"), "beside"
    )
    yield Case(
        "adapter-normed", Adapter(reduction=4, layer_norm=True, activation="silu"), "module", variant=True
    )
    yield Case("prefix", PrefixTuning(length=3, hidden=6), "attention", identity=False)
    yield Case("ptuning-v2", PTuningV2(length=3), "attention", identity=False)
    yield Case(
        "ptuning-v2-dropout",
        PTuningV2(length=3, reparametrize=True, hidden=6, dropout=0.5),
        "attention",
        identity=False,
        dropout=True,
        variant=True,
    )
    yield Case("prompt", PromptTuning(length=3), "prompt", identity=False)
    yield Case("ptuning-v1", PTuningV1(length=3, hidden=4), "prompt", identity=False)
    yield Case("full", FullFineTuning(), "all")
    yield Case("partial", PartialFineTuning(), "part")
    yield Case("bitfit", BitFit(), "bias")
    yield Case("head", NewHead(5), "head", identity=False)
    yield Case("lora-and-head", LoRA(rank=2, head="head"), "linear", variant=True)


SAMPLE = ("block", "decoder-training", "encoder", "conv-training", "recycled")
"""Hosts that every variant of a method is tried on."""

HOSTS = {host.name: host for host in hosts() if host.needs is None or importlib.util.find_spec(host.needs)}
CASES = {case.name: case for case in cases()}


@dataclass(frozen=True)
class Pair:
    """One host with one method: what an invariant of the contract is checked on."""

    host: Host
    case: Case

    def __str__(self) -> str:
        return f"{self.host}-{self.case}"

    def attach(self, model: nn.Module, name: str = "default", **kwargs: Any) -> peftlib.Tuning:
        """Attach the method with values nobody has by default, at its place in the host."""
        with seeded(3):
            return peftlib.attach(
                model,
                self.case.method,
                targets=self.host.places[self.case.place],
                example=self.host.example(),
                name=name,
                **kwargs,
            )

    def tuned(self) -> tuple[nn.Module, peftlib.Tuning]:
        """A model with the tuning on it, at values that change what the model computes."""
        model, tuning = self.attached()
        nudge(tuning)
        return model, tuning

    def attached(self) -> tuple[nn.Module, peftlib.Tuning]:
        """A copy of a model with the tuning on it as it starts."""
        model = copy.deepcopy(_attached(self))
        return model, peftlib.tunings(model)["default"]

    def run(self, model: nn.Module) -> dict[str, Tensor]:
        return self.host.run(model)


@functools.cache
def _attached(pair: Pair) -> nn.Module:
    model = pair.host.model()
    pair.attach(model)
    return model


PAIRS = [
    Pair(host, case)
    for host in HOSTS.values()
    for case in CASES.values()
    if case.place in host.places
    and (not case.variant or host.name in SAMPLE)
    and (host.only is None or case.name in host.only)
]


def nudge(tuning: peftlib.Tuning, seed: int = 4, size: float = 0.5) -> None:
    """Move every trained parameter away from where it starts."""
    with seeded(seed), torch.no_grad():
        for parameter in tuning.parameters():
            parameter.add_(torch.randn_like(parameter) * size)
