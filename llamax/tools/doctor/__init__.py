"""What ``llamax doctor`` looks at, a module each: versions, machine, storage.

A check is a function that yields findings about a ``Host``.  A host is read below a root folder, so
that a test gives it a machine of its own.
"""

from llamax.tools.doctor.finding import Finding, Host

__all__ = ["Finding", "Host"]
