"""Policies, by which an operator or a request adjusts the choice of a candidate from the decision's logits."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch

from .dispatch import Dispatch
from .errors import ExpertokenError, did_you_mean
from .experts import SELF
from .pool import ExpertPool
from .utility import expected_usd, priced, utility


@dataclass(frozen=True)
class Policy:
    """Rules that choose a candidate from the trained distribution.

    Candidates that are not allowed are excluded first. Without costs the candidate with the greatest logit is chosen.
    With `cost_weight` or `tolerance` chances of being right are weighed against costs, which needs a composite trained
    for the objective `correctness`. If no candidate reaches `threshold`, `default` answers.

    Attributes:
        threshold: Least probability at which the most probable candidate may answer, or None.
        default: Name of the candidate that answers below the threshold. Defaults to self if it is a candidate.
        cost_weight: Score that a USD is worth. The greatest `chance - cost_weight * expected USD` is chosen.
        tolerance: Chance that may be given up. The cheapest candidate within it of the best chance is chosen. It
            replaces `cost_weight`. None for no tolerance.
        sticky: Logits added to the candidate that gave the conversation's last answer.
        allow: Names of the candidates that may answer, or None for all.
        deny: Names of the candidates that may not answer.
        fallbacks: Number of fallbacks if the chosen candidate fails, or None for all other candidates.
    """

    threshold: float | None = None
    default: str | None = None
    cost_weight: float = 0.0
    tolerance: float | None = None
    sticky: float = 0.0
    allow: tuple[str, ...] | None = None
    deny: tuple[str, ...] = ()
    fallbacks: int | None = None

    @classmethod
    def parse(cls, document: Any, base: "Policy | None" = None) -> "Policy":
        """Read a policy from the JSON of a composite's manifest or of a request.

        Args:
            document: Mapping with the names of the attributes as keys.
            base: Policy with the values of keys that the document lacks.

        Raises:
            ExpertokenError: A key is unknown, or a value has the wrong type or range.
        """
        base = base or cls()
        if document is None:
            return base
        known = [field.name for field in fields(cls)]
        if not isinstance(document, dict):
            raise ExpertokenError(f"policy: expected a mapping, got {type(document).__name__}")
        for key, value in document.items():
            if key not in known:
                raise ExpertokenError(f"policy.{str(key)[:_QUOTED]}: unknown key, {did_you_mean(str(key), known)}")
            if not _CHECKS[key](value):
                got = repr(value)[:_QUOTED] if not isinstance(value, list | dict) else type(value).__name__
                raise ExpertokenError(f"policy.{key}: expected {_EXPECTED[key]}, got {got}")
        given: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in document.items()
        }
        return replace(base, **given)

    def within(self, base: "Policy") -> "Policy":
        """Return this policy restricted to the candidates that another policy allows.

        Args:
            base: Policy of the operator, which a request can narrow and not widen.
        """
        asked = base.allow if self.allow is None else self.allow
        allow = asked if base.allow is None or asked is None else tuple(name for name in asked if name in base.allow)
        return replace(self, allow=allow, deny=tuple(dict.fromkeys((*base.deny, *self.deny))))

    def document(self) -> dict[str, Any]:
        """Return the differences from the default policy, as JSON."""
        plain = asdict(Policy())
        return {key: value for key, value in asdict(self).items() if value != plain[key]}

    def fallback(self, pool: ExpertPool) -> str | None:
        """Return the name of the candidate that answers below the threshold: `default`, else self if a candidate."""
        return self.default or pool.self_name

    def candidates(self, pool: ExpertPool) -> list[str]:
        """Return the names of the candidates that may answer, in pool order.

        Raises:
            ExpertokenError: The policy does not fit the pool: a name is no candidate's, no candidate remains, or the
                threshold has no default.
        """
        named = {"allow": self.allow or (), "deny": self.deny, "default": (self.default,) if self.default else ()}
        for key, given in named.items():
            for name in given:
                if name not in pool.names:
                    raise ExpertokenError(f"policy.{key}: no candidate {name!r}, {did_you_mean(name, pool.names)}")
        if self.threshold is not None and self.fallback(pool) is None:
            raise ExpertokenError(
                "policy.threshold: expected policy.default with it, because self is no candidate of this composite"
            )
        names = [n for n in pool.names if (self.allow is None or n in self.allow) and n not in self.deny]
        if not names:
            raise ExpertokenError("policy: allow and deny exclude all candidates. Allow at least one")
        return names


@dataclass(frozen=True)
class Chooser:
    """Choice among a composite's candidates by a policy, shared by evaluation, calibration and serving.

    Attributes:
        pool: Pool of the candidates.
        chances: True if a logit is the log-odds of being right (objective `correctness`).
        usd_per_query: Mean USD of an answer in the training results, by candidate, if known. It is used for candidates
            without a price in the pool.
    """

    pool: ExpertPool
    chances: bool = False
    usd_per_query: Mapping[str, float] = field(default_factory=dict)

    def candidates(self, policy: Policy, unable: Mapping[str, str] | None = None) -> list[str]:
        """Return the names of the candidates that may answer a request under a policy, in pool order.

        Args:
            policy: Policy to apply.
            unable: Candidates that can't serve the request, with the reason. See `capabilities`.

        Raises:
            ExpertokenError: The policy does not fit the pool, weighs costs without chances or without any known cost,
                or allows only candidates that can't serve the request.
        """
        permitted = policy.candidates(self.pool)
        names = [name for name in permitted if name not in (unable or {})]
        if not names:
            reasons = "; ".join(f"{name} {(unable or {})[name]}" for name in permitted)
            raise ExpertokenError(f"no expert can serve this request: {reasons}")
        weighed = "cost_weight" if policy.cost_weight else "tolerance" if policy.tolerance is not None else None
        if weighed:
            if not self.chances:
                raise ExpertokenError(
                    f"policy.{weighed}: expected a composite trained with `--objective correctness`, which gives "
                    "chances of being right, got one without them. Train such a composite, or use threshold, allow "
                    "and deny"
                )
            usd = self.known_usd(1)
            if np.isnan(usd).any() and not (usd > 0).any():
                raise ExpertokenError(
                    f"policy.{weighed}: no candidate's cost is known. Add `cost` to the pool's entries"
                )
        return names

    def known_usd(self, prompt_tokens: int, cached: Mapping[str, int] | None = None) -> np.ndarray:
        """Return each candidate's expected cost of a request, `[C]` USD, with NaN for unknown costs."""
        return expected_usd(self.pool.candidates, prompt_tokens, self.usd_per_query, cached)

    def usd(self, prompt_tokens: int, cached: Mapping[str, int] | None = None) -> np.ndarray:
        """Return each candidate's expected cost of a request, `[C]` USD. See `utility.priced` for unknown costs."""
        return priced(self.known_usd(prompt_tokens, cached))

    def choose(
        self,
        policy: Policy,
        logits: torch.Tensor,
        *,
        prompt_tokens: int = 0,
        last: str | None = None,
        cached: int = 0,
        unable: Mapping[str, str] | None = None,
    ) -> Dispatch:
        """Choose the candidate that answers.

        Args:
            policy: Policy to apply.
            logits: Logits of the candidates in pool order, `[C]`.
            prompt_tokens: Tokens of the request, for its cost.
            last: Name of the candidate that gave the conversation's last answer.
            cached: Tokens of the request in the cache of `last`, which a switch to another candidate loses.
            unable: Candidates that can't serve the request, with the reason. They are excluded.

        Returns:
            Dispatch with the trained probabilities and chances, which the policy does not change.

        Raises:
            ExpertokenError: The policy does not fit. See `candidates`.
        """
        names = self.pool.names
        plain = Dispatch.from_logits(names, logits, chances=self.chances)
        if policy == Policy() and not unable:
            return plain
        allowed = self.candidates(policy, unable)
        changed = self._changed(policy, logits, last)
        shares = self._shares(allowed, changed)
        known = {last: cached} if last is not None and cached else {}
        ranking = self._ranking(policy, allowed, changed, prompt_tokens, known)
        reason = self._reason(policy, plain, ranking[0], unable or {})
        best = max(allowed, key=shares.__getitem__)
        if policy.threshold is not None and shares[best] < policy.threshold:
            default = policy.fallback(self.pool)
            if default in allowed:
                reason = f"{best} has {shares[best]:.2f}, less than {policy.threshold:g}, so {default} answers"
                ranking = [default, *(name for name in ranking if name != default)]
        if policy.fallbacks is not None:
            ranking = ranking[: 1 + policy.fallbacks]
        return replace(plain, expert=ranking[0], reason=reason, ranking=tuple(ranking))

    def shares(self, policy: Policy, logits: torch.Tensor, *, last: str | None = None) -> dict[str, float]:
        """Return the probabilities among the candidates that may answer, and 0 for the others.

        The threshold applies to these probabilities.
        """
        return self._shares(self.candidates(policy), self._changed(policy, logits, last))

    def _shares(self, allowed: Sequence[str], logits: torch.Tensor) -> dict[str, float]:
        left_out = torch.tensor([name not in allowed for name in self.pool.names])
        shares = logits.masked_fill(left_out, -torch.inf).softmax(-1)
        return dict(zip(self.pool.names, shares.tolist(), strict=True))

    def _changed(self, policy: Policy, logits: torch.Tensor, last: str | None) -> torch.Tensor:
        changed = logits.double().clone()
        if policy.sticky and last is not None:
            changed[self.pool.names.index(last)] += policy.sticky
        return changed

    def _ranking(
        self,
        policy: Policy,
        allowed: Sequence[str],
        logits: torch.Tensor,
        prompt_tokens: int,
        cached: Mapping[str, int],
    ) -> list[str]:
        """Return the candidates that may answer, with the best first."""
        place = {name: index for index, name in enumerate(self.pool.names)}
        if not policy.cost_weight and policy.tolerance is None:
            return sorted(allowed, key=lambda name: float(logits[place[name]]), reverse=True)
        quality, usd = logits.sigmoid().numpy(), self.usd(prompt_tokens, cached)
        if policy.tolerance is None:
            worth = utility(quality, usd, policy.cost_weight)
            return sorted(allowed, key=lambda name: worth[place[name]], reverse=True)
        best = max(quality[place[name]] for name in allowed)
        near = [name for name in allowed if quality[place[name]] >= best - policy.tolerance]
        far = [name for name in allowed if name not in near]
        return [
            *sorted(near, key=lambda name: (usd[place[name]], -quality[place[name]])),
            *sorted(far, key=lambda name: -quality[place[name]]),
        ]

    def _reason(self, policy: Policy, plain: Dispatch, first: str, unable: Mapping[str, str]) -> str:
        if first == plain.expert:
            return plain.reason
        parts = [
            f"{plain.expert} {unable[plain.expert]}" if plain.expert in unable else "",
            f"only {', '.join(policy.allow)} may answer" if policy.allow is not None else "",
            f"{', '.join(policy.deny)} may not answer" if policy.deny else "",
            f"a USD is worth a score of {policy.cost_weight:g}"
            if policy.cost_weight and policy.tolerance is None
            else "",
            "" if policy.tolerance is None else f"a chance {policy.tolerance:g} lower is accepted for a lower cost",
            f"the last expert gets {policy.sticky:g}" if policy.sticky else "",
        ]
        told = "; ".join(part for part in parts if part)
        table = plain.chances or plain.probabilities
        value = f"{'a chance' if plain.chances else 'a probability'} of {table[first]:.2f}"
        return f"{first}, with {value}, is chosen because {told}. Otherwise {plain.expert} would have been chosen"


