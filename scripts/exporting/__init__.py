"""Models as files that run without this project: torch.export, ONNX, AOTInductor.

from scripts.exporting import export_model

done = export_model(model, cfg, "onnx", "model.onnx")  # checked against the model before the file is there
"""

from scripts.exporting.export import TOLERANCE, Exported, export_model, inputs_of
from scripts.exporting.formats import FORMATS, Run
from scripts.exporting.timing import time_per_frame

__all__ = ["FORMATS", "TOLERANCE", "Exported", "Run", "export_model", "inputs_of", "time_per_frame"]
