"""What a user writes as text, without torch: runs, models, machines.

::

    recipe or TOML file + --section.key=value ──load──> Config ──resolve──> ResolvedRun
                                                   │
                                               validate: what must hold
"""
