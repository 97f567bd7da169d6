"""Costs: seconds and scratch per op, links between tiers."""

from keepless.cost.model import CostModel as CostModel
from keepless.cost.model import Link as Link
from keepless.cost.model import Origin as Origin
