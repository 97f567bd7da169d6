"""Measuring: peaks of whole steps, seconds and scratch of single ops, optimizers, and the device itself."""

from keepless.measure.cache import CostCache as CostCache
from keepless.measure.cache import OpCost as OpCost
from keepless.measure.device import describe_device as describe_device
from keepless.measure.device import device_nbytes as device_nbytes
from keepless.measure.device import free_nbytes as free_nbytes
from keepless.measure.meter import PeakMeasurement as PeakMeasurement
from keepless.measure.meter import measure_peak as measure_peak
from keepless.measure.ops import Trial as Trial
from keepless.measure.ops import measure_ops as measure_ops
from keepless.measure.ops import measure_scratch as measure_scratch
from keepless.measure.optimizer import OptimizerFootprint as OptimizerFootprint
from keepless.measure.optimizer import Update as Update
from keepless.measure.optimizer import innermost as innermost
from keepless.measure.optimizer import optimizer_footprint as optimizer_footprint
from keepless.measure.out_of_memory import is_out_of_memory as is_out_of_memory
from keepless.measure.probe import probed_device as probed_device
from keepless.measure.running import StepMeter as StepMeter
from keepless.measure.running import nbytes_of as nbytes_of
from keepless.measure.running import standing_tensors as standing_tensors
from keepless.measure.running import tensors_in as tensors_in
from keepless.measure.updates import optimizer_updates as optimizer_updates
from keepless.measure.updates import step_alone as step_alone
