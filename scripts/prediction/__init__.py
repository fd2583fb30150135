"""Masks of the sounding objects of any video.

from scripts.prediction import from_pretrained, predict

model = from_pretrained("stamps-62")  # a packed model, a model folder, a name on the hub; or weights and config=...
predict(model, "video.mp4")  # predictions/video/{overlay.mp4, masks/, result.json}
"""

from scripts.prediction.model import PredictionModel, load_for_prediction
from scripts.prediction.options import Options
from scripts.prediction.results import Prediction
from scripts.prediction.run import predict

from_pretrained = load_for_prediction

__all__ = ["Options", "Prediction", "PredictionModel", "from_pretrained", "load_for_prediction", "predict"]
