"""The fixture of `runs`, for the tests here."""

from tests.predictor.runs import predicting as predicting
