"""The machine: its rules, what they make of a program, and the plan that keeps it."""

from keepless.machine.allocation import Allocation as Allocation
from keepless.machine.allocation import model_allocation as model_allocation
from keepless.machine.allocator import CachingAllocator as CachingAllocator
from keepless.machine.landed import Landing as Landing
from keepless.machine.parts import Part as Part
from keepless.machine.parts import managed_share as managed_share
from keepless.machine.plan import Baseline as Baseline
from keepless.machine.plan import Plan as Plan
from keepless.machine.plan import make_plan as make_plan
from keepless.machine.planfile import dump_plan as dump_plan
from keepless.machine.planfile import load_plan as load_plan
from keepless.machine.rewrites import CHUNKED_LOSS as CHUNKED_LOSS
from keepless.machine.rewrites import OPTIMIZER_IN_BACKWARD as OPTIMIZER_IN_BACKWARD
from keepless.machine.rewrites import REWRITES as REWRITES
from keepless.machine.rewrites import Rewrite as Rewrite
from keepless.machine.rewrites import describe_rewrites as describe_rewrites
from keepless.machine.rewrites import read_rewrites as read_rewrites
from keepless.machine.rules import RULES as RULES
from keepless.machine.rules import Machine as Machine
from keepless.machine.rules import excerpt as excerpt
from keepless.machine.rules import reuse_pairs as reuse_pairs
from keepless.machine.rules import rng_states as rng_states
from keepless.machine.simulate import simulate as simulate
from keepless.machine.verify import verify as verify
