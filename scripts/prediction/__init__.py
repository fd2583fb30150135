"""Masks of the sounding objects of any video.

from scripts.prediction import load_for_prediction, predict

model = load_for_prediction("stamps-62")  # a packed model; or weights and config=...
predict(model, "video.mp4")  # predictions/video/{overlay.mp4, masks/, result.json}
"""

from scripts.prediction.model import PredictionModel, load_for_prediction
from scripts.prediction.options import Options
from scripts.prediction.results import Prediction
from scripts.prediction.run import predict

__all__ = ["Options", "Prediction", "PredictionModel", "load_for_prediction", "predict"]
