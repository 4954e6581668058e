"""Looks at a run from outside: before it starts (plan, audit, doctor) and while it runs."""
