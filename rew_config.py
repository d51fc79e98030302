"""Every knob of the reward.

    reward = malformed_score                                    if the grammar verdict fails
           = product of guards * sum_k w_k part_k - overlong    otherwise, with the weights scaled to sum to 1

Parts and guards are in [0, 1]. A part of weight 0 is still computed and logged. "Human" values come from the data folder's
`calibration.json`; the percentiles below select from it. On the command line: `--reward.length.weight 0.2`.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal


def check(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name} must be between {low:g} and {high:g}, not {value:g}")


@dataclass(frozen=True)
class Correlation:
    """tf-idf BERTScore recall, from chance (0) to the human level at that length (1), averaged over three pairs."""

    weight: float = 0.5
    """Weight of the part, 0 to 1 before scaling."""
    think_story: float = 0.5
    """Share of the outline's recall by the story: does the story carry out its plan? A story word counts only as far as it
    belongs where it stands (storygen/replaced.py)."""
    prompt_think: float = 0.25
    """Share of the prompt's recall by the outline: is the plan about the prompt?"""
    prompt_story: float = 0.25
    """Share of the prompt's recall by the story."""
    tf: Literal["raw", "sublinear", "binary"] = "sublinear"
    """Weight of a word that occurs tf times: its idf times tf, 1 + ln tf, or 1. raw is the bert-score library's formula."""
    idf_cap: bool = True
    """Cap idf at its 99th percentile, so that one rare word cannot outweigh a sentence."""
    full_at: float = 1.0
    """Share of the mean human gain over chance at which a pair is fully answered; above 0, to 2. Lower: thrown-in words gain
    less, because more rows are full; higher: small faults in a good row still cost."""

    def __post_init__(self):
        check("correlation.weight", self.weight, 0, 1)
        check("correlation.full_at", self.full_at, 1e-6, 2)
        for name in ("think_story", "prompt_think", "prompt_story"):
            check(f"correlation.{name}", getattr(self, name), 0, 1)
        if self.think_story + self.prompt_think + self.prompt_story == 0:
            raise ValueError("correlation: think_story, prompt_think and prompt_story are all 0")
        if self.tf not in ("raw", "sublinear", "binary"):
            raise ValueError(f"correlation.tf must be raw, sublinear or binary, not {self.tf!r}")


@dataclass(frozen=True)
class Length:
    """min(1, words / length target)."""

    weight: float = 0.3
    """Weight of the part, 0 to 1 before scaling."""

    def __post_init__(self):
        check("length.weight", self.weight, 0, 1)


@dataclass(frozen=True)
class Repetition:
    """Share of repeated word n-grams: 1 up to the human 95th percentile at that length, then falling."""

    weight: float
    """Weight of the part, 0 to 1 before scaling."""
    slack: float
    """Share above the human 95th percentile at which the part reaches 0; above 0, to 1."""

    def __post_init__(self):
        check("repetition.weight", self.weight, 0, 1)
        check("repetition.slack", self.slack, 1e-6, 1)


@dataclass(frozen=True)
class Prose:
    """Share of words in quotation marks and script lines: 1 up to a human percentile, then falling."""

    weight: float = 0.15
    """Weight of the part, 0 to 1 before scaling."""
    level: float = 75.0
    """Human percentile of the dialogue share up to which the part is 1; 0 to 100."""
    zero_at: float = 0.8
    """Dialogue share at which the part reaches 0; above 0, to 1."""

    def __post_init__(self):
        check("prose.weight", self.weight, 0, 1)
        check("prose.level", self.level, 0, 100)
        check("prose.zero_at", self.zero_at, 1e-6, 1)


@dataclass(frozen=True)
class Overlong:
    """A soft penalty near the context limit, before the hard one for not finishing."""

    penalty: float = 0.3
    """Subtracted from the reward of a row that ends exactly at the context limit; 0 to 1, 0 switches it off."""
    window: int = 64
    """Number of tokens before the limit over which the penalty grows from 0; 1 or more."""

    def __post_init__(self):
        check("overlong.penalty", self.penalty, 0, 1)
        check("overlong.window", self.window, 1, 1_000_000)


