"""The trainer from a shell: ``python -m peftlib.train sft --model model.py:build --data pairs.jsonl --method lora``."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from torch import distributed

from peftlib import PeftlibError
from peftlib.commands import add_method_options
from peftlib.train.saving import last_step
from peftlib.train.sft import CASTS, CHOICES, SCHEDULES, sft

EPILOG = """\
The file's function makes the model with its weights: token ids (batch, length) -> logits (batch, length, vocabulary),
or something with .logits. The data is JSON lines: instruction, input, output; or prompt, completion; or messages.
In several processes: torchrun --nproc-per-node 8 -m peftlib.train sft --parallel fsdp ...
"""


def main(arguments: Sequence[str] | None = None) -> int:
    r"""Train as the arguments say; see ``--help``.

    Returns:
        The exit status: 0, or 2 for a wrong argument, model or file.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "model.py"
        ...     _ = path.write_text(
        ...         "from torch import nn\n"
        ...         "def build(): return nn.Sequential(nn.Embedding(258, 8), nn.Linear(8, 258))\n"
        ...     )
        ...     data = Path(folder) / "pairs.jsonl"
        ...     _ = data.write_text('{"prompt": "a", "completion": "b"}')
        ...     where = ["--model", f"{path}:build", "--data", str(data), "--out", f"{folder}/out"]
        ...     main(["sft", *where, "--steps", "2", "--targets", "1", "--rank", "2"])
        1 example to train on...
        0
    """
    with contextlib.nullcontext() if _speaks() else contextlib.redirect_stderr(io.StringIO()):
        options = _parser().parse_args(arguments)
    try:
        sft(options)
    except PeftlibError as error:
        _tell(str(error))
        return 2
    except KeyboardInterrupt:
        done = last_step(options.out)
        kept = "before the first checkpoint." if done is None else f"with a checkpoint after step {done}."
        _tell(
            f"\nStopped {kept} The same command{'' if done is None else ' with --resume'} goes on from there."
        )
        return 130
    return 0


def _speaks() -> bool:
    """Whether this process is the first of its machine, all of which run into the same mistakes."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _tell(text: str) -> None:
    # once they train together, one may fail where the others do not
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        sys.stderr.write(f"process {distributed.get_rank()}: {text}\n")
    elif _speaks():
        sys.stderr.write(f"{text}\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m peftlib.train",
        description="Tune a model on a file of examples; sft --help lists the options.",
    )
    task = parser.add_subparsers(dest="task", required=True, metavar="sft").add_parser(
        "sft",
        help="supervised fine-tuning: completions are trained, prompts are not",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = task.add_argument
    add("--model", required=True, metavar="PATH.PY:FUNCTION", help="what makes the model")
    add("--data", required=True, type=Path, metavar="FILE", help="JSON lines to train on")
    add("--eval", type=Path, metavar="FILE", help="JSON lines to evaluate on")
    add(
        "--eval-share",
        type=float,
        default=0.0,
        metavar="0..1",
        help="or this share of --data, taken out of it",
    )
    add(
        "--out",
        type=Path,
        default=Path("tuned"),
        metavar="FOLDER",
        help="checkpoints, log and the tuning (default tuned)",
    )
    add("--resume", action="store_true", help="go on with what is in --out")
    add(
        "--tokenizer",
        default="bytes",
        help="bytes (default), a file of tokenizers, or a folder of transformers",
    )
    add("--eos", help="the token that ends a completion, where the tokenizer names none")
    add("--method", choices=list(CHOICES), default="lora", help="(default lora)")
    add_method_options(task)
    add("--lr", type=float, help="highest rate (default 2e-4; 2e-5 for full)")
    add("--schedule", choices=list(SCHEDULES), default="cosine", help="(default cosine)")
    add("--warmup", type=int, default=0, metavar="STEPS", help="steps over which the rate rises (default 0)")
    add("--weight-decay", type=float, default=0.0, help="of AdamW (default 0)")
    add("--clip", type=float, default=1.0, help="largest norm of the gradients, 0 for none (default 1)")
    add("--epochs", type=int, help="passes over the data (default 3)")
    add("--steps", type=int, help="or steps in all")
    for what in ("checkpoint", "evaluate"):
        usual = "(default: an epoch's, at most 500)"
        add(f"--{what}-every", type=int, metavar="STEPS", help=f"steps until it does so again {usual}")
    add("--batch", type=int, default=8, help="examples at a time, in all processes together (default 8)")
    add("--accumulate", type=int, default=1, help="batches per step (default 1)")
    add("--length", type=int, default=512, help="longest example in tokens (default 512)")
    add(
        "--patience",
        type=int,
        metavar="N",
        help="end after N evaluations without improvement, with the best values",
    )
    add("--autocast", choices=list(CASTS), help="dtype of the forward")
    add(
        "--checkpointing",
        action="store_true",
        help="compute repeated blocks twice instead of keeping their insides",
    )
    add("--parallel", choices=("ddp", "fsdp"), help="under torchrun: how processes share the work")
    add("--device", help="(default: cuda if there is one, else cpu)")
    add("--plot", type=Path, metavar="FILE", help="draw the losses into FILE")
    add("--seed", type=int, default=0, help="of the order of the data, dropout and new values (default 0)")
    return parser
