"""The machine: its rules, and what they make of a program."""

from keepless.machine.rules import RULES as RULES
from keepless.machine.rules import Machine as Machine
from keepless.machine.rules import excerpt as excerpt
from keepless.machine.rules import reuse_pairs as reuse_pairs
from keepless.machine.rules import rng_states as rng_states
from keepless.machine.simulate import simulate as simulate
from keepless.machine.verify import verify as verify
