"""The lock under which a tokenizer encodes."""

import threading
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TURNS: "WeakKeyDictionary[PreTrainedTokenizerBase, threading.Lock]" = WeakKeyDictionary()
_TURNS_LOCK = threading.Lock()


def exclusive(tokenizer: "PreTrainedTokenizerBase") -> "threading.Lock":
    """Return the lock under which a tokenizer encodes.

    The handling of control tokens is a setting of the tokenizer, and so is padding. Without the lock another thread may
    change the setting before the text is encoded. A chat template's control tokens would then be read as text.
    """
    with _TURNS_LOCK:
        return _TURNS.setdefault(tokenizer, threading.Lock())
