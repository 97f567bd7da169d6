"""Engines: running a training step by a program."""

from keepless.execute.codegen import Compiled as Compiled
from keepless.execute.codegen import compile_step as compile_step
from keepless.execute.drill import drilling as drilling
from keepless.execute.engine import Attached as Attached
from keepless.execute.engine import Miss as Miss
from keepless.execute.engine import News as News
from keepless.execute.engine import PlannedForward as PlannedForward
from keepless.execute.entry import Entry as Entry
from keepless.execute.entry import equip as equip
from keepless.execute.entry import make_entry as make_entry
from keepless.execute.entry import reprogrammed as reprogrammed
from keepless.execute.entry import run_entry as run_entry
from keepless.execute.nodes import Counters as Counters
from keepless.execute.recovery import Failure as Failure
from keepless.execute.recovery import Note as Note
from keepless.execute.recovery import Rescue as Rescue
from keepless.execute.recovery import Survivor as Survivor
from keepless.execute.shelf import Shelf as Shelf
from keepless.execute.updating import Updater as Updater
