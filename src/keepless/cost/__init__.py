"""Costs: seconds and scratch per op, links between tiers, devices; and graphs with their costs as JSON."""

from keepless.cost.correct import corrected as corrected
from keepless.cost.correct import corrected_scratch as corrected_scratch
from keepless.cost.correct import op_ratios as op_ratios
from keepless.cost.devices import DeviceSpec as DeviceSpec
from keepless.cost.devices import find_device as find_device
from keepless.cost.devices import known_devices as known_devices
from keepless.cost.exchange import GraphFile as GraphFile
from keepless.cost.exchange import parse_graph as parse_graph
from keepless.cost.exchange import read_graph as read_graph
from keepless.cost.graph_text import format_graph as format_graph
from keepless.cost.model import CostModel as CostModel
from keepless.cost.model import Link as Link
from keepless.cost.model import Origin as Origin
from keepless.cost.roofline import Calibration as Calibration
from keepless.cost.roofline import Sample as Sample
from keepless.cost.roofline import Work as Work
from keepless.cost.roofline import analytic_cost as analytic_cost
from keepless.cost.roofline import calibrated as calibrated
from keepless.cost.roofline import op_seconds as op_seconds
from keepless.cost.roofline import samples_of as samples_of
from keepless.cost.transfer import KnownCosts as KnownCosts
from keepless.cost.transfer import scaled_scratch as scaled_scratch
from keepless.cost.transfer import transferred_seconds as transferred_seconds
