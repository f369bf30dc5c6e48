"""Measures of uncertainty, computed from predictions under several dropout masks."""

from jdropout.uncertainty._classification import (
    expected_calibration_error as expected_calibration_error,
)
from jdropout.uncertainty._classification import log_mean_probabilities as log_mean_probabilities
from jdropout.uncertainty._classification import (
    predictive_log_likelihood as predictive_log_likelihood,
)
from jdropout.uncertainty._classification import variation_ratio as variation_ratio
from jdropout.uncertainty._entropies import entropy as entropy
from jdropout.uncertainty._entropies import expected_entropy as expected_entropy
from jdropout.uncertainty._entropies import mutual_information as mutual_information
from jdropout.uncertainty._entropies import predictive_entropy as predictive_entropy
from jdropout.uncertainty._regression import gaussian_log_likelihood as gaussian_log_likelihood
from jdropout.uncertainty._regression import gaussian_nll as gaussian_nll
from jdropout.uncertainty._regression import model_precision as model_precision

__all__ = [
    "entropy",
    "expected_calibration_error",
    "expected_entropy",
    "gaussian_log_likelihood",
    "gaussian_nll",
    "log_mean_probabilities",
    "model_precision",
    "mutual_information",
    "predictive_entropy",
    "predictive_log_likelihood",
    "variation_ratio",
]
