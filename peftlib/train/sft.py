"""Supervised fine-tuning from options to a file: what ``python -m peftlib.train sft`` does."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftlib import FullFineTuning, PeftlibError, Tuning, attach, summary
from peftlib.charts import check_file
from peftlib.commands import METHODS, Options, function_of
from peftlib.train.arguments import steps_in_all
from peftlib.train.batches import Batches
from peftlib.train.chat import ChatTemplate
from peftlib.train.data import Preference, read_jsonl
from peftlib.train.evaluation import EarlyStopping, mode
from peftlib.train.history import History
from peftlib.train.interrupt import after_this_step
from peftlib.train.loop import fit
from peftlib.train.losses import causal_lm
from peftlib.train.packing import Encoded, encode, padder
from peftlib.train.parallel import ranks_of
from peftlib.train.saving import STATE
from peftlib.train.schedules import constant, cosine, linear
from peftlib.train.step import NonFiniteError
from peftlib.train.tokens import Tokenizer, as_tokenizer, byte_tokenizer

CHOICES: dict[str, Callable[[Options], Any]] = {
    "full": lambda o: FullFineTuning(keep_base=False),
    **METHODS,
}
SCHEDULES: dict[str, Callable[..., float]] = {"constant": constant, "cosine": cosine, "linear": linear}
CASTS = {"bfloat16": torch.bfloat16, "float16": torch.float16}
TUNING = "tuning.safetensors"
MOST = 500
"""Steps between checkpoints, and between evaluations, where an epoch has more."""


def sft(options: Options) -> None:
    """Train, save and tell.

    Raises:
        PeftlibError: a wrong option, model or file, named.
    """
    say = sys.stdout.write if os.environ.get("RANK", "0") == "0" else lambda text: None
    evaluates = options.eval is not None or options.eval_share > 0
    if (options.out / STATE).exists() and not options.resume:
        raise PeftlibError(
            f"{str(options.out)!r} already holds a training: --resume goes on with it; or give another --out."
        )
    if options.patience is not None and not evaluates:
        raise PeftlibError("--patience counts evaluations: give --eval FILE or --eval-share 0.1")
    if options.steps is not None and options.epochs is not None:
        raise PeftlibError("give --steps or --epochs, not both")
    if not options.clip >= 0:
        raise PeftlibError(f"--clip {options.clip:g}: give the largest norm of the gradients, or 0 for none")
    if options.plot is not None:
        check_file(options.plot)
    factory, _ = function_of(options.model)
    tokenizer, template = _tokenizer(options)
    examples, held = _examples(options, tokenizer, template, say)
    batches = Batches(examples, options.batch, padder(tokenizer), seed=options.seed)
    epochs = 3 if options.epochs is None and options.steps is None else options.epochs
    per_epoch, total = steps_in_all(batches, options.steps, epochs, options.accumulate)
    if not 0 <= options.warmup < total:
        raise PeftlibError(
            f"--warmup {options.warmup}: of {total} step(s) in all, give a number from 0 to {total - 1}"
        )
    interval = min(per_epoch or MOST, MOST)

    torch.manual_seed(options.seed)
    device = _device(options)
    model = _made(factory, options).to(device)
    tuning = _attached(model, next(iter(batches))["inputs"][:1].to(device), options)
    _try(model, [*examples, *held], device, tokenizer)
    say(f"\n{summary(model)}\n\n")
    usual = 2e-5 if options.method == "full" else 2e-4
    rate = usual if options.lr is None else options.lr
    try:
        optimizer = torch.optim.AdamW(tuning.parameters(), lr=rate, weight_decay=options.weight_decay)
    except ValueError as error:
        raise PeftlibError(f"--lr or --weight-decay: {error}") from error
    with after_this_step() as asked:
        try:
            history = fit(
                model,
                batches,
                causal_lm,
                optimizer=optimizer,
                steps=options.steps,
                epochs=epochs,
                scheduler=partial(SCHEDULES[options.schedule], warmup=options.warmup),
                accumulate=options.accumulate,
                clip=options.clip or None,
                autocast=CASTS.get(options.autocast),
                checkpoint_activations=options.checkpointing,
                evaluate=Batches(held, options.batch, padder(tokenizer), shuffle=False) if held else None,
                evaluate_every=interval if options.evaluate_every is None else options.evaluate_every,
                early_stopping=None if options.patience is None else EarlyStopping(patience=options.patience),
                checkpoint_dir=options.out,
                checkpoint_every=interval if options.checkpoint_every is None else options.checkpoint_every,
                callbacks=[asked],
                resume=options.resume,
                seed=options.seed,
                parallel=options.parallel,
            )
        except NonFiniteError as error:
            numbers = str(error).partition(". ")[0]
            raise PeftlibError(
                f"{numbers}. Lower --lr, give --warmup or a smaller --clip, or look for extreme examples."
            ) from error
        # all processes leave, or none: one alone would wait for the others
        ended = ranks_of(options.parallel, device, options.seed).agreed(asked({}))
    if ended:
        raise KeyboardInterrupt
    _save(tuning, options)
    say(_told(history, options))


def _tokenizer(options: Options) -> tuple[Tokenizer, ChatTemplate | None]:
    """The tokenizer, and its own chat template if it has one."""
    named = options.tokenizer
    if named == "bytes":
        return byte_tokenizer(), None
    try:
        if not Path(named).exists():
            raise PeftlibError(f"--tokenizer {named}: there is no such file or folder; 'bytes' needs none")
        if Path(named).is_file():
            from tokenizers import Tokenizer as FromFile

            return as_tokenizer(FromFile.from_file(named), eos=options.eos), None
        from transformers import AutoTokenizer

        own = AutoTokenizer.from_pretrained(named)
    except ImportError as error:
        raise PeftlibError(f"--tokenizer {named} needs a package: pip install {error.name}") from error
    except PeftlibError:
        raise
    except Exception as error:
        raise PeftlibError(f"--tokenizer {named} cannot be read: {error}") from error
    template = ChatTemplate(own, eos=options.eos) if own.chat_template else None
    return as_tokenizer(own, eos=options.eos), template


def _examples(
    options: Options, tokenizer: Tokenizer, template: ChatTemplate | None, say: Callable[[str], Any]
) -> tuple[list[Encoded], list[Encoded]]:
    """What is trained on and what is evaluated on."""

    def read(path: Path) -> list[Encoded]:
        found, left = [], []
        for example in read_jsonl(path, template=template):
            if isinstance(example, Preference):
                raise PeftlibError(
                    f"{example.source}: preferences are not for sft; give completions or messages"
                )
            try:
                found.append(encode(example, tokenizer, max_length=options.length))
            except PeftlibError as error:
                left.append(str(error))
        if not found:
            raise PeftlibError(f"{path}: no example is left. {left[0]}")
        if left:
            say(f"{len(left)} example(s) of {path} left out; the first: {left[0]}\n")
        return found

    if not 0 <= options.eval_share < 1:
        raise PeftlibError(f"--eval-share {options.eval_share}: give a share from 0 to below 1")
    examples = read(options.data)
    if options.eval is not None:
        held = read(options.eval)
    else:
        generator = torch.Generator().manual_seed(options.seed)
        order = torch.randperm(len(examples), generator=generator).tolist()
        cut = max(1, round(options.eval_share * len(examples))) if options.eval_share else 0
        held, examples = [examples[i] for i in order[:cut]], [examples[i] for i in sorted(order[cut:])]
        if not examples:
            raise PeftlibError(f"--eval-share {options.eval_share} leaves nothing to train on")
    trained = sum(label >= 0 for example in examples for label in example.labels)
    tokens = sum(len(example.ids) for example in examples)
    plural = "" if len(examples) == 1 else "s"
    say(
        f"{len(examples):,} example{plural} to train on, of {tokens:,} tokens, {trained:,} of them trained; "
        f"{len(held):,} to evaluate on\n"
    )
    return examples, held


def _device(options: Options) -> torch.device:
    if options.device:
        try:
            return torch.empty(0, device=options.device).device
        except (RuntimeError, AssertionError) as error:
            raise PeftlibError(f"--device {options.device} is not to be had here: {error}") from error
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def _made(factory: Callable[[], Any], options: Options) -> nn.Module:
    try:
        model = factory()
    except Exception as error:
        raise PeftlibError(f"{options.model} failed ({type(error).__name__}: {error})") from error
    if not isinstance(model, nn.Module):
        raise PeftlibError(f"{options.model} gave {type(model).__name__}, not an nn.Module: return the model")
    return model


def _attached(model: nn.Module, example: torch.Tensor, options: Options) -> Tuning:
    method = CHOICES[options.method](options)
    # full fine-tuning acts anywhere; the others look where the model really goes
    return attach(
        model, method, targets=options.targets, example=None if options.method == "full" else example
    )


@torch.no_grad()
def _try(model: nn.Module, examples: list[Encoded], device: torch.device, tokenizer: Tokenizer) -> None:
    """The longest example and that of the largest id through the model: what does not fit is known before the start."""
    extremes = [max(examples, key=lambda e: len(e.ids)), max(examples, key=lambda e: max(e.ids))]
    batch = {key: value.to(device) for key, value in padder(tokenizer)(extremes).items()}
    try:
        with mode(model, False):
            causal_lm(model, batch)
    except PeftlibError:
        raise
    except Exception as error:
        longest, largest = (max(e.ids) if i else len(e.ids) for i, e in enumerate(extremes))
        raise PeftlibError(
            f"The model cannot take the longest example, of {longest} tokens, beside that of the largest id, {largest} "
            f"of {tokenizer.vocabulary} ({type(error).__name__}: {error}). Do --tokenizer and --length go with it?"
        ) from error


def _save(tuning: Tuning, options: Options) -> None:
    from torch import distributed

    together = distributed.is_available() and distributed.is_initialized()
    if options.parallel == "fsdp" or not together or distributed.get_rank() == 0:
        tuning.save(options.out / TUNING)


def _told(history: History, options: Options) -> str:
    lines = [str(history), ""]
    seconds, targets = sum(history.seconds), sum(row["targets"] for row in history.rows)
    lines.append(
        f"{len(history.rows)} steps in {seconds:.1f} s, {targets / max(seconds, 1e-9):,.0f} trained tokens/s"
    )
    if options.plot is not None:
        history.plot(options.plot)
        lines.append(f"losses: {options.plot}")
    path = options.out / TUNING
    lines.append(f"tuning: {path}    (peftlib.load(model, {str(path)!r}))")
    return "\n".join(lines) + "\n"
