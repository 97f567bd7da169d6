"""Machines that are busy are slow: no test of properties has a deadline."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("keepless", deadline=None)
settings.load_profile("keepless")
