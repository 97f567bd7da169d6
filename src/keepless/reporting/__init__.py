"""Reports: what a plan decides, where its bytes are, what an infeasible budget is made of; tables and a picture.

Everything is there as plain data first; rich and matplotlib are imported where a table or a picture is made.
"""

from keepless.reporting.account import CATEGORIES as CATEGORIES
from keepless.reporting.account import PeakAccount as PeakAccount
from keepless.reporting.account import peak_account as peak_account
from keepless.reporting.decisions import Block as Block
from keepless.reporting.decisions import Choice as Choice
from keepless.reporting.decisions import Decision as Decision
from keepless.reporting.decisions import decisions as decisions
from keepless.reporting.measured_account import MeasuredAccount as MeasuredAccount
from keepless.reporting.measured_account import measured_account as measured_account
from keepless.reporting.picture import draw as draw
from keepless.reporting.picture import picture_dict as picture_dict
from keepless.reporting.series import save_timeline as save_timeline
from keepless.reporting.series import timeline_dict as timeline_dict
from keepless.reporting.steps import StepPrediction as StepPrediction
from keepless.reporting.steps import predicted_steps as predicted_steps
from keepless.reporting.tables import plan_dict as plan_dict
from keepless.reporting.tables import verdict as verdict
from keepless.reporting.trace import save_trace as save_trace
from keepless.reporting.trace import trace_dict as trace_dict
