"""The words of Keepless: graph, program, budget, timeline, certificate. Plain data, no torch."""

from keepless.ir.budget import Budget as Budget
from keepless.ir.budget import format_bytes as format_bytes
from keepless.ir.budget import parse_bytes as parse_bytes
from keepless.ir.certificate import Certificate as Certificate
from keepless.ir.certificate import Status as Status
from keepless.ir.graph import HOLD as HOLD
from keepless.ir.graph import RUNS_ONCE as RUNS_ONCE
from keepless.ir.graph import Effect as Effect
from keepless.ir.graph import Graph as Graph
from keepless.ir.graph import Kind as Kind
from keepless.ir.graph import Op as Op
from keepless.ir.graph import Phase as Phase
from keepless.ir.graph import Value as Value
from keepless.ir.program import DEVICE as DEVICE
from keepless.ir.program import Copy as Copy
from keepless.ir.program import Drop as Drop
from keepless.ir.program import Instr as Instr
from keepless.ir.program import Program as Program
from keepless.ir.program import Run as Run
from keepless.ir.program import Wait as Wait
from keepless.ir.timeline import Event as Event
from keepless.ir.timeline import Timeline as Timeline
