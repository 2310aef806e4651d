"""Quark's options."""

from dataclasses import dataclass
from typing import Literal

from locedit.edit.train import TrainOptions
from locedit.errors import LoceditError
from locedit.rewards import RewardOptions
from locedit.sampling import Sampling
from locedit.unlearn.registry import above_zero, at_least_one, at_least_zero, one_of


@dataclass(frozen=True, kw_only=True)
class QuarkOptions(TrainOptions, RewardOptions):
    """Quark's own options. Published for GPT-2 large on toxicity: batches of 128, 23,438 steps, learning rate 1e-5,
    a sample interval of 500 and 500 steps of warm-up; the defaults here are for small models."""

    steps: int = 300
    "optimizer steps"
    batch_size: int = 64
    "samples of the pool in one forward"
    clip: float | None = None
    "largest norm of the restricted gradient; None = as it is, as published"
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    "of the learning rate: constant, or down to 0 at the last step"
    train: Literal["all", "rows"] = "all"
    "what is trained: the weights of the set and the rows of the tokens, or the rows alone"
    quantiles: int = 5
    "parts of the pool, and tokens"
    kl_weight: float = 0.05
    "beta, of the KL term"
    kl: Literal["policy_ref", "ref_policy"] = "policy_ref"
    "KL(edited || unedited), as in the published code, or KL(unedited || edited), as in the formula of the paper"
    entropy_weight: float = 0.06
    "gamma, of the entropy of the edited model, which the published code alone has"
    average: Literal["example", "token"] = "example"
    "mean over each response's tokens, then over responses; or over all tokens of the batch, as published"
    sample_interval: int = 50
    "steps between two rounds of writing"
    prompts_per_refresh: int | None = None
    "prompts drawn for one round; None = all, as published"
    samples_per_prompt: int = 1
    "texts written for each prompt in one round"
    keep_refreshes: int | None = None
    "the last so many rounds stay in the pool; None = all, as published"
    max_new_tokens: int = 20
    "length of what is written, at most"
    min_new_tokens: int = 3
    "the text cannot end before so many"
    temperature: float = 1.0
    "logits are divided by it when texts are written"
    top_p: float = 1.0
    "the likeliest tokens of this probability together are drawn from"
    sample_batch_size: int = 64
    "texts that are written together"
    adaptive: bool = False
    "change kl_weight and entropy_weight after every batch towards the two targets; the history has both"
    kl_target: float = 3.0
    "nats of KL(edited || unedited), summed over a response, mean over responses"
    entropy_target: float = 40.0
    "nats of a response under the edited model, -log p of its tokens summed, mean over responses"
    horizon: float = 2500.0
    "samples in which a weight may change by the factor 1 + adaptive_clip"
    adaptive_clip: float = 0.2
    "largest relative error of a target that counts"

    def __post_init__(self) -> None:
        TrainOptions.__post_init__(self)
        RewardOptions.__post_init__(self)
        one_of(self, "train", ("all", "rows"))
        one_of(self, "kl", ("policy_ref", "ref_policy"))
        one_of(self, "average", ("example", "token"))
        at_least_zero(self, "kl_weight", "entropy_weight")
        above_zero(self, "kl_target", "entropy_target", "horizon", "adaptive_clip")
        at_least_one(self, "quantiles", "sample_interval", "samples_per_prompt", "sample_batch_size")
        at_least_one(self, "prompts_per_refresh", "keep_refreshes")
        if self.adaptive and self.batch_size * self.adaptive_clip >= self.horizon:
            raise LoceditError(
                f"horizon={self.horizon!r} must be above batch_size * adaptive_clip = "
                f"{self.batch_size * self.adaptive_clip:g}: one batch could turn the sign of a weight"
            )
        self.sampling()

    def sampling(self) -> Sampling:
        """How texts are written."""
        return Sampling(
            max_new_tokens=self.max_new_tokens,
            min_new_tokens=self.min_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
        )
