"""The foundation of every program: errors, exit codes, logging, signals, files, units, versions.

Nothing here imports torch or another part of llamax.
"""
