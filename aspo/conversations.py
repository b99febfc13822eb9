"""Prompts in conversations: the turns of LLaVA's and LLaMA-Factory's rows, and TRL's implicit prompts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aspo.validate import short_repr

ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
Row = Mapping[str, Any]


def is_answered(row: Row) -> bool:
    """Whether a row has an answer of its own, beside what is said in its conversation."""
    return row.get("chosen") is not None or row.get("completion") is not None


def has_messages(row: Row) -> bool:
    """Whether a row's prompt is a list of messages, or becomes one."""
    if row.get("prompt") is not None:
        return not isinstance(row["prompt"], str)
    turns = row.get("conversations")
    return is_answered(row) and isinstance(turns, list) and len(turns) > 1


def asked(turns: Any, answered: bool) -> str | list[dict[str, str]]:
    """The prompt in a conversation: its first question, or all its turns where the answer to the last stands apart."""
    if not isinstance(turns, list) or not turns:
        raise ValueError("it must be a list of {'from', 'value'} turns")
    messages = []
    for n, turn in enumerate(turns if answered else turns[:1], 1):
        who, text = (turn.get("from"), turn.get("value")) if isinstance(turn, Mapping) else (None, None)
        role = ROLES.get(who) if isinstance(who, str) else None
        if role is None or not isinstance(text, str):
            raise ValueError(f"turn {n} must be {{'from': 'human' or 'gpt', 'value': text}}, got {short_repr(turn)}")
        messages.append({"role": role, "content": text})
    if messages[-1]["role"] != "user":
        which = "last" if answered else "first"
        raise ValueError(f"the {which} turn must be {{'from': 'human', 'value': text}}, got {short_repr(turn)}")
    return messages if messages[1:] else messages[0]["content"]


def implicit_prompt(chosen: list[Any], rejected: list[Any]) -> tuple[list[Any], list[Any], list[Any]]:
    """TRL's implicit prompt: the messages that both conversations begin with."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    return chosen[:shared] or None, chosen[shared:], rejected[shared:]  # type: ignore[return-value]
