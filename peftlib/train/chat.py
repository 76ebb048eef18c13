"""A tokenizer's own chat template in the place of :class:`peftlib.train.Template`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peftlib import PeftlibError


@dataclass(frozen=True)
class ChatTemplate:
    """Turns as the tokenizer's chat template writes them; what it writes for an assistant is trained, with its end.

    An assistant's turn is what the template adds to the text that it would ask for that turn with. So the model learns
    from what it will be given, in every turn, and to say the template's end of turn; where a template has none, the
    tokenizer's end token stands there.

    Args:
        tokenizer: one of transformers, with a chat template.
        eos: the text of the token that ends what is said where the template writes no end; by default the tokenizer's.

    Raises:
        PeftlibError: it has none.

    Example:
        >>> class Marked:  # as much of a transformers tokenizer as is asked of one
        ...     chat_template, eos_token = "its Jinja", "</s>"
        ...
        ...     def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        ...         text = "".join(f"<{m['role'][0]}>{m['content']}</s>" for m in messages)
        ...         return text + ("<a>" if add_generation_prompt else "")
        >>> ChatTemplate(Marked()).segments([("user", "1+1?"), ("assistant", "2")])
        (('<u>1+1?</s><a>', False), ('2</s>', True))
    """

    tokenizer: Any
    eos: str | None = None

    def __post_init__(self) -> None:
        if not getattr(self.tokenizer, "chat_template", None):
            raise PeftlibError(
                f"{type(self.tokenizer).__name__} has no chat template. Give template=Template(...), or none."
            )

    def segments(self, turns: Sequence[tuple[str, str]]) -> tuple[tuple[str, bool], ...]:
        """Turns (role, content) as pieces (text, whether it is trained).

        Raises:
            PeftlibError: the template refuses the turns, or writes earlier ones differently once later ones follow, or
                writes no end and none is known.
        """
        if turns[0][0] == "assistant":
            raise PeftlibError("the first turn is the assistant's, and a chat template begins with another's")
        whole, done = self._text(turns), 0
        pieces: list[tuple[str, bool]] = []
        for i, (role, content) in enumerate(turns):
            if role != "assistant":
                continue
            asked, said = self._text(turns[:i], asks=True), self._text(turns[: i + 1])
            if not said.startswith(asked) or not whole.startswith(said.rstrip()):
                raise PeftlibError(
                    f"the chat template writes turn {i} differently when it asks for it or when others follow, so what "
                    "the model will be given cannot be trained. Cut the messages after it, or give template=Template()"
                )
            # white space after the end is the next turn's
            kept = said[len(asked) :].rstrip()
            end = self._end() if kept.endswith(content.strip()) else ""
            pieces += [(whole[done : len(asked)], False), (kept + end, True)]
            done = len(asked) + len(kept)
        return tuple(pieces)

    def _end(self) -> str:
        end = self.tokenizer.eos_token if self.eos is None else self.eos
        if end is None:
            raise PeftlibError(
                "the chat template writes no end after what is said, and the tokenizer has no end token, so a model "
                "would never stop. Name one: ChatTemplate(tokenizer, eos='</s>')"
            )
        return str(end)

    def _text(self, turns: Sequence[tuple[str, str]], asks: bool = False) -> str:
        messages = [{"role": role, "content": content} for role, content in turns]
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks)
        except Exception as error:
            roles = ", ".join(role for role, _ in turns)
            raise PeftlibError(f"the chat template refuses turns of {roles}: {error}") from error
        return str(text)
