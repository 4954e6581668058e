"""Configuration without torch: runs, models, machines.

::

    recipe or TOML file + --section.key=value ──load──> Config ──> ResolvedRun (llamax.training)
                                                   │
                                     validate: ranges of fields, rules between them

``schema`` and ``model`` hold the fields of a run, ``types`` their ranges, ``rules`` what must hold
between them, ``toml`` the strict reader, ``hardware`` the table of machines and ``constants`` sizes
that the code fixes.
"""
