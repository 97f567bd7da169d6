"""The classic planners, one paper per file."""

from keepless.solve.classics.dtr import Dtr as Dtr
from keepless.solve.classics.partitioner import Knapsack as Knapsack
from keepless.solve.classics.partitioner import MinCutByBytes as MinCutByBytes
from keepless.solve.classics.revolve import Revolve as Revolve
from keepless.solve.classics.revolve import binomial_cost as binomial_cost
from keepless.solve.classics.rotor import Rotor as Rotor
from keepless.solve.classics.sqrt import SqrtN as SqrtN
