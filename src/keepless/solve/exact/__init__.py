"""Exact solvers, each in its stated space: exhaustive search, the Checkmate MILP, retention intervals by CP-SAT."""

from keepless.solve.exact.checkmate import Checkmate as Checkmate
from keepless.solve.exact.exhaustive import Exhaustive as Exhaustive
from keepless.solve.exact.intervals import Intervals as Intervals
