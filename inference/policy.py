"""Who is asked, from the decision's logits: what an operator or a single request may set beside the trained tokens."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch

from ..modeling.dispatch import Dispatch
from ..modeling.errors import ExpertokenError, did_you_mean
from ..modeling.experts import SELF, Expert
from ..modeling.pool import ExpertPool

OUTPUT_TOKENS = 300
"""How long an answer is taken to be where costs are weighed before anything is answered."""


@dataclass(frozen=True)
class Policy:
    """How a candidate is chosen from the trained distribution.

    The order of things: candidates that are not allowed are left out; `cost_weight` and `sticky` change the logits of
    the others; where the best of them has less than `threshold` of the probability then, `default` answers.

    Attributes:
        threshold: least probability of the candidate chosen, after the changes; None for none.
        default: who answers below the threshold: self where it is a candidate, else to be named.
        cost_weight: logits taken off for each USD that a candidate is expected to cost on this request.
        sticky: logits added to the candidate that gave the chat's last answer.
        allow: names of the candidates that may answer; all where None.
        deny: names of those that may not.
        fallbacks: how many more are asked when the one chosen fails; all where None.
    """

    threshold: float | None = None
    default: str | None = None
    cost_weight: float = 0.0
    sticky: float = 0.0
    allow: tuple[str, ...] | None = None
    deny: tuple[str, ...] = ()
    fallbacks: int | None = None

    @classmethod
    def parse(cls, document: Any, base: "Policy | None" = None) -> "Policy":
        """Read a policy from JSON: of a composite's manifest, or of a request.

        Args:
            document: a mapping; keys as the attributes are called.
            base: what holds where the document says nothing.

        Raises:
            ExpertokenError: a key is unknown or a value of another kind.
        """
        base = base or cls()
        if document is None:
            return base
        known = [field.name for field in fields(cls)]
        if not isinstance(document, dict):
            raise ExpertokenError(f"policy: expected a mapping, got {type(document).__name__}")
        for key, value in document.items():
            if key not in known:
                raise ExpertokenError(f"policy.{key}: unknown key, {did_you_mean(str(key), known)}")
            if not _CHECKS[key](value):
                raise ExpertokenError(f"policy.{key}: expected {_EXPECTED[key]}, got {value!r}")
        given: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in document.items()
        }
        return replace(base, **given)

    def document(self) -> dict[str, Any]:
        """What differs from a policy that says nothing, as JSON."""
        plain = asdict(Policy())
        return {key: value for key, value in asdict(self).items() if value != plain[key]}

    def choose(
        self, pool: ExpertPool, logits: torch.Tensor, *, prompt_tokens: int = 0, last: str | None = None
    ) -> Dispatch:
        """Decide.

        Args:
            pool: the candidates.
            logits: `[C]`, of the candidates in pool order.
            prompt_tokens: of the request, for its cost.
            last: who gave the chat's last answer.

        Returns:
            the decision, with the trained probabilities as they are.

        Raises:
            ExpertokenError: a name is no candidate's, nobody is left, or a cost is not known.
        """
        plain = Dispatch.from_probabilities(pool.names, logits.softmax(-1))
        if self == Policy():
            return plain
        names = self.candidates(pool)
        shares = self.shares(pool, logits, prompt_tokens=prompt_tokens, last=last)
        ranking = sorted(names, key=shares.__getitem__, reverse=True)
        reason = self._reason(plain, ranking, shares)
        if self.threshold is not None and shares[ranking[0]] < self.threshold:
            default = self.fallback(pool)
            if default in names:
                reason = f"{ranking[0]} has {shares[ranking[0]]:.2f}, less than {self.threshold:g}: {default} answers"
                ranking = [default, *(name for name in ranking if name != default)]
        if self.fallbacks is not None:
            ranking = ranking[: 1 + self.fallbacks]
        return Dispatch(ranking[0], plain.probabilities, reason, tuple(ranking))

    def shares(
        self, pool: ExpertPool, logits: torch.Tensor, *, prompt_tokens: int = 0, last: str | None = None
    ) -> dict[str, float]:
        """Probabilities of the candidates as this policy changes them, before the threshold. Arguments as `choose`."""
        names = self.candidates(pool)
        changed = logits.double().clone()
        for index, expert in enumerate(pool.candidates):
            if self.cost_weight:
                changed[index] -= self.cost_weight * request_cost(expert, prompt_tokens, OUTPUT_TOKENS)
            if self.sticky and expert.name == last:
                changed[index] += self.sticky
            if expert.name not in names:
                changed[index] = -torch.inf
        return dict(zip(pool.names, changed.softmax(-1).tolist(), strict=True))

    def _reason(self, plain: Dispatch, ranking: list[str], shares: dict[str, float]) -> str:
        if ranking[0] == plain.expert:
            return plain.reason
        first, free = ranking[0], plain.expert
        parts = [
            f"only {', '.join(self.allow)} may answer" if self.allow is not None else "",
            f"{', '.join(self.deny)} may not answer" if self.deny else "",
            f"a USD weighs {self.cost_weight:g}" if self.cost_weight else "",
            f"the last expert gets {self.sticky:g}" if self.sticky else "",
        ]
        told = "; ".join(part for part in parts if part)
        return f"{first} has {shares[first]:.2f} where {told}; {free} would have been chosen without"

    def fallback(self, pool: ExpertPool) -> str | None:
        """Who answers below the threshold: the default that was named, else self where it is a candidate."""
        return self.default or pool.self_name

    def candidates(self, pool: ExpertPool) -> list[str]:
        """Names of those who may answer, in pool order.

        Raises:
            ExpertokenError: the policy does not fit the pool: a name is no candidate's, nobody is left, the threshold
                has no default.
        """
        named = {"allow": self.allow or (), "deny": self.deny, "default": (self.default,) if self.default else ()}
        for key, given in named.items():
            for name in given:
                if name not in pool.names:
                    raise ExpertokenError(f"policy.{key}: no candidate {name!r}, {did_you_mean(name, pool.names)}")
        if self.threshold is not None and self.fallback(pool) is None:
            raise ExpertokenError("policy.threshold needs policy.default here: self is no candidate of this composite")
        names = [n for n in pool.names if (self.allow is None or n in self.allow) and n not in self.deny]
        if not names:
            raise ExpertokenError("policy: nobody is left who may answer; look at allow and deny")
        return names


def request_cost(expert: Expert, prompt_tokens: int, output_tokens: int) -> float:
    """What a request costs with an expert, in USD; models that run here cost nothing unless the pool says otherwise.

    Raises:
        ExpertokenError: it is an endpoint without a price.
    """
    price = expert.price(prompt_tokens, output_tokens)
    if price is None and expert.kind.priced:
        raise ExpertokenError(f"expert {expert.name!r} has no `cost` in the pool, so costs can't be weighed")
    return price or 0.0


def last_answerer(messages: Sequence[dict[str, Any]], pool: ExpertPool) -> str | None:
    """Who gave the last answer of a chat, where its message says so (`name`)."""
    named = [message.get("name") for message in messages if message.get("role") == "assistant"]
    return named[-1] if named and named[-1] in pool.names else None


_LARGEST = 1e30  # far above any cost or logit; more would overflow where it is multiplied


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST


def _is_names(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(name, str) for name in value)


_CHECKS = {
    "threshold": lambda v: v is None or (_is_number(v) and 0 <= v <= 1),
    "default": lambda v: v is None or isinstance(v, str),
    "cost_weight": lambda v: _is_number(v) and v >= 0,
    "sticky": _is_number,
    "allow": lambda v: v is None or _is_names(v),
    "deny": _is_names,
    "fallbacks": lambda v: v is None or (isinstance(v, int) and not isinstance(v, bool) and v >= 0),
}
_EXPECTED = {
    "threshold": "a probability or null",
    "default": f"a candidate's name ({SELF!r}, ...) or null",
    "cost_weight": "a number of at least 0 (logits per USD)",
    "sticky": "a number (logits)",
    "allow": "a list of names or null",
    "deny": "a list of names",
    "fallbacks": "a whole number of at least 0, or null",
}