def last_answerer(messages: Sequence[dict[str, Any]], pool: ExpertPool) -> str | None:
    """Return the candidate that gave a conversation's last answer, or None unless the message's `name` records it."""
    named = [message.get("name") for message in messages if message.get("role") == "assistant"]
    return named[-1] if named and named[-1] in pool.names else None


_QUOTED = 100  # characters of a request's text that an error quotes
_LARGEST = 1e30  # far above any cost or logit, and small enough for products not to overflow


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST


def _is_names(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(name, str) for name in value)


_CHECKS = {
    "threshold": lambda v: v is None or (_is_number(v) and 0 <= v <= 1),
    "default": lambda v: v is None or isinstance(v, str),
    "cost_weight": lambda v: _is_number(v) and v >= 0,
    "tolerance": lambda v: v is None or (_is_number(v) and 0 <= v <= 1),
    "sticky": _is_number,
    "allow": lambda v: v is None or _is_names(v),
    "deny": _is_names,
    "fallbacks": lambda v: v is None or (isinstance(v, int) and not isinstance(v, bool) and v >= 0),
}
_EXPECTED = {
    "threshold": "a probability or null",
    "default": f"a candidate's name ({SELF!r}, ...) or null",
    "cost_weight": "a number of at least 0 (score per USD)",
    "tolerance": "a chance to give up, 0 to 1, or null",
    "sticky": "a number (logits)",
    "allow": "a list of names or null",
    "deny": "a list of names",
    "fallbacks": "a whole number of at least 0, or null",
}
