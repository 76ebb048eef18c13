"""What the user of a benchmark hands in (a module of their own, a file), checked before anything runs."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class InputError(ValueError):
    """What was given cannot be used; the message says what was expected and what to do."""


Encode = Callable[[str], list[int]]


def utf8(text: str) -> list[int]:
    """The byte-level encoding.

    >>> utf8("aé")
    [97, 195, 169]
    """
    return list(text.encode())


def load_factory(spec: str) -> tuple[nn.Module, Encode]:
    """The module that ``path.py:factory`` makes, and how it reads text.

    Args:
        spec: a Python file and the name of a callable in it that takes nothing and returns the module. A function
            ``encode(text) -> list[int]`` beside it is the tokenizer; without one the text is read as bytes.
    """
    file, colon, name = spec.rpartition(":")
    if not colon or not file.endswith(".py") or not name.isidentifier():
        raise InputError(
            f"--model {spec}: expected a Python file and a function in it, such as model.py:build"
        )
    path = Path(file).resolve()
    if not path.is_file():
        raise InputError(f"--model {spec}: there is no file {path}")
    # as if the file were run: what lies beside it can be imported
    sys.path.insert(0, str(path.parent))
    module_spec = importlib.util.spec_from_file_location(f"benchmarks_user_{path.stem}", path)
    # a path that ends in .py has a spec with a loader
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    # pickle and dataclasses look up the module of a class by its name
    sys.modules[module_spec.name] = module
    try:
        module_spec.loader.exec_module(module)
        factory = getattr(module, name, None)
        if not callable(factory):
            functions = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
            raise InputError(
                f"--model {spec}: {path.name} has no function {name}; it has {', '.join(functions)}"
            )
        model = factory()
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"--model {spec}: {type(error).__name__} in {path.name}: {error}") from error
    if not isinstance(model, nn.Module):
        raise InputError(
            f"--model {spec}: {name}() must return an nn.Module; it returned {type(model).__name__}"
        )
    return model, getattr(module, "encode", utf8)


def logits_of(output: Any) -> Tensor:
    """The (B, T, V) logits of a forward: its output itself, or that output's ``logits``."""
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.ndim != 3:
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise InputError(
            f"the module must map (B, T) ids to (B, T, V) logits, or to an object with them; got {shape}"
        )
    return logits


@torch.no_grad()
def check_language_model(model: nn.Module, ids_BT: Tensor, largest_id: int) -> None:
    """Refuse a module that does not predict a next token over a vocabulary that holds the text.

    Args:
        model: the module, in the mode it is given in.
        ids_BT: ids of the length that training will use.
        largest_id: the largest token of any text that will be used.
    """
    device = next(model.parameters()).device
    embeddings = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)]
    was_training = model.training
    model.eval()
    try:
        logits_BTV = logits_of(model(ids_BT.to(device)))
        changed_BT = ids_BT.clone()
        changed_BT[:, -1] = (changed_BT[:, -1] + 1) % (largest_id + 1)
        again_BTV = logits_of(model(changed_BT.to(device)))
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"the module fails on ids of shape {tuple(ids_BT.shape)} up to {largest_id} with {type(error).__name__}: "
            f"{error}. Its embeddings hold {embeddings or 'no'} entries; a module for fewer positions needs a smaller "
            "--context"
        ) from error
    finally:
        model.train(was_training)
    if logits_BTV.shape[:2] != ids_BT.shape:
        raise InputError(f"ids of shape {tuple(ids_BT.shape)} gave logits of shape {tuple(logits_BTV.shape)}")
    if logits_BTV.shape[-1] <= largest_id:
        raise InputError(
            f"the text has tokens up to {largest_id}, the module's logits only {logits_BTV.shape[-1]} entries; text is "
            "read as UTF-8 bytes (0..255) unless the module's file defines encode(text) -> list[int]"
        )
    if not torch.allclose(logits_BTV[:, :-1], again_BTV[:, :-1], atol=1e-4, rtol=1e-3):
        raise InputError(
            "the module sees the token it is to predict: changing the last id changed earlier logits. Make its "
            "attention causal"
        )
