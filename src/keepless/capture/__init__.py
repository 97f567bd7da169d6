"""From a module and a batch to a `Graph` and its `Binding`, by fake tensors."""

from keepless.capture.assembly import DELIVER as DELIVER
from keepless.capture.assembly import LOSS as LOSS
from keepless.capture.assembly import OPTIMIZER as OPTIMIZER
from keepless.capture.assembly import UPDATE as UPDATE
from keepless.capture.drafting import CAST_ONCE as CAST_ONCE
from keepless.capture.drafting import StepShape as StepShape
from keepless.capture.facts import MISSING as MISSING
from keepless.capture.facts import attribute_of as attribute_of
from keepless.capture.facts import equal_constants as equal_constants
from keepless.capture.facts import find_facts as find_facts
from keepless.capture.inputs import FlatInputs as FlatInputs
from keepless.capture.inputs import Inputs as Inputs
from keepless.capture.inputs import flatten_inputs as flatten_inputs
from keepless.capture.inputs import standing_in as standing_in
from keepless.capture.lower import lower as lower
from keepless.capture.standing import StandingForward as StandingForward
from keepless.capture.standing import standing_forward as standing_forward
from keepless.capture.state import forward_of as forward_of
from keepless.capture.state import planned_device as planned_device
from keepless.capture.trace import is_tracing as is_tracing
from keepless.capture.trace import trace_step as trace_step
