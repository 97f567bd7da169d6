"""Control: the whole line, from a model and a budget to a planned step, and back to what was measured."""

from keepless.control.applying import apply as apply
from keepless.control.applying import planned_forward as planned_forward
from keepless.control.applying import remove as remove
from keepless.control.captured import Captures as Captures
from keepless.control.curves import BudgetPoint as BudgetPoint
from keepless.control.curves import StepCurve as StepCurve
from keepless.control.curves import make_curve as make_curve
from keepless.control.estimating import Estimate as Estimate
from keepless.control.estimating import make_estimate as make_estimate
from keepless.control.fits import Fits as Fits
from keepless.control.fits import SizeTried as SizeTried
from keepless.control.fits import max_batch as max_batch
from keepless.control.fits import max_depth as max_depth
from keepless.control.fits import max_length as max_length
from keepless.control.fits import with_depth as with_depth
from keepless.control.landing import check_landing as check_landing
from keepless.control.landing import land as land
from keepless.control.options import Progress as Progress
from keepless.control.options import SizeOptions as SizeOptions
from keepless.control.options import StepOptions as StepOptions
from keepless.control.planning import make as make
from keepless.control.planning import read_budget as read_budget
from keepless.control.timing import measure_timeline as measure_timeline
from keepless.control.verifying import Verification as Verification
from keepless.control.verifying import verify as verify
