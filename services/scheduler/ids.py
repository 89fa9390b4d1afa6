"""The ids that the scheduler's modules pass around. Nothing else lives here."""

from typing import NewType

# Numbers of one shard: slots and blocks count from 0, steps from 1 in each epoch.
SlotId = NewType("SlotId", int)
BlockId = NewType("BlockId", int)
StepId = NewType("StepId", int)
