"""For each rule of a configuration: changes that trip it alone, and changes on its edge."""

from __future__ import annotations

from support.rule_cases import mesh, pipeline, run, zero
from support.rule_cases.case import Cases

CASES: Cases = {**mesh.CASES, **pipeline.CASES, **zero.CASES, **run.CASES}
