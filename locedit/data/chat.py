"""How a prompt reaches the model: as it is, or through a chat template."""

from dataclasses import dataclass
from typing import Any

from locedit.errors import LoceditError


@dataclass(frozen=True, kw_only=True)
class Chat:
    """What is put around prompts, resolved for one tokenizer."""

    template: str | None
    "Jinja source, or a pattern with {prompt}; None = prompts go as they are"
    own: bool = False
    "the template is the tokenizer's own, which brings every special token itself"

    def render(self, tokenizer: Any, prompt: str) -> str:
        """The text before the answer."""
        if self.template is None:
            return prompt
        if "{prompt}" in self.template:
            return self.template.replace("{prompt}", prompt)
        messages = [{"role": "user", "content": prompt}]
        try:
            return tokenizer.apply_chat_template(
                messages, chat_template=self.template, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # Jinja raises many kinds, templates call raise_exception
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise LoceditError(f"chat template failed on the prompt {prompt[:40]!r}: {reason}") from error

    def adds_special_tokens(self, tokenizer: Any, text: str) -> bool:
        """Whether the tokenizer should add its special tokens to the rendered text."""
        if self.template is None:
            return True
        bos: str | None = tokenizer.bos_token
        return not self.own and not (bos and text.startswith(bos))

    def join(self, tokenizer: Any, prompt: str, answer: str) -> tuple[str, str]:
        """Rendered prompt and answer, ready to be joined.

        A template that ends in a special token or a line end wants the answer without its leading space; a template
        that ends in a space gives that space to the answer, so that no token lies across the border.
        """
        text = self.render(tokenizer, prompt)
        if self.template is None:
            return text, answer
        if text.endswith(" "):
            return text.rstrip(" "), " " + answer.lstrip()
        specials: list[str] = [str(token) for token in tokenizer.all_special_tokens]
        after_mark = text[-1:].isspace() or any(text.endswith(token) for token in specials)
        return text, answer.lstrip() if after_mark else answer


def resolve_chat(tokenizer: Any, chat: str) -> Chat:
    """What `auto`, `off` or a template means for a tokenizer; `Chat.template` is the line for the record."""
    if chat == "off":
        return Chat(template=None)
    own = getattr(tokenizer, "chat_template", None)
    if chat == "auto":
        if own is not None and not isinstance(own, str):
            raise LoceditError(f"chat 'auto': the tokenizer has several templates ({', '.join(own)}): give one as text")
        return Chat(template=own, own=own is not None)
    if not any(mark in chat for mark in ("{prompt}", "{{", "{%")):
        raise LoceditError(f"chat {chat!r} is neither 'auto', 'off', a pattern with {{prompt}} nor a Jinja template")
    return Chat(template=chat, own=chat == own)
