"""The checks of ``llamax doctor``, one module each for versions, machine and storage.

A check is a function that yields findings about a ``Host``.  A host is read below a root folder, so
that a test can describe any machine.
"""

from llamax.tools.doctor.finding import Finding, Host

__all__ = ["Finding", "Host"]
