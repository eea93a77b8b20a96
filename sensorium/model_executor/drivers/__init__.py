"""How the worker runs a model: one driver per tier of the extension API, behind one interface.

`base` has the interface, `text` the driver of models without media, `embeddings` tier 1 and 2, `cross` tier X,
`auto_split` and `atomic` tier 0, `dual` two towers. `media_encoder` calls encoders, `encoder_outputs` brings what they
return into one shape. Which driver a model gets is found out at load by the worker's probe.
"""

from sensorium.model_executor.drivers.atomic import AtomicDriver
from sensorium.model_executor.drivers.auto_split import AutoSplitDriver
from sensorium.model_executor.drivers.base import (
    EncodeJob,
    EncodeResult,
    ItemRows,
    MediaRows,
    ModelDriver,
    PlacedRows,
    StepInputs,
)
from sensorium.model_executor.drivers.cross import CrossDriver
from sensorium.model_executor.drivers.dual import DualDriver
from sensorium.model_executor.drivers.embeddings import EmbeddingsDriver
from sensorium.model_executor.drivers.media_encoder import MediaEncoder
from sensorium.model_executor.drivers.text import TextDriver

__all__ = [
    "AtomicDriver",
    "AutoSplitDriver",
    "CrossDriver",
    "DualDriver",
    "EmbeddingsDriver",
    "EncodeJob",
    "EncodeResult",
    "ItemRows",
    "MediaEncoder",
    "MediaRows",
    "ModelDriver",
    "PlacedRows",
    "StepInputs",
    "TextDriver",
]
