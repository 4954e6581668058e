"""The programs that a run compiles: traced without a device, compared between ranks, and counted.

``auditor`` traces and needs torch-xla; ``hlo``, ``census``, ``diff``, ``formulas`` and ``report``
work on HLO text and need no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llamax.tools.audit.auditor import audit

__all__ = ["audit"]


def __getattr__(name: str) -> Any:
    if name != "audit":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from llamax.tools.audit.auditor import audit

    return audit
