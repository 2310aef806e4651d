"""A second model that measures compare with, such as one trained without the forget data."""

from locedit.errors import LoceditError
from locedit.loading import locate
from locedit.models import Model, load


def require_folder(source: str | None, *, option: str) -> None:
    """Raise LoceditError, naming the option, for a path at which no model is; a hub id is not looked up."""
    if source is None:
        return
    try:
        locate(source)
    except LoceditError as error:
        raise LoceditError(f"{option}={source!r}: {error}") from None


def beside(model: Model, source: str, *, option: str) -> Model:
    """The model at a folder or hub id, on the device of the other and reading the same tokens.

    Raises LoceditError, naming the option, where it cannot be loaded or its tokens are others.
    """
    try:
        other = load(source, dtype=model.dtype, device=model.device)
    except LoceditError as error:
        raise LoceditError(f"{option}={source!r}: {error}") from None
    if other.causal != model.causal:
        kinds = {True: "a causal", False: "a masked"}
        raise LoceditError(
            f"{option}={source!r} is {kinds[other.causal]} language model, {model.name} {kinds[model.causal]} one"
        )
    if other.tokenizer is None:
        other.tokenizer = model.tokenizer
    if other.tokenizer.get_vocab() != model.tokenizer.get_vocab():
        raise LoceditError(f"{option}={source!r}: its tokenizer is not that of {model.name}")
    return other
