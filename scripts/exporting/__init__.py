"""Models as files that run without this project: torch.export, ONNX, AOTInductor.

from scripts.exporting import export_model

done = export_model(model, cfg, "onnx", "model.onnx")  # checked against the model before the file is there
"""

from scripts.exporting.check import TOLERANCE, Differs, check_agreement
from scripts.exporting.export import Exported, export_model, inputs_of
from scripts.exporting.formats import FORMATS, Run
from scripts.exporting.timing import time_per_frame

__all__ = [
    "FORMATS",
    "TOLERANCE",
    "Differs",
    "Exported",
    "Run",
    "check_agreement",
    "export_model",
    "inputs_of",
    "time_per_frame",
]
