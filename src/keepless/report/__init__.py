"""Reports: what a plan decides, where its bytes are, what an infeasible budget is made of; tables and a picture.

Everything is there as plain data first; rich and matplotlib are imported where a table or a picture is made.
"""

from keepless.report.account import CATEGORIES as CATEGORIES
from keepless.report.account import PeakAccount as PeakAccount
from keepless.report.account import peak_account as peak_account
from keepless.report.decisions import Block as Block
from keepless.report.decisions import Choice as Choice
from keepless.report.decisions import Decision as Decision
from keepless.report.decisions import decisions as decisions
from keepless.report.measured_account import MeasuredAccount as MeasuredAccount
from keepless.report.measured_account import measured_account as measured_account
from keepless.report.picture import draw as draw
from keepless.report.picture import picture_dict as picture_dict
from keepless.report.series import save_timeline as save_timeline
from keepless.report.series import timeline_dict as timeline_dict
from keepless.report.steps import StepPrediction as StepPrediction
from keepless.report.steps import predicted_steps as predicted_steps
from keepless.report.tables import plan_dict as plan_dict
from keepless.report.tables import verdict as verdict
from keepless.report.trace import save_trace as save_trace
from keepless.report.trace import trace_dict as trace_dict
