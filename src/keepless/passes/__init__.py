"""Passes: from an order of ops to a program, and from programs to better programs."""

from keepless.passes.addresses import AddressPlan as AddressPlan
from keepless.passes.addresses import Block as Block
from keepless.passes.addresses import blocks_of as blocks_of
from keepless.passes.addresses import check_addresses as check_addresses
from keepless.passes.addresses import plan_addresses as plan_addresses
from keepless.passes.drops import insert_drops as insert_drops
from keepless.passes.evaluate import Evaluation as Evaluation
from keepless.passes.evaluate import evaluate as evaluate
from keepless.passes.order import from_order as from_order
from keepless.passes.retarget import Retargeted as Retargeted
from keepless.passes.retarget import retarget as retarget
from keepless.passes.reuse import reuse_storage as reuse_storage
