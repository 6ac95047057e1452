"""The small image model of `fairlead demo`: the pipeline `model/`, the pictures it learned from, and their judge."""

from pathlib import Path

MODEL = Path(__file__).parent / "model"