@dataclass(frozen=True)
class Guard:
    """A factor of the reward: 1 in the human range, falling linearly to 0 beyond it."""

    on: bool = True
    """If off, the guard is computed and logged, but the reward ignores it."""
    level: float = 99.0
    """Human percentile where the range ends, 50 to 100. A lower end is at 100 - level."""
    slack: float = 0.15
    """Distance beyond the range at which the guard reaches 0, in the unit of what it guards; above 0."""

    def __post_init__(self):
        check("level", self.level, 50, 100)
        check("slack", self.slack, 1e-6, 1e6)


@dataclass(frozen=True)
class Floor:
    """A factor of the reward: 1 if a value is `at` or more, falling linearly to `keep` at 0."""

    on: bool = True
    """If off, the guard is computed and logged, but the reward ignores it."""
    at: float = 0.3
    """Value from which the factor is 1; above 0, to 1."""
    keep: float = 0.3
    """Factor at value 0, 0 to 1. Above 0, so that a model that starts at chance still gets a signal from the other parts."""

    def __post_init__(self):
        check("at", self.at, 1e-6, 1)
        check("keep", self.keep, 0, 1)


@dataclass(frozen=True)
class Power:
    """A factor of the reward: (value / human percentile) ^ power, at most 1. Every fault costs, however good the rest."""

    on: bool = True
    """If off, the guard is computed and logged, but the reward ignores it."""
    level: float = 95.0
    """Human percentile at which the factor reaches 1, 0 to 100."""
    power: float = 1.0
    """Above 0, to 10; higher is stricter."""

    def __post_init__(self):
        check("level", self.level, 0, 100)
        check("power", self.power, 1e-6, 10)


@dataclass(frozen=True)
class Guards:
    """Against what cannot be achieved by writing well, only by gaming a part. See `reward.py audit`."""

    copied: Guard = Guard(slack=0.15)
    """Share of the story's word 4-grams that occur in prompt or outline. Against pasting either."""
    copied_short: Guard = Guard(level=95.0, slack=0.04)
    """Share of the story's word 3-grams that occur in the outline. Against scattered pieces of it too short for `copied`."""
    think_copied: Guard = Guard(slack=0.3)
    """Share of the outline's word 4-grams that occur in the prompt. Against pasting the prompt as the plan."""
    types: Guard = Guard(slack=0.2)
    """Lower limit on the moving-average type-token ratio over 50 words. Against loops whose word pairs differ."""
    stop_words: Guard = Guard(slack=0.15)
    """Share of function words, with a lower and an upper limit. Against keyword lists and filler."""
    think_stop_words: Guard = Guard(slack=0.25)
    """The same for the outline."""
    prompt_words: Guard = Guard(slack=0.15)
    """Share of the story's words that are content words of the prompt. Against answering the prompt with its own words."""
    think_words: Guard = Guard(slack=0.15)
    """Share of the story's words that are content words of the outline. Against listing the outline's words."""
    listing: Guard = Guard(slack=0.2)
    """Share of content words of prompt and outline in the story's densest run of 25 words. Against a list of the outline's
    words before a story about something else."""
    dialogue: Guard = Guard(slack=0.3)
    """Share of words in quotation marks and script lines. Against a story that is nothing but speech, which would
    otherwise cost no more than the prose part."""
    order: Guard = Guard(slack=0.8)
    """Word order: nats per adjacent pair of function words, word endings and punctuation above chance. BERTScore hardly
    sees order; shuffled words are about 1.5 nats below human text."""
    think_order: Guard = Guard(slack=0.8)
    """The same for the outline."""
    belongs: Power = Power(level=95.0, power=0.5)
    """How far the story's words belong where they stand (storygen/replaced.py). Against thrown-in and mixed-up words."""
    think_belongs: Power = Power(level=75.0, power=0.4)
    """The same for the outline."""
    answers_belong: Power = Power(level=10.0, power=4.0)
    """The same for the story's words that answer the outline, relative to the rest of the story. Against naming what the
    plan names without telling it."""
    loops: Guard = Guard(slack=0.2)
    """Share of repeated word 4-grams above the human 95th percentile at that length; `level` is not used. Against a story
    told twice, which would otherwise cost no more than the repetition part."""
    think_length: Guard = Guard(slack=0.6)
    """Words of the outline, with a lower and an upper limit; the slack is a share of the limit. Against plans with nothing
    to carry out, and plans that are the story."""
    ending: Floor = Floor(at=1.0, keep=0.7)
    """1 if the story stops at the end of a sentence, else `keep`. Against stopping mid-sentence to save the rest."""
    on_plan: Floor = Floor()
    """think_story. Against a good story that has nothing to do with its plan: length, repetition and prose alone would pay
    half of the reward."""
    throughout: Floor = Floor(at=0.25, keep=0.4)
    """Average think_story of the story's two weaker thirds. Against padding a story with another one, and against drifting
    off."""
    on_prompt: Floor = Floor(at=0.45)
    """Mean of prompt_think and prompt_story. Against a good plan and story for another prompt."""


