"""The table of published logs that can be converted."""

from __future__ import annotations

from ranker.data.adapters.deskdrop import DESKDROP
from ranker.data.adapters.grocery import GROCERY
from ranker.data.adapters.kuairand import KUAIRAND

ADAPTERS = {adapter.name: adapter for adapter in (DESKDROP, GROCERY, KUAIRAND)}
