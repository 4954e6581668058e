"""What every program of llamax stands on: errors and exit codes, logging, signals, files, units.

Nothing here imports torch or another part of llamax.
"""