@dataclass(frozen=True)
class RewardConfig:
    """The reward's knobs. Weights are scaled to sum to 1; `weights()` gives the effective ones."""

    correlation: Correlation = Correlation()
    length: Length = Length()
    repetition: Repetition = Repetition(weight=0.2, slack=0.15)
    repetition4: Repetition = Repetition(weight=0.0, slack=0.1)
    """Word 4-grams; for monitoring."""
    prose: Prose = Prose()
    overlong: Overlong = Overlong()
    guards: Guards = Guards()
    malformed_score: float = -1.0
    """Reward of a sample that the grammar rejects (no <eos>, a missing or second tag, an empty section); -10 to 0."""

    def __post_init__(self):
        check("malformed_score", self.malformed_score, -10, 0)
        if sum(self._given().values()) <= 0:
            raise ValueError("all weights are 0: at least one part needs a weight")

    def _given(self) -> dict[str, float]:
        given = {name: getattr(self, name).weight for name in PARTS}
        return given | {part.name: part.weight for part in OWN_PARTS}

    def weights(self) -> dict[str, float]:
        """{part: weight}, summing to 1, own parts included."""
        given = self._given()
        return {name: weight / sum(given.values()) for name, weight in given.items()}

    def without_outline(self) -> "RewardConfig":
        """A config for prompt and story alone: the outline's terms have weight 0 and the guards that need one are off."""
        off = {name: replace(getattr(self.guards, name), on=False) for name in NEED_OUTLINE}
        return replace(
            self,
            correlation=replace(self.correlation, think_story=0.0, prompt_think=0.0, prompt_story=1.0),
            guards=replace(self.guards, **off),
        )

    def effective(self) -> str:
        """The effective weights, in one line."""
        return "weights, scaled to 1: " + ", ".join(f"{name} {weight:.2f}" for name, weight in self.weights().items())


PARTS = ("correlation", "length", "repetition", "repetition4", "prose")


@dataclass(frozen=True)
class OwnPart:
    """A part of your own. score: takes a `reward.Sample`, returns (score in [0, 1], {diagnostic: number})."""

    name: str
    weight: float
    score: Callable[[Any], tuple[float, dict[str, float]]]

    def __post_init__(self):
        taken = (*PARTS, *(f.name for f in fields(Correlation)), *(part.name for part in OWN_PARTS))
        if not self.name.isidentifier() or self.name in taken:
            raise ValueError(f"own part {self.name!r}: the name must be an identifier that no other part has")
        check(f"own part {self.name}: weight", self.weight, 0, 1)


# Your own parts go here: OWN_PARTS.append(OwnPart("name", 0.1, function)).
OWN_PARTS: list[OwnPart] = []

GUARDS = tuple(f.name for f in fields(Guards))
NEED_OUTLINE = (
    *(name for name in GUARDS if name.startswith("think")),
    "copied_short", "listing", "answers_belong", "on_plan", "throughout", "on_prompt",
)  # fmt: skip
