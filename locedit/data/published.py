"""Published formats: ROME's known facts, CounterFact, TOFU, CrowS-Pairs and extraction-challenge arrays."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from locedit.data.bias import crows_pair
from locedit.data.fields import Place, Record, check_name, check_text, check_texts
from locedit.data.items import Dataset, Fact, Item, Neighbour, TokenText
from locedit.errors import LoceditError, nearest

SHARED = ("id", "owner", "group", "format")
"locedit's own fields, which a line in a published format may have too"
PREFIX = 50
"tokens that the extraction challenge shows; the rest is to be extracted"


@dataclass(frozen=True, kw_only=True)
class Format:
    """A published kind of line."""

    name: str
    signature: tuple[str, ...]
    "fields that tell it from others"
    fields: tuple[str, ...]
    "every field that it has"
    convert: Callable[[Place, Record], Item]

    def read(self, place: Place, record: Record) -> Item:
        """The item of a line; a field that the format does not have is an error."""
        shared = {field: record[field] for field in SHARED if field in record}
        for field, value in record.items():
            marks_knowledge = self.name == "known_1000" and isinstance(value, bool)
            if field not in (*self.fields, *SHARED) and not field.startswith("_") and not marks_knowledge:
                reason = f"is unknown in the {self.name} format; {nearest(field, self.fields)}"
                raise place.error(
                    f"{reason}; rename every field with --fields, or ignore={field}", field=field, value=value
                )
        for field in self.signature:
            if record.get(field) is None:
                raise place.error(f"field {field!r} is missing; the file is in the {self.name} format")
        changes = {field: check_name(place, field, value) for field, value in shared.items() if value is not None}
        return dataclasses.replace(self.convert(place, record), **changes)


def published_format(record: Record) -> Format | None:
    """The format whose signature the record shows."""
    for found in FORMATS:
        if all(field in record for field in found.signature):
            return found
    return None


def _known(place: Place, record: Record) -> Fact:
    """Meng et al. 2022, arXiv:2202.05262: prompts that GPT-2 XL completes correctly."""
    subject = check_text(place, "subject", record["subject"])
    return Fact(
        prompt=check_text(place, "prompt", record["prompt"]),
        answer=_spaced(place, "attribute", record["attribute"]),
        id=check_name(place, "known_id", record.get("known_id", place.name)),
        subject=subject,
        owner=subject,
        group=_optional(place, record, "relation_id"),
        format="statement",
    )


def _counterfact(place: Place, record: Record) -> Fact:
    """Meng et al. 2022, arXiv:2202.05262. The answer is the true one, `new_answer` the counterfactual one."""
    rewrite = _object(place, record, "requested_rewrite")
    subject = check_text(place, "requested_rewrite.subject", rewrite.get("subject"))
    template = check_text(place, "requested_rewrite.prompt", rewrite.get("prompt"))
    if template.count("{}") != 1:
        raise place.error("has no place for the subject ('{}')", field="requested_rewrite.prompt", value=template)
    true = _spaced(place, "target_true.str", _object(place, rewrite, "target_true").get("str"))
    near = check_texts(place, "neighborhood_prompts", record.get("neighborhood_prompts", []))
    return Fact(
        prompt=template.replace("{}", subject),
        answer=true,
        id=check_name(place, "case_id", record.get("case_id", place.name)),
        subject=subject,
        paraphrases=check_texts(place, "paraphrase_prompts", record.get("paraphrase_prompts", [])),
        new_answer=_spaced(place, "target_new.str", _object(place, rewrite, "target_new").get("str")),
        neighbours=tuple(Neighbour(prompt=prompt, answer=true) for prompt in near),
        owner=subject,
        group=_optional(place, rewrite, "relation_id"),
        format="statement",
    )


def _tofu(place: Place, record: Record) -> Fact:
    """Maini et al. 2024, arXiv:2401.06121. The answer begins with a space, which a chat template may take away."""
    question = record.get("paraphrased_question")
    answer = record.get("paraphrased_answer")
    wrong = record.get("perturbed_answer") or []
    return Fact(
        prompt=check_text(place, "question", record["question"]),
        answer=_spaced(place, "answer", record["answer"]),
        id=place.name,
        paraphrases=() if question is None else (check_text(place, "paraphrased_question", question),),
        answer_paraphrases=() if answer is None else (_spaced(place, "paraphrased_answer", answer),),
        wrong=tuple(
            _spaced(place, "perturbed_answer", text)
            for text in (cast(list[object], wrong) if isinstance(wrong, list) else [wrong])
        ),
        format="question",
    )


def _spaced(place: Place, field: str, value: object) -> str:
    return " " + check_text(place, field, value).strip()


def _optional(place: Place, record: Record, field: str) -> str | None:
    return None if record.get(field) is None else check_name(place, field, record[field])


def _object(place: Place, record: Record, field: str) -> Record:
    value = record.get(field)
    if not isinstance(value, dict):
        raise place.error("is not an object", field=field, value=value)
    return cast(Record, value)


FORMATS = (
    Format(
        name="CounterFact",
        signature=("requested_rewrite",),
        fields=(
            "case_id",
            "pararel_idx",
            "requested_rewrite",
            "paraphrase_prompts",
            "neighborhood_prompts",
            "attribute_prompts",
            "generation_prompts",
        ),
        convert=_counterfact,
    ),
    Format(
        name="known_1000",
        signature=("subject", "attribute", "prompt"),
        fields=("known_id", "subject", "attribute", "template", "prediction", "prompt", "relation_id"),
        convert=_known,
    ),
    Format(
        name="TOFU",
        signature=("question", "answer"),
        fields=(
            "question",
            "answer",
            "paraphrased_question",
            "paraphrased_answer",
            "perturbed_answer",
            "option1",
            "option2",
            "option3",
            "option4",
        ),
        convert=_tofu,
    ),
    Format(
        name="CrowS-Pairs",
        signature=("sent_more", "sent_less", "stereo_antistereo", "bias_type"),
        fields=(
            "sent_more",
            "sent_less",
            "stereo_antistereo",
            "bias_type",
            "annotations",
            "anon_writer",
            "anon_annotators",
        ),
        convert=crows_pair,
    ),
)


def read_arrays(path: Path) -> Dataset:
    """Token ids [n, length] of the extraction challenge: 50 are shown, the rest is asked for (Carlini et al. 2022).

    A file called `..._prefix.npy` or `..._suffix.npy` is joined with the other of the two, which lies beside it.
    """
    if path.stem.endswith(("_prefix", "_suffix")):
        stem = path.stem[: -len("_prefix")]
        parts = [_array(path.with_name(f"{stem}_{part}.npy")) for part in ("prefix", "suffix")]
        if len(parts[0]) != len(parts[1]):
            raise LoceditError(f"{path}: {len(parts[0])} prefixes but {len(parts[1])} suffixes")
        border, tokens = parts[0].shape[1], np.concatenate(parts, axis=1)
    else:
        border, tokens = PREFIX, _array(path)
    if tokens.shape[1] <= border:
        raise LoceditError(f"{path}: rows of {tokens.shape[1]} tokens have nothing after the prefix of {border}")
    items = tuple(
        TokenText(ids=tuple(row), span=(border, len(row)), id=f"{path.name}:{number}")
        for number, row in enumerate(cast(list[list[int]], tokens.tolist()), start=1)
    )
    return Dataset(items=items, source=str(path))


def _array(path: Path) -> NDArray[np.int64]:
    try:
        tokens = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise LoceditError(f"{path}: no such file") from None
    except (ValueError, OSError, EOFError) as error:
        raise LoceditError(f"{path}: not a NumPy array file: {str(error).splitlines()[0]}") from None
    if not isinstance(tokens, np.ndarray) or tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
        found = f"{tokens.dtype} of shape {tokens.shape}" if isinstance(tokens, np.ndarray) else "several arrays"
        raise LoceditError(f"{path}: {found}, wanted whole numbers [n, length]")
    if not len(tokens):
        raise LoceditError(f"{path}: is empty")
    return tokens.astype(np.int64)
